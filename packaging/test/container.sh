#!/bin/bash
# Runs the container image by podman and by docker on a Debian of its own, with the
# very command of docs/install.md, and looks at what becomes of connections:
#
#   container.sh SUITE PACKAGES CACHE
#
# PACKAGES is where `cargo xtask dist` has left the static binary.
set -euo pipefail

suite=$1 packages=$2 cache=$3
what=container
. "$(dirname "$0")/lib.sh"
project=$(dirname "$0")/../..

prepare podman docker.io runc
mkdir "$system/root/packages"
cp "$packages/keepalive-agent" "$system/root/packages/"
cp "$project/packaging/Containerfile" "$system/root/"
cp "$system/root/connection.py" "$system/usr/local/"
# Limits take cgroup controllers and privileges that a machine like this may lack.
mkdir -p "$system/etc/containers"
cat > "$system/etc/containers/containers.conf" << 'CONF'
[containers]
pids_limit = 0
default_ulimits = ["nofile=1024:4096", "nproc=1024:4096"]
[engine]
runtime = "runc"
CONF

# The command that the documentation has, lines joined.
documented=$(sed -n '/^    podman run /,/[^\\]$/p' "$project/docs/install.md" | sed 's/\\$//' | tr -d '\n')
[ -n "$documented" ] || fail "docs/install.md has no podman run"
case $documented in *privileged*) fail "docs/install.md asks for --privileged" ;; esac
agent() { # ENGINE OPTION COMMAND...
    local engine=$1 option=$2 command
    shift 2
    command=${documented/podman run --rm --name keepalive-agent/$engine run --rm $option}
    # shellcheck disable=SC2086
    inside ${command% run --pin} "$@"
}
in_other() { inside nsenter -t "$(inside systemctl show --property=MainPID --value other)" -n -- "$@"; }
other_is() { [ "$(in_other ss -Htno state established | grep -c "$1")" = 2 ]; }

# What works, and what is not seen from here; the system of this test has
# namespaces of its own.
parts() { grep '^part '; }

boot
inside systemd-run --quiet --unit=plain /root/packages/keepalive-agent run
is_up() {
    inside /root/packages/keepalive-agent status --cgroup / > "$cache/$name.plain" 2>&1 || true
    grep -q 'existing connections active' "$cache/$name.plain"
}
within is_up || fail "the agent does not run without a container: $(cat "$cache/$name.plain")"
inside systemctl stop plain
for engine in podman docker; do
    what="$engine $(inside $engine --version | grep -o '[0-9][0-9.]*' | head -n 1)"
    inside $engine build -t keepalive-agent -f /root/Containerfile /root/packages > "$cache/$name.build" 2>&1 \
        || fail "build: $(cat "$cache/$name.build")"
    inside mkdir -p /etc/keepalive /run/keepalive
    connect 7001
    inside systemd-run --quiet --unit=other --property=PrivateNetwork=yes --property=DynamicUser=yes \
        python3 /usr/local/connection.py 7100
    within other_is 7100 || fail "no connection in another namespace"
    agent $engine "--detach --name keepalive-agent" run --pin > "$cache/$name.run" 2>&1 \
        || fail "run: $(cat "$cache/$name.run")"
    protected 7001
    within other_is keepalive || fail "another namespace is not reached: $(inside $engine logs keepalive-agent 2>&1)"
    connect 7002
    is_protected 7002 || fail "a new connection has no keepalive: $(timers 7002)"
    [ "$(inside $engine inspect --format '{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.Privileged}}' keepalive-agent)" = "true false" ] \
        || fail "not read-only, or privileged"
    inside $engine exec keepalive-agent /keepalive-agent status --cgroup / > "$cache/$name.status" 2>&1 || [ $? = 4 ] \
        || fail "status: $(cat "$cache/$name.status")"
    grep -q 'enforcement goes on without it' "$cache/$name.status" || fail "status: $(cat "$cache/$name.status")"
    [ "$(parts < "$cache/$name.status")" = "$(parts < "$cache/$name.plain")" ] \
        || fail "not as without a container: $(diff "$cache/$name.plain" "$cache/$name.status")"
    inside $engine stop keepalive-agent > /dev/null 2>&1 || fail "it does not stop"
    connect 7003
    is_protected 7003 || fail "enforcement ended with the container"
    agent $engine "" detach > "$cache/$name.detach" 2>&1 || fail "detach: $(cat "$cache/$name.detach")"
    connect 7004
    ! is_protected 7004 || fail "still enforced: $(timers 7004)"
    for unit in connection-700{1,2,3,4} other; do inside systemctl stop $unit; done
    say "governs the host from a container, read-only and unprivileged"
done
