#!/bin/bash
# Makes the initramfs of a guest.
#
#   image.sh MACHINE TREE KERNEL FILE
#
# TREE has init, plan, tests and programs; what they need of this machine is
# copied there. KERNEL is where a kernel was unpacked; its modules come on top.
set -euo pipefail

machine=$1 tree=$2 kernel=$3 file=$4
busybox=$machine/usr/bin/busybox

fail() { echo "$*" >&2; exit 1; }
pack() { # DIRECTORY
    (cd "$1" && find . | "$busybox" cpio -o -H newc 2> /dev/null)
}
program() { PATH=$PATH:/usr/sbin:/sbin command -v "$1"; }
copy() { # FILE: to its own path
    mkdir -p "$tree/${1%/*}"
    [ -e "$tree/$1" ] || cp -L "$1" "$tree/$1"
}

# The first guest makes what all of them have.
if ! [ -e "$tree/complete" ]; then
    mkdir -p "$tree"/{applets,bin,dev,modules,proc,run,sys,tmp,usr/bin}
    cp "$busybox" "$tree/bin/busybox"
    # What the tests' guards and the agent start. Not busybox's shell, which runs
    # its own applets in the place of programs.
    for tool in sh ip ss nsenter unshare setpriv mount umount sleep; do
        path=$(program $tool) || fail "$tool is not installed, and the tests in the guests need it"
        cp -L "$path" "$tree/usr/bin/"
    done
    ln -s ../usr/bin/sh "$tree/bin/sh"
    # A machine may lack these; tests skip without them.
    for tool in bpftool tcpdump; do
        ! path=$(program $tool) || cp -L "$path" "$tree/usr/bin/"
    done
    [ ! -e /usr/lib/libkeepalive.so.0 ] || copy /usr/lib/libkeepalive.so.0
    copy /etc/passwd
    copy /etc/group
    # The libraries of all of them. `ldd` fails for programs without any.
    find "$tree"/{usr,tests,programs} -type f -exec ldd {} + 2> /dev/null \
        | sed -n 's/.*=> \(\/[^ ]*\) .*/\1/p; s/^\t\(\/[^ ]*\) .*/\1/p' \
        | sort -u > "$tree.libraries" || true
    while read -r library; do copy "$library"; done < "$tree.libraries"
    touch "$tree/complete"
    pack "$tree" > "$tree.cpio"
fi

# Drivers that Debian's kernels have as modules, in an order in which they load.
modules=$(mktemp -d)
trap 'rm -rf "$modules"' EXIT
# It becomes the root directory, which users other than root are to look into.
chmod 755 "$modules"
mkdir "$modules/modules"
number=0
for module in net/ipv4/inet_diag net/ipv4/tcp_diag drivers/net/veth; do
    found=$(find "$kernel" -path "*/modules/*/kernel/$module.ko*" | head -n 1)
    to=$modules/modules/$number-${module##*/}.ko
    case $found in
        *.ko) cp "$found" "$to" ;;
        *.ko.xz) "$busybox" xz -d -c "$found" > "$to" ;;
        *) fail "$kernel has no module $module" ;;
    esac
    number=$((number + 1))
done
# The kernel unpacks several archives, one after the other.
{ cat "$tree.cpio"; pack "$modules"; } > "$file"
