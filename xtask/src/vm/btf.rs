//! Cuts a kernel's types down to some structures and the members of interest,
//! small enough to be kept as a test's fixture (the format is described in
//! Documentation/bpf/btf.rst).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u16 = 0xeb9f;
const HEADER: usize = 24;

mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const FWD: u32 = 7;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const FLOAT: u32 = 16;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// A type's record: name, info, size or type, and what follows by its kind.
#[derive(Clone, Debug)]
struct Record(Vec<u32>);

impl Record {
    fn kind(&self) -> u32 {
        (self.0[1] >> 24) & 0x1f
    }

    /// Which words are offsets of names, beside the first.
    fn names(&self) -> impl Iterator<Item = usize> + use<> {
        let step = match self.kind() {
            kind::STRUCT | kind::UNION | kind::ENUM64 => 3,
            kind::ENUM => 2,
            _ => usize::MAX,
        };
        (3..self.0.len())
            .step_by(step)
            .filter(move |_| step < usize::MAX)
    }

    /// Leaves out the members whose names nobody wants. Those without a name
    /// stay: what is in them may be wanted.
    fn keep(&mut self, wanted: impl Fn(u32) -> Result<bool>) -> Result<()> {
        let step = match self.kind() {
            kind::STRUCT | kind::UNION => 3,
            kind::ENUM => 2,
            _ => return Ok(()),
        };
        let members = self.0.split_off(3);
        let mut count = 0;
        for member in members.chunks_exact(step) {
            if wanted(member[0])? {
                self.0.extend_from_slice(member);
                count += 1;
            }
        }
        self.0[1] = self.0[1] & !0xffff | count;
        Ok(())
    }

    /// Which words are numbers of types that belong to this one by value.
    fn parts(&self) -> Vec<usize> {
        match self.kind() {
            kind::STRUCT | kind::UNION => (4..self.0.len()).step_by(3).collect(),
            kind::ARRAY => vec![3, 4],
            kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                vec![2]
            }
            _ => Vec::new(),
        }
    }
}

/// The types of a little-endian kernel.
struct Types<'a> {
    /// Number 0 is `void`, which has no record.
    records: Vec<Record>,
    strings: &'a [u8],
}

impl<'a> Types<'a> {
    fn read(bytes: &'a [u8]) -> Result<Self> {
        let word = |at: usize| -> Result<u32> {
            let word = bytes.get(at..at + 4).context("the types end too early")?;
            Ok(u32::from_le_bytes(word.try_into()?))
        };
        let size = |at: usize| Ok::<_, anyhow::Error>(usize::try_from(word(at)?)?);
        ensure!(
            word(0)? & 0xffff == u32::from(MAGIC),
            "not the types of a little-endian kernel"
        );
        let header = size(4)?;
        let (types, types_length) = (header + size(8)?, size(12)?);
        let (strings, strings_length) = (header + size(16)?, size(20)?);
        let strings = bytes
            .get(strings..strings + strings_length)
            .context("the types have no strings")?;
        let mut records = vec![Record(vec![0, 0, 0])];
        let mut at = types;
        while at < types + types_length {
            let info = word(at + 4)?;
            let count = usize::try_from(info & 0xffff)?;
            let more = match (info >> 24) & 0x1f {
                kind::PTR
                | kind::FWD
                | kind::TYPEDEF
                | kind::VOLATILE
                | kind::CONST
                | kind::RESTRICT
                | kind::FUNC
                | kind::FLOAT
                | kind::TYPE_TAG => 0,
                kind::INT | kind::VAR | kind::DECL_TAG => 1,
                kind::ARRAY => 3,
                kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 3 * count,
                kind::ENUM | kind::FUNC_PROTO => 2 * count,
                unknown => bail!("types of the unknown kind {unknown}"),
            };
            let words = (0..3 + more).map(|index| word(at + 4 * index));
            records.push(Record(words.collect::<Result<_>>()?));
            at += 4 * (3 + more);
        }
        Ok(Self { records, strings })
    }

    fn string(&self, offset: u32) -> Result<&'a [u8]> {
        let rest = self
            .strings
            .get(usize::try_from(offset)?..)
            .context("a name is outside of the strings")?;
        rest.split(|byte| *byte == 0)
            .next()
            .context("a name has no end")
    }

    /// The structure or enumeration of that name.
    fn named(&self, name: &str) -> Result<Option<u32>> {
        for (number, record) in self.records.iter().enumerate() {
            if matches!(record.kind(), kind::STRUCT | kind::ENUM)
                && self.string(record.0[0])? == name.as_bytes()
            {
                return Ok(Some(u32::try_from(number)?));
            }
        }
        Ok(None)
    }
}

/// Types on their way into a smaller file.
#[derive(Default)]
struct Cut<'a> {
    wanted: BTreeSet<&'a [u8]>,
    /// Number in the kernel → number here.
    numbers: BTreeMap<u32, u32>,
    records: Vec<Record>,
    strings: Vec<u8>,
    offsets: BTreeMap<Vec<u8>, u32>,
}

