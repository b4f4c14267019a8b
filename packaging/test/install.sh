#!/bin/bash
# Installs the .deb on a Debian of its own, booted with its systemd in a container
# (systemd-nspawn), and looks at what becomes of connections inside:
#
#   test-install.sh SUITE OLD.deb NEW.deb DIRECTORY
#
# DIRECTORY keeps the base systems, which debootstrap makes in about a minute.
# Needs root, debootstrap, systemd-nspawn and cgroup v2. Leaves nothing else.
set -euo pipefail

suite=$1 old=$(realpath "$2") new=$(realpath "$3") cache=$4
name=keepalive-install-$$
base=$cache/$suite
system=$cache/$name
cgroup=$(findmnt --types cgroup2 --noheadings --output TARGET | head -n 1)/$name
nspawn=

say() { echo "$suite: $*"; }
fail() { echo "$suite: FAILED: $*" >&2; inside journalctl --no-pager -u keepalive-agent >&2 2> /dev/null || true; exit 1; }

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

if ! [ -e "$base/complete" ]; then
    say "making the base system"
    rm -rf --one-file-system "$base"
    mkdir -p "$cache"
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $codename" | head -n 1)
    [ -n "$mirror" ] || fail "apt knows no mirror; run apt-get update"
    debootstrap --variant=minbase \
        --include=systemd,systemd-sysv,dbus,iproute2,python3-minimal \
        "$suite" "$base" "$mirror" > "$base.log" || fail "debootstrap, see $base.log"
    touch "$base/complete"
fi
cp -a --reflink=auto "$base" "$system"
cp "$old" "$system/root/old.deb"
cp "$new" "$system/root/new.deb"

# A connection to itself for as long as the program lives; prints its port.
cat > "$system/root/connection.py" << 'PYTHON'
import socket, sys, time
listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
time.sleep(600)
PYTHON
# Connects again and again; writes down every end that came without keepalive.
cat > "$system/root/churn.py" << 'PYTHON'
import os, socket
listener = socket.create_server(("127.0.0.1", 7900))
count = 0
while not os.path.exists("/run/churn-stop"):
    client = socket.create_connection(listener.getsockname())
    server, _ = listener.accept()
    for end in client, server:
        if not end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            with open("/run/churn-missed", "a") as missed:
                missed.write(f"connection {count}\n")
    client.close()
    server.close()
    count += 1
with open("/run/churn-count", "w") as counted:
    counted.write(str(count))
PYTHON

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
    nspawn=
    find "$cgroup" -depth -type d -exec rmdir {} \; 2> /dev/null || true
}
inside() { nsenter -t "$init" -a -- "$@"; }
install() { # FILE
    inside env DEBIAN_FRONTEND=noninteractive dpkg -i --force-confold "/root/$1.deb" > "$cache/$name.dpkg" 2>&1 \
        || fail "dpkg -i $1.deb: $(cat "$cache/$name.dpkg")"
}
# What ss says of both ends of the connection on this port.
timers() { inside ss -Htno state established "( sport = :$1 or dport = :$1 )"; }
protected() { # PORT
    for _ in $(seq 50); do
        [ "$(timers "$1" | grep -c keepalive)" != 2 ] || return 0
        sleep 0.2
    done
    fail "the connection on port $1 has no keepalive: $(timers "$1")"
}
connect() { # PORT
    inside systemd-run --quiet --unit="connection-$1" python3 /root/connection.py "$1"
    for _ in $(seq 50); do [ "$(timers "$1" | wc -l)" -lt 2 ] || return 0; sleep 0.1; done
    fail "no connection on port $1"
}

boot
say "booted, systemd $(inside systemctl --version | awk 'NR == 1 { print $2 }')"
connect 7001
install old
[ "$(inside systemctl is-enabled keepalive-agent || true)" = disabled ] || fail "enabled by installing it"
inside systemctl enable --now keepalive-agent 2> /dev/null || fail "it does not start"
protected 7001
connect 7002
protected 7002
say "installed, enabled: connections from before and after have keepalive"

# 0 is the best, 10 the worst; older systemd cannot compare.
case $(inside systemctl --version | awk 'NR == 1 { print $2 }') in
    24*) ;;
    *) inside systemd-analyze security --threshold=40 keepalive-agent > "$cache/$name.security" \
        || fail "$(tail -n 1 "$cache/$name.security")"
        say "$(tail -n 1 "$cache/$name.security")" ;;
esac

