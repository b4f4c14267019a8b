#!/bin/bash
# What keepalive does behind a NAT, in half a minute: a client, a router and a
# server in network namespaces of their own. The router masquerades and forgets a
# connection after 10 s of silence, as a NAT gateway in the cloud does after 350.
# Two clients that never heard of keepalive are silent for 15 s and then ask:
# one in a cgroup that the agent governs, one in a cgroup that it does not.
#
# Touches nothing of the host: namespaces and a cgroup of its own, which go away
# at the end. Needs root, ip, nft and python3. Ends with 0 when the first client
# got its answer and the second did not.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
agent=${KEEPALIVE_AGENT:-}
for candidate in "$here/../target/release/keepalive-agent" "$(command -v keepalive-agent || true)"; do
    [ -n "$agent" ] || ! [ -x "$candidate" ] || agent=$candidate
done
[ -n "$agent" ] || { echo "no keepalive-agent: build it with cargo xtask build" >&2; exit 2; }
[ "$(id -u)" = 0 ] || { echo "needs root: sudo $0" >&2; exit 2; }
PATH=$PATH:/usr/sbin:/sbin
for program in ip nft python3; do
    command -v $program > /dev/null || { echo "$program is not installed" >&2; exit 2; }
done

name=keepalive-demo-$$
root=$(findmnt --types cgroup2 --noheadings --output TARGET | head -n 1)
work=$(mktemp -d)
pids=()

cleanup() {
    for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
    wait
    for part in client router server; do ip netns delete $name-$part 2> /dev/null || true; done
    rmdir "$root/$name/governed" "$root/$name/other" "$root/$name" 2> /dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# client 10.203.1.2 - 10.203.1.1 router 10.203.2.1 - 10.203.2.2 server
in_part() { local part=$1; shift; ip netns exec "$name-$part" "$@"; }
for part in client router server; do
    ip netns add $name-$part
    ip -n $name-$part link set lo up
done
connect() { # NAME NETWORK
    ip -n $name-router link add "$1" type veth peer name eth0 netns $name-$1
    ip -n $name-router addr add "$2.1/24" dev "$1"
    ip -n $name-router link set "$1" up
    ip -n $name-$1 addr add "$2.2/24" dev eth0
    ip -n $name-$1 link set eth0 up
    ip -n $name-$1 route add default via "$2.1"
}
connect client 10.203.1
connect server 10.203.2
set_in_router() { in_part router sh -c 'echo "$2" > "/proc/sys/net/$1"' sh "$@"; } # NAME VALUE
set_in_router ipv4/ip_forward 1
in_part router nft -f - << 'RULES'
table ip nat {
    chain out {
        type nat hook postrouting priority 100;
        oifname "server" masquerade
    }
}
table ip filter {
    chain forward {
        type filter hook forward priority 0;
        ct state invalid drop
        ct state new tcp flags & (syn | ack) != syn drop
    }
}
RULES
set_in_router netfilter/nf_conntrack_tcp_timeout_established 10
set_in_router netfilter/nf_conntrack_tcp_loose 0

cat > "$work/server.py" << 'PYTHON'
import socket, threading
listener = socket.create_server(("10.203.2.2", 5432))
def answer(connection):
    while data := connection.recv(100):
        connection.sendall(b"answer to " + data)
while True:
    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()
PYTHON
cat > "$work/client.py" << 'PYTHON'
import socket, sys, time
connection = socket.create_connection(("10.203.2.2", 5432), timeout=5)
connection.sendall(b"1")
assert connection.recv(100)
time.sleep(15)
connection.sendall(b"2")
try:
    sys.exit(0 if connection.recv(100) else 1)
except TimeoutError:
    sys.exit(1)
PYTHON
printf '[default]\nidle = "3s"\ninterval = "1s"\nprobes = 3\n' > "$work/keepalive.toml"

mkdir "$root/$name" "$root/$name/governed" "$root/$name/other"
# Not by the function: the process to end is the one that bash starts here.
ip netns exec $name-server python3 "$work/server.py" > "$work/server.log" 2>&1 &
pids+=($!)
"$agent" run --cgroup "/$name/governed" --config "$work/keepalive.toml" > "$work/agent.log" 2>&1 &
pids+=($!)
started() { grep -q '^enforcing' "$work/agent.log" && in_part server ss -ltn | grep -q :5432; }
for _ in $(seq 100); do started && break; sleep 0.1; done
started || { echo "the agent or the server did not start:" >&2; cat "$work/agent.log" >&2; exit 2; }

client() { # CGROUP
    echo $BASHPID > "$root/$name/$1/cgroup.procs"
    exec ip netns exec $name-client python3 "$work/client.py"
}
echo "two connections through a NAT that forgets after 10 s of silence; both are silent for 15 s"
client governed &
governed=$!
client other &
other=$!
pids+=("$governed" "$other")
for _ in $(seq 50); do
    [ "$(in_part client ss -Htn state established | wc -l)" -lt 2 ] || break
    sleep 0.1
done
in_part client ss -tno
with=0; wait "$governed" || with=$?
without=0; wait "$other" || without=$?
says() { if [ "$1" = 0 ]; then echo "the answer came"; else echo "no answer in 5 s: the connection hangs"; fi; }
echo "without keepalive: $(says $without)"
echo "with keepalive:    $(says $with)"
[ $with = 0 ] && [ $without != 0 ]
