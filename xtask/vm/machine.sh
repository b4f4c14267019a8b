#!/bin/bash
# Makes a Debian that has QEMU, and below its /kernels those of other suites,
# unpacked; fetches newer ones when its lists are older than a day.
#
#   machine.sh DIRECTORY SERIES=SUITE...
set -euo pipefail

machine=$1
shift
# Older ones crash now and then under newer kernels (QEMU 7.2: one boot in ten).
release=trixie

fail() { echo "$*" >&2; exit 1; }
own=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
uri() { # SUITE
    apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' \
        | awk -v suite="$1" '$2 == suite { print $1; exit }'
}
main=$(uri "$own") security=$(uri "$own-security")
[ -n "$main" ] && [ -n "$security" ] \
    || fail "this machine's apt has no source for Debian's archive and its security updates: without them there is no kernel to boot"

if ! [ -e "$machine/complete" ]; then
    rm -rf --one-file-system "$machine"
    debootstrap --variant=minbase --include=qemu-system-x86,busybox-static,ca-certificates \
        "$release" "$machine" "$main" > "$machine.log" || fail "debootstrap, see $machine.log"
    touch "$machine/complete"
fi

cp -L /etc/hosts /etc/resolv.conf "$machine/etc/"
{
    echo "deb $main $release main"
    for kernel; do
        case $kernel in
            *-security) echo "deb $security ${kernel#*=} main" ;;
            *) echo "deb $main ${kernel#*=} main" ;;
        esac
    done
} > "$machine/sources"
if ! cmp -s "$machine/sources" "$machine/etc/apt/sources.list" \
    || [ -z "$(find "$machine/updated" -mtime -1 2> /dev/null)" ]; then
    cp "$machine/sources" "$machine/etc/apt/sources.list"
    chroot "$machine" apt-get --quiet -o Acquire::Languages=none --error-on=any update
    touch "$machine/updated"
fi
for kernel; do
    series=${kernel%%=*} suite=${kernel#*=}
    # The cloud kernel has the same code and fewer drivers. Some are in packages of
    # their own, all of which are of the image's source.
    package=$(chroot "$machine" apt-cache -t "$suite" depends linux-image-cloud-amd64 \
        | sed -n 's/^  Depends: \(linux-image-[0-9].*\)/\1/p')
    case $package in
        linux-image-"$series"[.-]*) ;;
        *) fail "$suite has no kernel $series, but $package" ;;
    esac
    directory=/kernels/$package
    if ! [ -e "$machine/$directory/complete" ]; then
        rm -rf "$machine/$directory"
        mkdir -p "$machine/$directory/archives/partial"
        chroot "$machine" apt-get --quiet --quiet --yes --no-install-recommends --download-only \
            -o "Dir::Cache::Archives=$directory/archives" -t "$suite" install "$package"
        for archive in "$machine/$directory"/archives/linux-*.deb; do
            dpkg-deb --extract "$archive" "$machine/$directory"
        done
        rm -r "$machine/$directory/archives"
        touch "$machine/$directory/complete"
    fi
    # What is booted: with its modules since 7.
    (cd "$machine/$directory" && ln -sfn "$(find . -type f -name 'vmlinuz*' | head -n 1)" image)
    ln -sfn "$package" "$machine/kernels/$series"
done