inside systemd-run --quiet --unit=churn python3 /root/churn.py
sleep 1
install new
inside systemctl is-active --quiet keepalive-agent || fail "not running after the upgrade"
sleep 1
inside touch /run/churn-stop
for _ in $(seq 100); do ! inside test -e /run/churn-count || break; sleep 0.1; done
! inside test -e /run/churn-missed || fail "without keepalive while it was upgraded: $(inside cat /run/churn-missed)"
say "upgraded while $(inside cat /run/churn-count) connections were made, each with keepalive"

inside systemctl stop keepalive-agent
connect 7003
protected 7003
inside systemctl start keepalive-agent
say "stopped: the kernel goes on enforcing"

inside sed -i 's/^idle = .*/idle = "30s"/' /etc/keepalive/keepalive.toml
inside systemctl reload keepalive-agent || fail "reload"
connect 7004
# The signal is sent when systemctl returns, not yet followed.
by_new_config() { timers 7004 | grep -q 'keepalive,\(2[0-9]\|30\)sec'; }
for _ in $(seq 50); do ! by_new_config || break; sleep 0.2; done
by_new_config || fail "not by the new config: $(timers 7004)"
say "configured and reloaded"

# Each capability taken away: what is lost, and who says so.
drop_in=/run/systemd/system/keepalive-agent.service.d
without() { # CAPABILITY
    inside mkdir -p $drop_in
    inside sh -c "printf '[Service]\\nCapabilityBoundingSet=~$1\\n' > $drop_in/capability.conf"
    inside systemctl daemon-reload
}
with_all() {
    inside rm -r $drop_in
    inside systemctl daemon-reload
}
without CAP_SYS_ADMIN
! inside systemctl restart keepalive-agent 2> /dev/null || fail "it starts without CAP_SYS_ADMIN"
inside journalctl --quiet --output=cat -u keepalive-agent | grep -q 'error: missing CAP_' \
    || fail "it does not say which capability is missing"
connect 7005
protected 7005
# Another user's namespace, and a connection in it from before.
inside systemctl stop keepalive-agent
inside keepalive-agent detach > /dev/null
inside cp /root/connection.py /usr/local/
inside systemd-run --quiet --unit=other --property=PrivateNetwork=yes --property=DynamicUser=yes \
    python3 /usr/local/connection.py 7100
in_other() { inside nsenter -t "$(inside systemctl show --property=MainPID --value other)" -n -- "$@"; }
for _ in $(seq 50); do [ "$(in_other ss -Htn state established | wc -l)" -lt 2 ] || break; sleep 0.1; done
in_other_protected() { in_other ss -Htno state established | grep -c keepalive || true; }
without CAP_SYS_PTRACE
inside systemctl start keepalive-agent || fail "it does not start without CAP_SYS_PTRACE"
sleep 1
[ "$(in_other_protected)" = 0 ] || fail "CAP_SYS_PTRACE is not needed"
with_all
inside systemctl restart keepalive-agent
for _ in $(seq 50); do [ "$(in_other_protected)" != 2 ] || break; sleep 0.1; done
[ "$(in_other_protected)" = 2 ] || fail "no keepalive in another namespace: $(in_other ss -Htno)"
inside rm /usr/local/connection.py
say "without CAP_SYS_ADMIN it does not start and says why; without CAP_SYS_PTRACE other users' namespaces are missed"

power_off
boot
inside systemctl is-active --quiet keepalive-agent || fail "not running after a reboot"
[ "$(inside systemctl show --property=Result --value keepalive-agent)" = success ] || fail "it failed in between"
connect 7001
protected 7001
grep -q '"30s"' "$system/etc/keepalive/keepalive.toml" || fail "the config was not kept"
say "protected after a reboot"

# What stands in journald, for a reader of this log.
inside journalctl --no-pager --output=cat -u keepalive-agent | tail -n 12
inside dpkg --purge keepalive-agent > /dev/null 2>&1 || fail "purge"
left=$(inside find / -xdev '(' -name '*keepalive-agent*' -o -path /etc/keepalive -o -path '/run/keepalive*' ')' \
    -not -path '/proc/*' -not -path '/sys/*' -not -path '/var/log/*' | grep -v '^/var/lib/systemd' || true)
[ -z "$left" ] || fail "left by purge: $left"
! inside test -e /sys/fs/bpf/keepalive || fail "pins are left: $(inside ls -R /sys/fs/bpf/keepalive)"
connect 7006
[ "$(timers 7006 | grep -c keepalive)" = 0 ] || fail "still enforced: $(timers 7006)"
say "purged: nothing is left"
