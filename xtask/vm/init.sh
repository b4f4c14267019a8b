#!/bin/busybox sh
# The first process of a guest: runs what /plan names and reports on the second
# serial line. What begins with "@ " is read by the host; the rest is output of
# the tests. Nothing is believed without the last line.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:/applets
/bin/busybox --install -s /applets
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /sys/fs/cgroup
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
ip link set lo up
exec >/dev/ttyS1 2>&1 </dev/null

echo "@ kernel $(uname -r)"
for module in /modules/*; do
    insmod "$module" || echo "@ broken: cannot load $module"
done
if grep -q keepalive.types /proc/cmdline; then
    stty raw -F /dev/ttyS2
    cat /sys/kernel/btf/vmlinux >/dev/ttyS2
fi

# Many sockets in one process, where the host allows it as well.
ulimit -n 20000
# A machine of this size is not the kernel's business; the agent's limit for
# locked memory stays as the kernel gives it.
echo "@ memlock $(ulimit -l)"
export KEEPALIVE_AGENT=/tests/keepalive-agent
export KEEPALIVE_TEST_PROGRAMS=/programs
export KEEPALIVE_SKIPS=/tmp/skips

timeout 60 "$KEEPALIVE_AGENT" check --json >/tmp/output 2>&1
echo "@ check $? $(tr '\n' ' ' </tmp/output)"

count=0
cd /tests || exit 1
while read -r name limit arguments; do
    echo "@ begin $name"
    : >"$KEEPALIVE_SKIPS"
    # shellcheck disable=SC2086
    # Apart: what a test writes past the harness lands in the midst of its lines.
    timeout -k 5 "$limit" "./$name" $arguments >/tmp/output 2>/tmp/errors </dev/null
    code=$?
    tail -c 200000 /tmp/output
    tail -c 100000 /tmp/errors
    echo
    sed 's/^/@ skip /' "$KEEPALIVE_SKIPS"
    echo "@ end $name $code $(cut -d' ' -f1 /proc/uptime)"
    count=$((count + 1))
done </plan
echo "@ finished $count"
sync
reboot -f
