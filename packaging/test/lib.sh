# A Debian of its own, booted with its systemd in a container (systemd-nspawn).
# For the scripts beside it, which set:
#
#   suite  of Debian
#   cache  keeps the base systems, which debootstrap makes in about a minute
#   what   is tested, for the report
#
# Needs root, debootstrap, systemd-nspawn and cgroup v2. Leaves nothing but `cache`.

name=keepalive-install-$$
system=$cache/$name
cgroup=$(findmnt --types cgroup2 --noheadings --output TARGET | head -n 1)/$name
nspawn= init=

say() { echo "$suite, $what: $*"; }
fail() {
    [ -z "$init" ] || inside journalctl --no-pager -n 50 >&2 2> /dev/null || true
    echo "$suite, $what: FAILED: $*" >&2
    exit 1
}

cleanup() {
    if [ -n "$nspawn" ]; then
        kill -TERM "$nspawn" 2> /dev/null || true
        for _ in $(seq 50); do kill -0 "$nspawn" 2> /dev/null || break; sleep 0.1; done
        kill -KILL "$nspawn" 2> /dev/null || true
        wait "$nspawn" 2> /dev/null || true
    fi
    rm -rf --one-file-system "$system" "$system.bpf" "$cache/$name".*
    find "$cgroup" -depth -type d -exec rmdir {} \; 2> /dev/null || true
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Makes a system, of what every one has and these packages.
prepare() { # PACKAGE...
    local base=$cache/$suite codename mirror more
    if ! [ -e "$base/complete" ]; then
        say "making the base system"
        rm -rf --one-file-system "$base"
        mkdir -p "$cache"
        codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
        mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $codename" | head -n 1)
        [ -n "$mirror" ] || fail "apt knows no mirror; run apt-get update"
        debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,iproute2,python3-minimal \
            "$suite" "$base" "$mirror" > "$base.log" || fail "debootstrap, see $base.log"
        cp -L /etc/hosts /etc/resolv.conf "$base/etc/"
        touch "$base/complete"
    fi
    more=$base-$(IFS=-; echo "$*")
    if [ $# -gt 0 ] && ! [ -e "$more/complete" ]; then
        say "adding $*"
        rm -rf --one-file-system "$more"
        cp -a --reflink=auto "$base" "$more"
        rm "$more/complete"
        # No debootstrap: it does not choose between alternatives.
        {
            chroot "$more" apt-get update
            chroot "$more" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends "$@"
            chroot "$more" apt-get clean
        } > "$more.log" 2>&1 || fail "apt-get, see $more.log"
        touch "$more/complete"
    fi
    [ $# -eq 0 ] || base=$more
    cp -a --reflink=auto "$base" "$system"
    cp "$(dirname "$0")/connection.py" "$system/root/"
}

boot() {
    mkdir -p "$cgroup"
    bash -c 'echo $$ > "$1/cgroup.procs"
        exec unshare --mount --propagation private bash -c "
            umount -R /sys/fs/cgroup
            mount -t cgroup2 none /sys/fs/cgroup
            # In a container systemd leaves mounting this to others.
            mkdir -p \"\$0.bpf\"
            mount -t bpf bpf \"\$0.bpf\"
            export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
            exec systemd-nspawn --quiet -D \"\$0\" -M \"\$1\" --boot --register=no --keep-unit \
                --private-network --bind=\"\$0.bpf:/sys/fs/bpf\" --console=passive --capability=all \
                --system-call-filter=\"@known bpf perf_event_open\"" "$2" "$3"' \
        bash "$cgroup" "$system" "$name" > "$cache/$name.log" 2>&1 < /dev/null &
    nspawn=$!
    for _ in $(seq 300); do
        init=$(pgrep -P "$nspawn" 2> /dev/null | head -n 1 || true)
        if [ -n "$init" ]; then
            state=$(inside systemctl is-system-running 2> /dev/null || true)
            case $state in running | degraded) return ;; esac
        fi
        sleep 0.2
    done
    fail "it does not boot: $(tail -n 3 "$cache/$name.log")"
}
power_off() {
    inside systemctl poweroff > /dev/null 2>&1 || true
    wait "$nspawn" 2> /dev/null || true
    nspawn= init=
    find "$cgroup" -depth -type d -exec rmdir {} \; 2> /dev/null || true
}
inside() { nsenter -t "$init" -a -- "$@"; }
systemd_version() { inside systemctl --version | awk 'NR == 1 { print $2 }'; }

# Until the command succeeds, for 10 s.
within() {
    for _ in $(seq 100); do
        ! "$@" || return 0
        sleep 0.1
    done
    return 1
}
# What ss says of both ends of the connection on this port.
timers() { inside ss -Htno state established "( sport = :$1 or dport = :$1 )"; }
is_connected() { [ "$(timers "$1" | wc -l)" = 2 ]; }
is_protected() { [ "$(timers "$1" | grep -c keepalive)" = 2 ]; }
protected() { # PORT
    within is_protected "$1" || fail "the connection on port $1 has no keepalive: $(timers "$1")"
}
connect() { # PORT
    inside systemd-run --quiet --unit="connection-$1" python3 /root/connection.py "$1"
    within is_connected "$1" || fail "no connection on port $1"
}
