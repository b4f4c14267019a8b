#!/bin/bash
# A whole node of Kubernetes, and pods on it that connect in their first millisecond:
# etcd, API server, kubelet, containerd with runc and CNI, agent and companion, in
# mount and network namespaces and a cgroup of their own.
#
#   node.sh KUBE_APISERVER KUBELET [PODS [SECONDS]]
#
# A policy changes every 20 SECONDS; 0: none does.
# The two are of Kubernetes 1.20; docs/development.md says how they come to be had.
# Needs root, etcd, containerd, runc, the plugins of CNI, kubectl, ip, cc, python3, a
# host with cgroup v1 beside v2, and the release builds of agent and companion. What
# is measured is printed; ends with 0 when every pod had its policy.
set -euo pipefail

if [ -z "${KEEPALIVE_NODE:-}" ]; then
    [ $# -ge 2 ] || { sed -n '2,/^set/p' "$0" | sed '$d' >&2; exit 2; }
    apiserver=$(realpath "$1") kubelet=$(realpath "$2")
    here=$(cd "$(dirname "$0")" && pwd)
    # The driver ends what it started; the namespaces go with it.
    KEEPALIVE_NODE=1 exec unshare --mount --net "$here/node.sh" "$apiserver" "$kubelet" "${3:-100}" "${4:-20}"
fi

apiserver=$1 kubelet=$2 pods=$3 seconds=$4
here=$(cd "$(dirname "$0")" && pwd)
release=${KEEPALIVE_RELEASE:-$here/../../target/release}
PATH=$PATH:/usr/sbin:/sbin
group=ka-node-$$
name=n1
pids=()

# Everything that these programs write goes with this file system.
mount --make-rshared /
for directory in /run /var/log /mnt; do mount -t tmpfs tmpfs $directory; done
work=/mnt/node
mkdir -p $work /run/lock
for directory in /var/lib/kubelet /var/lib/containerd /var/lib/cni /etc/cni/net.d /opt/cni; do
    mkdir -p $directory
    mount -t tmpfs tmpfs $directory
done
mount --make-rshared /

controllers=()
while read -r target; do controllers+=("$target"); done < <(findmnt --types cgroup,cgroup2 --noheadings --list --output TARGET)

end() { # PID...
    local pid
    for pid in "$@"; do kill "$pid" 2> /dev/null || true; done
    for pid in "$@"; do
        for _ in $(seq 100); do kill -0 "$pid" 2> /dev/null || break; sleep 0.1; done
        kill -KILL "$pid" 2> /dev/null || true
    done
}
cleanup() {
    trap "" INT TERM
    set +e
    [ -z "${containerd:-}" ] || ctr --address $work/containerd.sock -n k8s.io tasks ls -q 2> /dev/null |
        while read -r task; do ctr --address $work/containerd.sock -n k8s.io tasks kill -s KILL "$task" || true; done
    # The newest first: the kubelet before its API.
    local i
    for ((i = ${#pids[@]} - 1; i >= 0; i--)); do end "${pids[i]}"; done
    local controller
    for controller in "${controllers[@]}"; do
        # What is left of containers: shims, and those whose cgroups they are.
        find "$controller/$group" -name cgroup.procs -exec cat {} + 2> /dev/null | sort -u |
            while read -r pid; do kill -KILL "$pid" 2> /dev/null || true; done
    done
    sleep 1
    for controller in "${controllers[@]}"; do
        find "$controller/$group" -depth -type d -exec rmdir {} \; 2> /dev/null || true
    done
}
trap cleanup EXIT
trap 'exit 130' INT TERM

start() { # LOG COMMAND...
    local log=$work/$1.log
    shift
    "$@" > "$log" 2>&1 &
    pids+=($!)
}
await() { # WHAT COMMAND...
    local what=$1
    shift
    for _ in $(seq 300); do
        if "$@" > /dev/null 2>&1; then return; fi
        sleep 0.2
    done
    echo "waited in vain for $what" >&2
    tail -n 20 $work/*.log >&2
    exit 1
}

ip link set lo up
ip link add eth0 type veth peer name eth1
ip addr add 10.77.0.1/24 dev eth0
ip link set eth0 up
ip link set eth1 up
ip route add default via 10.77.0.2

for controller in "${controllers[@]}"; do mkdir -p "$controller/$group"; done
# The kubelet wants these as they are here, and the host's are not to be changed.
for value in vm/overcommit_memory=1 vm/panic_on_oom=0 kernel/panic=10 kernel/panic_on_oops=1 \
    kernel/keys/root_maxkeys=1000000 kernel/keys/root_maxbytes=25000000; do
    file=$work/sysctl-$(echo "${value%=*}" | tr / -)
    echo "${value#*=}" > "$file"
    mount --bind "$file" "/proc/sys/${value%=*}"
done

# Images: one program that waits, one that connects.
mkdir $work/pause $work/first
cat > $work/pause.c << 'C'
#include <signal.h>
#include <unistd.h>
static void end(int signal) { (void)signal; _exit(0); }
int main(void) { signal(SIGTERM, end); signal(SIGINT, end); for (;;) pause(); }
C
cc -O1 -static -o $work/pause/pause $work/pause.c
cc -O1 -static -o $work/first/first "$here/../../tests/programs/first.c"
for program in pause first; do
    python3 "$here/image.py" $work/$program.tar localhost/$program:1 $work/$program /$program
done

cat > $work/containerd.toml << TOML
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "$work/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "/etc/cni/net.d"
TOML
cat > /etc/cni/net.d/10-ptp.conflist << 'JSON'
{"cniVersion":"0.4.0","name":"k8s","plugins":[{"type":"ptp","ipMasq":false,"ipam":{"type":"host-local","ranges":[[{"subnet":"10.88.0.0/20"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
JSON
start containerd containerd --config $work/containerd.toml
containerd=1
await containerd ctr --address $work/containerd.sock version
for program in pause first; do
    ctr --address $work/containerd.sock -n k8s.io images import $work/$program.tar > /dev/null
done

cd $work
openssl genrsa -out sa.key 2048 2> /dev/null
openssl rsa -in sa.key -pubout -out sa.pub 2> /dev/null
cat > tokens.csv << CSV
admin,admin,1,"system:masters"
node,system:node:$name,2,"system:nodes"
companion,system:serviceaccount:keepalive:keepalive-node,3,"system:serviceaccounts"
CSV
start etcd etcd --data-dir $work/etcd --listen-client-urls http://127.0.0.1:2379 \
    --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
start apiserver "$apiserver" --etcd-servers http://127.0.0.1:2379 --cert-dir $work/certs --secure-port 6443 \
    --bind-address 127.0.0.1 --advertise-address 127.0.0.1 --token-auth-file tokens.csv \
    --authorization-mode Node,RBAC --disable-admission-plugins=ServiceAccount \
    --endpoint-reconciler-type=none --service-account-issuer https://k --service-account-key-file sa.pub \
    --service-account-signing-key-file sa.key --service-cluster-ip-range 10.0.0.0/24
kubeconfig() { # USER
    cat > $work/$1.kubeconfig << YAML
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://127.0.0.1:6443", certificate-authority: $work/certs/apiserver.crt}}]
users: [{name: u, user: {token: $1}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
YAML
}
for user in admin node companion; do kubeconfig $user; done
export KUBECONFIG=$work/admin.kubeconfig
await "the API server" kubectl get --raw /readyz

kubectl apply -f "$here/../kubernetes/namespace/namespace.yaml" > /dev/null
kubectl apply -f "$here/../kubernetes/base/crds.yaml" -f "$here/../kubernetes/base/rbac.yaml" > /dev/null
kubectl create namespace shop > /dev/null

cat > kubelet.yaml << YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
cgroupRoot: /$group
failSwapOn: false
address: 127.0.0.1
evictionHard: {nodefs.available: "1%", imagefs.available: "1%", memory.available: "50Mi"}
imageGCHighThresholdPercent: 100
oomScoreAdj: 0
enforceNodeAllocatable: []
makeIPTablesUtilChains: false
kubeAPIQPS: 100
kubeAPIBurst: 200
eventRecordQPS: 0
maxPods: 250
YAML
start kubelet "$kubelet" --config kubelet.yaml --kubeconfig $work/node.kubeconfig --hostname-override $name \
    --node-ip 10.77.0.1 --container-runtime remote --container-runtime-endpoint unix://$work/containerd.sock \
    --cert-dir $work/kubelet-certs --root-dir /var/lib/kubelet --v 2
is_ready() { [ "$(kubectl get node $name -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
await "the node" is_ready

# A directory of its own, as on any node: the agent is woken by whoever writes to files
# beside its config, as to the logs here.
mkdir -p /run/keepalive/kubernetes $work/config
printf '[default]\n' > $work/config/keepalive.toml
start agent "$release/keepalive-agent" run --cgroup /$group --config $work/config/keepalive.toml \
    --drop-in-dir /run/keepalive/kubernetes --metrics /run/keepalive/kubernetes/metrics.sock --json
agent=${pids[-1]}
await "the agent" grep -q '"started"' $work/agent.log
KUBECONFIG=$work/companion.kubeconfig start companion "$release/keepalive-kube" node --node $name \
    --drop-in-dir /run/keepalive/kubernetes --agent /run/keepalive/kubernetes/metrics.sock
companion=${pids[-1]}
await "the companion's drop-in" test -e /run/keepalive/kubernetes/60-kubernetes.toml
python3 "$here/pods.py" "$name" "$pods" "$agent" "$companion" "$seconds"
