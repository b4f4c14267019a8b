#!/bin/bash
# Installs a .deb or an .rpm on a Debian of its own and looks at what becomes of
# connections inside, from the installation to the purge:
#
#   install.sh SUITE OLD NEW CACHE
set -euo pipefail

suite=$1 old=$2 new=$3 cache=$4
what=${new##*.}
. "$(dirname "$0")/lib.sh"

case $what in
    deb) prepare ;;
    rpm) prepare rpm ;;
esac
cp "$(dirname "$0")/churn.py" "$system/root/"
cp "$old" "$system/root/old.$what"
cp "$new" "$system/root/new.$what"

# Debian's rpm wants to be told that it is meant, and knows nothing of what dpkg
# has installed.
in_rpm() { inside rpm --force-debian --nodeps "$@"; }
install() { # FILE
    case $what in
        deb) inside env DEBIAN_FRONTEND=noninteractive dpkg -i --force-confold "/root/$1.deb" ;;
        rpm) in_rpm --upgrade "/root/$1.rpm" ;;
    esac > "$cache/$name.installing" 2>&1 || fail "installing $1: $(cat "$cache/$name.installing")"
}
journal() { inside journalctl --quiet --no-pager -u keepalive-agent "$@"; }

boot
say "booted, systemd $(systemd_version)"
connect 7001
install old
[ "$(inside systemctl is-enabled keepalive-agent || true)" = disabled ] || fail "enabled by installing it"
inside systemctl enable --now keepalive-agent 2> /dev/null || fail "it does not start"
protected 7001
connect 7002
protected 7002
[ "$what" = deb ] || in_rpm --verify keepalive-agent || fail "rpm --verify"
say "installed, enabled: connections from before and after have keepalive"

# 0 is the best, 10 the worst; older systemd cannot compare. What is stated is the
# limit.
stated=$(sed -n 's/.*rates it \([0-9.]*\) of 10.*/\1/p' "$(dirname "$0")/../../docs/install.md")
if [ "$(systemd_version)" -ge 250 ]; then
    inside systemd-analyze security --threshold="${stated/./}" keepalive-agent > "$cache/$name.security" \
        || fail "worse than the $stated of docs/install.md: $(tail -n 1 "$cache/$name.security")"
    say "$(tail -n 1 "$cache/$name.security")"
fi

inside systemd-run --quiet --unit=churn python3 /root/churn.py
sleep 1
install new
inside systemctl is-active --quiet keepalive-agent || fail "not running after the upgrade"
sleep 1
inside touch /run/churn-stop
within inside test -e /run/churn-count || fail "the churn does not end"
! inside test -e /run/churn-missed || fail "without keepalive while it was upgraded: $(inside cat /run/churn-missed)"
count=$(inside cat /run/churn-count)
[ "$count" -gt 100 ] || fail "only $count connections while it was upgraded"
say "upgraded while $count connections were made, each with keepalive"

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
within by_new_config || fail "not by the new config: $(timers 7004)"
say "configured and reloaded"

# One record for each change, with its fields, and why.
# The file's change may have been followed before the signal came.
has_reloaded() { journal --output=cat KEEPALIVE_EVENT=reloaded KEEPALIVE_WHY=SIGHUP | grep -q .; }
within has_reloaded || fail "the journal does not tell of the reload: $(journal --output=cat)"
[ "$(journal --output=cat KEEPALIVE_EVENT=reloaded | wc -l)" -le 2 ] || fail "more lines than changes"
# Where it had been, the signal has nothing that is different to tell of.
journal --output=export KEEPALIVE_EVENT=reloaded > "$cache/$name.record"
for field in PRIORITY=6 SYSLOG_IDENTIFIER=keepalive-agent KEEPALIVE_POLICIES=default KEEPALIVE_WHY=SIGHUP; do
    grep -q "^$field" "$cache/$name.record" || fail "no $field in the journal: $(cat "$cache/$name.record")"
