#!/usr/bin/env python3
"""Containers of podman that connect in their first millisecond, one after the other:
podman.py [COUNT]

In a mount namespace and a cgroup of their own. Needs root, podman, runc, bpftool, cc
and the release build of the agent. Prints what the agent has before and after; ends
with 0 when every container had its policy and nothing of them is left.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RELEASE = Path(os.environ.get("KEEPALIVE_RELEASE", HERE / "../../target/release"))
COUNT = int(sys.argv[1]) if len(sys.argv) > 1 else 200
# All the names that there are, and the idle time that they come to.
NAMES = [("db-{}", 61), ("web-{}", 62), ("other-{}", 60)]
CONFIG = "[default]\n" + "".join(
    f"[[policy]]\nname = '{kind}'\ncontainer = '{kind}-*'\nidle = '{idle}s'\n" for kind, idle in (("db", 61), ("web", 62))
)

if "KEEPALIVE_PODMAN" not in os.environ:
    os.environ["KEEPALIVE_PODMAN"] = "1"
    os.execvp("unshare", ["unshare", "--mount", sys.executable, __file__, str(COUNT)])


def run(*words, check=True):
    done = subprocess.run(words, check=False, capture_output=True, text=True)
    if check and done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}: {done.stderr}")
    return done.stdout


def podman(*words):
    return run("podman", "--runtime", "runc", "--cgroup-manager", "cgroupfs", "--events-backend", "none", *words)


def entries(pid):
    """How many entries the agent's maps have, of those that grow."""
    found = {}
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        ids = [line.split()[1] for line in info.read_text().splitlines() if line.startswith("map_id:")]
        for shown in (json.loads(run("bpftool", "--json", "map", "show", "id", number)) for number in ids):
            if shown["type"] == "hash":
                dumped = json.loads(run("bpftool", "--json", "map", "dump", "id", str(shown["id"])))
                found[shown["name"]] = len(dumped)
    return found


def state(pid):
    with open(f"/proc/{pid}/status") as status:
        own = next(line for line in status if line.startswith("RssAnon")).split()[1]
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    descriptors = len(os.listdir(f"/proc/{pid}/fd"))
    groups = sum(path.is_dir() for path in cgroup.rglob("*"))
    return {"own KiB": int(own), "descriptors": descriptors, "entries": entries(pid), "cgroups": groups, "cpu s": cpu}


def idles(name):
    """The idle times of a container's connections."""
    lines = run(RELEASE / "keepalive-agent", "sockets", "--json", "--container", name).splitlines()
    return {json.loads(line)["idle_s"] for line in lines}


run("mount", "--make-rprivate", "/")
for directory in ("/run", "/var/lib/containers"):
    os.makedirs(directory, exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", directory)
run("umount", "--recursive", "/sys/fs/cgroup")
run("mount", "-t", "cgroup2", "none", "/sys/fs/cgroup")
group = f"ka-podman-{os.getpid()}"
cgroup = Path("/sys/fs/cgroup", group)
cgroup.mkdir()
agent = None
try:
    with tempfile.TemporaryDirectory(dir="/run") as work:
        Path(work, "root").mkdir()
        program = f"{work}/root/first"
        run("cc", "-O1", "-static", "-o", program, HERE / "../../tests/programs/first.c")
        run("tar", "-cf", f"{work}/image.tar", "-C", f"{work}/root", ".")
        podman("import", "--quiet", f"{work}/image.tar", "first:1")
        Path(work, "keepalive.toml").write_text(CONFIG)
        log = open(f"{work}/log", "w")
        words = ["run", "--cgroup", f"/{group}", "--config", f"{work}/keepalive.toml", "--json"]
        agent = subprocess.Popen([RELEASE / "keepalive-agent", *words], stdout=log, stderr=log)
        while '"swept"' not in Path(work, "log").read_text():
            if agent.poll() is not None:
                raise SystemExit(Path(work, "log").read_text())
            time.sleep(0.1)
        options = ["--rm", "--network=host", "--pids-limit", "0", "--ulimit", "nofile=1000:1000", "--ulimit", "nproc=1000:1000", "--cgroup-parent", f"/{group}"]
        wrong, before, begun = [], None, time.time()
        for number in range(COUNT):
            name, idle = NAMES[number % len(NAMES)]
            name = name.format(number)
            lines = podman("run", *options, "--name", name, "first:1", "/first").splitlines()
            if lines != [f"1 {idle} 10 6"] * 2:
                wrong.append((name, lines))
            if number == len(NAMES):
                # What the first ones cost once is not what a container costs.
                before = state(agent.pid)
        took = time.time() - begun
        time.sleep(2)
        after = state(agent.pid)
        print(f"{COUNT} containers of podman in {took:.0f} s, {len(wrong)} wrong")
        for entry in wrong[:10]:
            print(" ", *entry)
        print("agent after the first:", json.dumps(before))
        print("agent at the end:     ", json.dumps(after))
        each = (after["cpu s"] - before["cpu s"]) / (COUNT - len(NAMES)) * 1000
        print(f"{each:.2f} ms of the agent's CPU time for each")

        # One that is called something else while it runs.
        podman("run", "--detach", *options, "--name", "db-runs", "first:1", "/first", "60")
        for name, idle in ("db-runs", 61), ("web-runs", 62), ("other-runs", 60), ("db-runs", 61):
            if name != "db-runs" or idles("db-runs") != {idle}:
                podman("rename", renamed, name)
            renamed = name
            until = time.time() + 10
            while idles(name) != {idle} and time.time() < until:
                time.sleep(0.05)
            if idles(name) != {idle}:
                wrong.append((name, idles(name)))
                print("renamed:", *wrong[-1])
        podman("rm", "--force", "--time", "0", renamed)
        counts = ("descriptors", "entries", "cgroups")
        ended = 1 if wrong or any(before[count] != after[count] for count in counts) else 0
finally:
    if agent:
        agent.terminate()
        agent.wait()
    for path in sorted(cgroup.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
    cgroup.rmdir()
sys.exit(ended)
