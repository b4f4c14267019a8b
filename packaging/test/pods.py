"""Pods that connect in their first millisecond, for node.sh, which runs it:
pods.py NODE COUNT AGENT COMPANION SECONDS

Each has one of three policies, by its labels, or none. The idle time of one of the
policies changes every so many SECONDS, unless that is 0; of its pods those count that
were made when it was not being changed, and the others must have one of the two
values. Prints what was seen and what it cost; ends with 0 when every pod had its
policy.
"""
import glob
import http.client
import json
import os
import ssl
import sys
import time
from collections import deque

NODE, COUNT, AGENT, COMPANION, CHANGED_EVERY = sys.argv[1], int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5])
AT_ONCE = 8
NAMESPACE = "/api/v1/namespaces/shop/pods"
POLICIES = "/apis/keepalive.internal/v1alpha1/namespaces/shop/keepalivepolicies"
# Seconds after a change in which a pod may have either value.
CHANGING = 5
# Seconds that a pod is kept after it has ended.
KEPT = 10

connection = http.client.HTTPSConnection("127.0.0.1", 6443, context=ssl._create_unverified_context())


def ask(method, path, body=None, kind="application/json"):
    headers = {"Authorization": "Bearer admin", "Content-Type": kind}
    connection.request(method, path, body and json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read()
    if response.status >= 300:
        raise SystemExit(f"{method} {path}: {response.status} {text[:500]}")
    return json.loads(text)


def policy(name, tier, idle):
    spec = {"podSelector": {"matchLabels": {"tier": tier}}, "idle": f"{idle}s"}
    meta = {"name": name, "namespace": "shop"}
    ask("POST", POLICIES, {"apiVersion": "keepalive.internal/v1alpha1", "kind": "KeepalivePolicy", "metadata": meta, "spec": spec})


def cpu(pid):
    """Seconds of CPU time, user and system."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid):
    """KiB: resident, and of that its own."""
    with open(f"/proc/{pid}/status") as status:
        found = dict(line.split(":", 1) for line in status)
    return int(found["VmRSS"].split()[0]), int(found["RssAnon"].split()[0])


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def state():
    told = {}
    for name, pid in (("agent", AGENT), ("companion", COMPANION)):
        told[name] = {"cpu": cpu(pid), "memory": memory(pid), "descriptors": descriptors(pid)}
    return told


TIERS = {"db": 61, "web": 70, "cache": 62, None: 60}
for tier in ("db", "cache", "web"):
    policy(tier, tier, TIERS[tier])
time.sleep(5)
web, web_before, changed_at, changes = 70, 70, 0.0, 0
running, results, either, wrong, ended = {}, 0, 0, [], deque()
made = 0
begun = time.time()
before = state()
last_list = 0
while made < COUNT or running:
    now = time.time()
    if CHANGED_EVERY and now - changed_at > CHANGED_EVERY:
        web, web_before, changed_at = 70 + (web - 69) % 20, web, now
        ask("PATCH", f"{POLICIES}/web", {"spec": {"idle": f"{web}s"}}, "application/merge-patch+json")
        changes += 1
    while made < COUNT and len(running) < AT_ONCE:
        tier = list(TIERS)[made % len(TIERS)]
        name = f"p{made}"
        labels = {"n": str(made)} | ({"tier": tier} if tier else {})
        container = {"name": "app", "image": "localhost/first:1", "imagePullPolicy": "Never"}
        spec = {"nodeName": NODE, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]}
        pod = ask("POST", NAMESPACE, {"metadata": {"name": name, "labels": labels}, "spec": spec})
        running[name] = (tier, time.time(), pod["metadata"]["uid"], web, web_before, changed_at)
        made += 1
    # As whoever made it does, some time after the kubelet has cleaned up.
    while ended and now - ended[0][0] > KEPT:
        ask("DELETE", f"{NAMESPACE}/{ended.popleft()[1]}")
    time.sleep(0.25)
    for pod in ask("GET", NAMESPACE)["items"]:
        name, phase = pod["metadata"]["name"], pod["status"].get("phase")
        if name not in running or phase not in ("Succeeded", "Failed"):
            continue
        tier, at, uid, then, then_before, then_changed = running.pop(name)
        logs = glob.glob(f"/var/log/pods/shop_{name}_{uid}/app/*.log")
        lines = [line.split()[3:] for log in logs for line in open(log)]
        idles = {int(line[1]) if line[0] == "1" else None for line in lines}
        if tier == "web":
            # Made while a change was on its way, or changed since.
            both = {web, web_before, then, then_before}
            settled = at - then_changed > CHANGING and then_changed == changed_at
            expected = {then} if settled else both
            either += not settled
        else:
            expected = {TIERS[tier]}
        if len(lines) != 2 or len(idles) != 1 or not idles <= expected:
            wrong.append((name, tier, sorted(map(str, idles)), sorted(expected), phase))
        results += 1
        ended.append((now, name))
        if results % 100 == 0:
            print(f"{results} pods, {len(wrong)} wrong, {time.time() - begun:.0f} s", flush=True)
took = time.time() - begun
# What ends is told a while later.
time.sleep(10)
after = state()
print(f"{results} pods started in {took:.0f} s, {AT_ONCE} at once; the policy of a quarter of them changed {changes} times meanwhile")
print(f"wrong: {len(wrong)}; of {either} it was either of two values, as the policy was just being changed")
for entry in wrong[:20]:
    print(" ", *entry)
for name in ("agent", "companion"):
    one, two = before[name], after[name]
    each = (two["cpu"] - one["cpu"]) / results * 1000
    print(
        f"{name}: {each:.2f} ms of CPU time for each pod; resident {one['memory'][0]} KiB before, {two['memory'][0]} after, "
        f"its own {one['memory'][1]} and {two['memory'][1]}; descriptors {one['descriptors']} and {two['descriptors']}"
    )
sys.exit(1 if wrong or results != COUNT else 0)