done
inside sed -i 's/^idle = .*/idle = "nonsense"/' /etc/keepalive/keepalive.toml
is_refused() { journal --output=cat PRIORITY=3 | grep -q 'keepalive.toml:[0-9]'; }
within is_refused || fail "the journal does not say what is wrong with the config: $(journal --output=cat)"
inside sed -i 's/^idle = .*/idle = "30s"/' /etc/keepalive/keepalive.toml
say "the journal has it: $(journal --output=cat KEEPALIVE_EVENT=reloaded | tail -n 1)"

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
journal --output=cat PRIORITY=3 | grep -q 'missing CAP_' || fail "it does not say which capability is missing"
connect 7005
protected 7005
# Another user's namespace, and a connection in it from before.
inside systemctl stop keepalive-agent
inside keepalive-agent detach > /dev/null
inside cp /root/connection.py /usr/local/
inside systemd-run --quiet --unit=other --property=PrivateNetwork=yes --property=DynamicUser=yes \
    python3 /usr/local/connection.py 7100
in_other() { inside nsenter -t "$(inside systemctl show --property=MainPID --value other)" -n -- "$@"; }
other_is_connected() { [ "$(in_other ss -Htn state established | wc -l)" = 2 ]; }
within other_is_connected || fail "no connection in another namespace"
protected_in_other() { in_other ss -Htno state established | grep -c keepalive || true; }
other_is_protected() { [ "$(protected_in_other)" = 2 ]; }
without CAP_SYS_PTRACE
inside systemctl start keepalive-agent || fail "it does not start without CAP_SYS_PTRACE"
has_swept() { journal --output=cat KEEPALIVE_EVENT=swept _PID="$(inside systemctl show --property=MainPID --value keepalive-agent)" | grep -q .; }
within has_swept || fail "no sweep"
[ "$(protected_in_other)" = 0 ] || fail "CAP_SYS_PTRACE is not needed"
inside keepalive-agent status --cgroup / > "$cache/$name.status" || true
grep -q CAP_SYS_PTRACE "$cache/$name.status" || fail "status does not say what is missing: $(cat "$cache/$name.status")"
with_all
inside systemctl restart keepalive-agent
within other_is_protected || fail "no keepalive in another namespace: $(in_other ss -Htno)"
inside systemctl stop other
inside rm /usr/local/connection.py
say "without CAP_SYS_ADMIN it does not start and says why; without CAP_SYS_PTRACE other users' namespaces are missed, and status says so"

# The earliest that a service may think of the network.
cat > "$system/etc/systemd/system/early.service" << 'UNIT'
[Unit]
DefaultDependencies=no
After=network-pre.target
[Service]
ExecStart=python3 /root/connection.py 7200 /run/early
[Install]
WantedBy=sysinit.target
UNIT
inside systemctl enable early.service 2> /dev/null
power_off
boot
inside systemctl is-active --quiet keepalive-agent || fail "not running after a reboot"
[ "$(inside systemctl show --property=Result --value keepalive-agent)" = success ] || fail "it failed in between"
within inside test -s /run/early || fail "no early connection: $(inside systemctl status early)"
[ "$(inside cat /run/early)" = "1 1" ] || fail "the first connection has no keepalive: $(inside cat /run/early)"
connect 7001
protected 7001
grep -q '"30s"' "$system/etc/keepalive/keepalive.toml" || fail "the config was not kept"
inside systemctl disable --now early.service 2> /dev/null
say "rebooted: protected from the first connection on"

case $what in
    deb) inside dpkg --purge keepalive-agent ;;
    # What rpm keeps of a config that was changed is the administrator's.
    rpm) in_rpm --erase keepalive-agent && inside rm /etc/keepalive/keepalive.toml.rpmsave &&
        inside rmdir /etc/keepalive ;;
esac > "$cache/$name.purging" 2>&1 || fail "purge: $(cat "$cache/$name.purging")"
left=$(inside find / -xdev '(' -name '*keepalive-agent*' -o -path /etc/keepalive -o -path '/run/keepalive*' ')' \
    -not -path '/proc/*' -not -path '/sys/*' -not -path '/var/log/*' | grep -v '^/var/lib/systemd' || true)
[ -z "$left" ] || fail "left by purge: $left"
! inside test -e /sys/fs/bpf/keepalive || fail "pins are left: $(inside ls -R /sys/fs/bpf/keepalive)"
connect 7006
! is_protected 7006 || fail "still enforced: $(timers 7006)"
say "purged: nothing is left"
