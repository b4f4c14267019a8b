//! What verifiers of older kernels ask for, and the one of this kernel does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use keepalive_tests::{Agent, Cgroup, Need, Place, output, require};

const POLICY: &str = "[default]\nidle = { default = \"60s\", at-most = \"90s\" }\n";

/// A function of a program as the kernel has it: how much of the stack it takes,
/// and which ones it calls.
#[derive(Debug, Default)]
struct Function {
    stack: u32,
    calls: Vec<String>,
}

/// The functions of a dump of bpftool, by name; the first is where it begins.
fn functions(dump: &str) -> Result<(String, BTreeMap<String, Function>)> {
    let mut found: BTreeMap<String, Function> = BTreeMap::new();
    let mut first = None;
    let mut current = String::new();
    let mut pointers = BTreeSet::new();
    for line in dump.lines() {
        if !line.starts_with([' ', ';']) {
            let before = line.split('(').next().unwrap_or(line);
            let name = before.rsplit([' ', '*']).next().unwrap_or(before);
            name.clone_into(&mut current);
            first.get_or_insert_with(|| current.clone());
        }
        let function = found.entry(current.clone()).or_default();
        let (_, instruction) = line.split_once(") ").unwrap_or_default();
        if let Some(offset) = number_after(instruction, "(r10 -") {
            function.stack = function.stack.max(offset);
        }
        // A pointer to it takes two steps.
        if let Some((register, value)) = instruction.split_once(" = ") {
            pointers.remove(register);
            if value == "r10" {
                pointers.insert(register.to_owned());
            }
        } else if let Some((register, _)) = instruction.split_once(" += -")
            && pointers.contains(register)
        {
            let offset = number_after(instruction, " += -").context("no number")?;
            function.stack = function.stack.max(offset);
        }
        if line.contains("call pc") {
            let (_, name) = line.split_once("#bpf_prog_").context("a call of nothing")?;
            let (_, name) = name.split_once('_').context("a call without a name")?;
            function.calls.push(name.to_owned());
        }
    }
    Ok((first.context("no function")?, found))
}

/// As in `*(u64 *)(r10 -24) = r0`.
fn number_after(instruction: &str, sign: &str) -> Option<u32> {
    let (_, digits) = instruction.split_once(sign)?;
    let end = digits.find(|c: char| !c.is_ascii_digit());
    digits.get(..end.unwrap_or(digits.len()))?.parse().ok()
}

/// What the deepest way down takes, as kernels before 6.8 count it: each function a
/// multiple of 32 bytes, and 32 at the least (`check_max_stack_depth()`).
fn depth(functions: &BTreeMap<String, Function>, name: &str) -> Result<u32> {
    // The kernel's names may be cut off.
    let mut fits = functions
        .iter()
        .filter(|(known, _)| known.starts_with(name));
    let (_, function) = fits.next().with_context(|| format!("no function {name}"))?;
    let mut below = 0;
    for call in &function.calls {
        below = below.max(depth(functions, call)?);
    }
    Ok(function.stack.max(1).next_multiple_of(32) + below)
}

#[test]
fn the_stack_is_enough_on_kernels_before_6_8() -> Result<()> {
    require!(Need::Program("bpftool"));
    let cgroup = Cgroup::new()?;
    let agent = Agent::start(&cgroup, POLICY)?;
    let mut ids = BTreeSet::new();
    for descriptor in fs::read_dir(format!("/proc/{}/fdinfo", agent.id()))? {
        let shown = fs::read_to_string(descriptor?.path()).unwrap_or_default();
        let id = shown.lines().find_map(|line| line.strip_prefix("prog_id:"));
        ids.extend(id.map(|id| id.trim().to_owned()));
    }
    let mut seen = BTreeMap::new();
    for id in ids {
        let mut dump = Place::default().command("bpftool");
        dump.args(["prog", "dump", "xlated", "id", &id]);
        let dump = output(&mut dump, Duration::from_secs(30))?;
        let (first, functions) = functions(&dump.stdout)?;
        let depth = depth(&functions, &first)?;
        ensure!(depth <= 512, "{first}: {depth} bytes: {functions:#?}");
        seen.insert(first, depth);
    }
    // Whether it is read at all: a program of one function takes less. That of the
    // sweep is there for too short a time; it is loaded on these kernels by
    // `cargo xtask test --vm`.
    for name in ["established", "bounded"] {
        ensure!(seen.get(name).is_some_and(|depth| *depth > 100), "{seen:?}");
    }
    agent.stop()?;
    Ok(())
}