impl Cut<'_> {
    fn string(&mut self, string: &[u8]) -> Result<u32> {
        if string.is_empty() {
            return Ok(0);
        }
        if let Some(offset) = self.offsets.get(string) {
            return Ok(*offset);
        }
        let offset = u32::try_from(self.strings.len())?;
        self.strings.extend_from_slice(string);
        self.strings.push(0);
        self.offsets.insert(string.to_vec(), offset);
        Ok(offset)
    }

    /// Takes over a type and what it contains; its number here.
    fn take(&mut self, types: &Types, number: u32) -> Result<u32> {
        if number == 0 {
            return Ok(0);
        }
        if let Some(here) = self.numbers.get(&number) {
            return Ok(*here);
        }
        let record = types
            .records
            .get(usize::try_from(number)?)
            .context("a type is missing")?;
        let index = self.records.len();
        let here = u32::try_from(index + 1)?;
        self.records.push(record.clone());
        self.numbers.insert(number, here);
        let mut record = record.clone();
        record.keep(|name| {
            let name = types.string(name)?;
            Ok(name.is_empty() || self.wanted.contains(name))
        })?;
        record.0[0] = self.string(types.string(record.0[0])?)?;
        for name in record.names() {
            record.0[name] = self.string(types.string(record.0[name])?)?;
        }
        if record.kind() == kind::PTR {
            record.0[2] = 0;
        }
        for part in record.parts() {
            record.0[part] = self.take(types, record.0[part])?;
        }
        self.records[index] = record;
        Ok(here)
    }

    fn bytes(&self) -> Result<Vec<u8>> {
        let words = self.records.iter().flat_map(|record| &record.0);
        let types: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        let types_length = u32::try_from(types.len())?;
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_le_bytes());
        // Version 1, no flags.
        bytes.extend([1, 0]);
        for word in [
            u32::try_from(HEADER)?,
            0,
            types_length,
            types_length,
            u32::try_from(self.strings.len())?,
        ] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(types);
        bytes.extend(&self.strings);
        Ok(bytes)
    }
}

/// What `resolver`, a source file, looks for: the structures and enumerations
/// that it names in quotes, with those of their members, and of the members'
/// members, that it mentions anywhere.
pub(super) fn cut(kernel: &[u8], resolver: &str) -> Result<Vec<u8>> {
    let types = Types::read(kernel)?;
    let mut cut = Cut {
        wanted: resolver
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .map(str::as_bytes)
            .collect(),
        // The empty name.
        strings: vec![0],
        ..Cut::default()
    };
    for quoted in resolver.split('"').filter(|quoted| !quoted.is_empty()) {
        if let Some(number) = types.named(quoted)? {
            cut.take(&types, number)?;
        }
    }
    ensure!(
        !cut.records.is_empty(),
        "the kernel has no type that is looked for"
    );
    cut.bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The types of a kernel as a 32-bit word per element, with these strings.
    fn kernel(words: &[u32], strings: &str) -> Vec<u8> {
        let length = u32::try_from(words.len() * 4).unwrap();
        let strings_length = u32::try_from(strings.len()).unwrap();
        let header = [0x0001_eb9f, 24, 0, length, length, strings_length];
        let words = header.iter().chain(words);
        let mut bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(strings.bytes());
        bytes
    }

    #[test]
    fn only_wanted_members_and_their_types_stay() {
        let strings = "\0tcp_sock\0port\0other\0int\0";
        let (tcp_sock, port, other, int) = (1, 10, 15, 21);
        let full = kernel(
            &[
                // 1: int other; 2: a structure of two; 3: int.
                [int, kind::INT << 24, 4, 32].as_slice(),
                &[tcp_sock, kind::STRUCT << 24 | 2, 8],
                &[other, 1, 0, port, 3, 32],
                &[int, kind::INT << 24, 4, 32],
            ]
            .concat(),
            strings,
        );
        let small = cut(&full, r#"named("tcp_sock").number("a.port")"#).unwrap();
        let expected = kernel(
            &[
                [1, kind::STRUCT << 24 | 1, 8].as_slice(),
                &[10, 2, 32],
                &[15, kind::INT << 24, 4, 32],
            ]
            .concat(),
            "\0tcp_sock\0port\0int\0",
        );
        assert_eq!(small, expected);
        assert_eq!(cut(&small, r#""tcp_sock" port"#).unwrap(), small);
    }

    #[test]
    fn half_a_file_is_an_error() {
        let full = kernel(&[1, kind::STRUCT << 24, 4], "\0sock\0");
        let cut = |types: &[u8]| super::cut(types, "\"sock\"");
        assert!(cut(&full).is_ok());
        for length in [0, 10, 30, full.len() - 1] {
            assert!(cut(&full[..length]).is_err(), "{length}");
        }
        let unknown = kernel(&[1, 31 << 24, 4], "\0sock\0");
        let error = cut(&unknown).unwrap_err();
        assert!(error.to_string().contains("unknown kind 31"), "{error}");
    }
}
