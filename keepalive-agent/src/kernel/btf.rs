//! A reader of BTF, the type information that the kernel has of itself, for
//! what the agent asks: where a member stands, what an enumerator is, by which
//! number a type goes. The bytes are never trusted: whatever they are, the
//! answer is a type, nothing, or an error.
//!
//! Format: Documentation/bpf/btf.rst in the kernel's source.

use thiserror::Error;

/// As many types in a chain, or anonymous structures in one another, as are
/// followed: more than any kernel has, so that a cycle ends.
const MAX_DEPTH: u32 = 32;

/// Bytes of a type before what its kind adds.
const RECORD: usize = 12;

/// Why bytes are no usable BTF.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BtfError {
    /// Something else, or of a machine with the other byte order.
    #[error("they do not begin like BTF of this machine")]
    NotBtf,
    /// A section or a type ends beyond the end.
    #[error("they end too early")]
    Truncated,
    /// A type whose length is not known, so that nothing after it can be found.
    #[error("type {number} is of kind {kind}, which this program does not know")]
    UnknownKind {
        /// The type's number.
        number: u32,
        /// Its kind.
        kind: u8,
    },
    /// Types that refer to one another in a circle.
    #[error("type {0} contains itself")]
    Cycle(u32),
}

/// What a type is (`BTF_KIND_*` in include/uapi/linux/btf.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A structure.
    Struct,
    /// A typedef.
    Typedef,
    /// A function.
    Function,
    /// An enumeration of 32-bit values.
    Enum,
}

mod kind {
    pub(super) const INT: u8 = 1;
    pub(super) const PTR: u8 = 2;
    pub(super) const ARRAY: u8 = 3;
    pub(super) const STRUCT: u8 = 4;
    pub(super) const UNION: u8 = 5;
    pub(super) const ENUM: u8 = 6;
    pub(super) const FWD: u8 = 7;
    pub(super) const TYPEDEF: u8 = 8;
    pub(super) const VOLATILE: u8 = 9;
    pub(super) const CONST: u8 = 10;
    pub(super) const RESTRICT: u8 = 11;
    pub(super) const FUNC: u8 = 12;
    pub(super) const FUNC_PROTO: u8 = 13;
    pub(super) const VAR: u8 = 14;
    pub(super) const DATASEC: u8 = 15;
    pub(super) const FLOAT: u8 = 16;
    pub(super) const DECL_TAG: u8 = 17;
    pub(super) const TYPE_TAG: u8 = 18;
    pub(super) const ENUM64: u8 = 19;
}

impl Kind {
    const ALL: [Self; 4] = [Self::Struct, Self::Typedef, Self::Function, Self::Enum];

    const fn number(self) -> u8 {
        match self {
            Self::Struct => kind::STRUCT,
            Self::Typedef => kind::TYPEDEF,
            Self::Function => kind::FUNC,
            Self::Enum => kind::ENUM,
        }
    }
}

/// Types by number and by name.
#[derive(Debug)]
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Number less 1 → where the type stands; number 0 is `void`.
    offsets: Vec<u32>,
    /// The numbers of the types of each of [`Kind::ALL`].
    of_kind: [Vec<u32>; Kind::ALL.len()],
}

/// A type's record.
#[derive(Clone, Copy, Debug)]
struct Record<'a> {
    name: u32,
    kind: u8,
    /// Members carry the width of a bit field in the upper 8 bits of their
    /// offset.
    has_bit_fields: bool,
    /// Its size in bytes, or the type it is about.
    size_or_type: u32,
    /// What the kind adds.
    more: &'a [u8],
}

/// A member of a structure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// From the begin of the structure, in bits.
    pub bit_offset: u32,
    /// Whether it is a bit field, which no load can read by itself.
    pub is_bit_field: bool,
    /// Number of its type.
    type_number: u32,
}

/// What a member holds, behind typedefs and qualifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Number of the type.
    pub number: u32,
    /// In bytes; 0 for what has no size of its own, such as an array.
    pub size: u32,
    /// Whether it has members.
    pub has_members: bool,
}

fn word(bytes: &[u8], at: usize) -> Result<u32, BtfError> {
    let word = at
        .checked_add(4)
        .and_then(|end| bytes.get(at..end))
        .and_then(|word| word.try_into().ok())
        .ok_or(BtfError::Truncated)?;
    Ok(u32::from_ne_bytes(word))
}

/// Numbers of types and offsets have 32 bits, this machine at least as many.
const fn index(number: u32) -> usize {
    number as usize
}

impl<'a> Btf<'a> {
    /// Goes through all types once.
    ///
    /// # Errors
    ///
    /// When the bytes are no BTF, or not all of it, or have types of a kind that
    /// is not known here.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, BtfError> {
        const MAGIC_AND_VERSION: [u8; 3] = {
            let [low, high] = 0xeb9f_u16.to_ne_bytes();
            [low, high, 1]
        };
        if !bytes.starts_with(&MAGIC_AND_VERSION) {
            return Err(BtfError::NotBtf);
        }
        let header = index(word(bytes, 4)?);
        let section = |at: usize| -> Result<&'a [u8], BtfError> {
            let start = header.saturating_add(index(word(bytes, at)?));
            let end = start.saturating_add(index(word(bytes, at + 4)?));
            bytes.get(start..end).ok_or(BtfError::Truncated)
        };
        let mut btf = Self {
            types: section(8)?,
            strings: section(16)?,
            offsets: Vec::with_capacity(bytes.len() / 40),
            of_kind: Default::default(),
        };
        let mut at = 0;
        while at < btf.types.len() {
            let number = u32::try_from(btf.offsets.len() + 1).map_err(|_| BtfError::Truncated)?;
            btf.offsets
                .push(u32::try_from(at).map_err(|_| BtfError::Truncated)?);
            let record = btf.record_at(at, number)?;
            for (kind, numbers) in Kind::ALL.iter().zip(&mut btf.of_kind) {
                if kind.number() == record.kind {
                    numbers.push(number);
                }
            }
            at += RECORD + record.more.len();
        }
        Ok(btf)
    }

    fn record_at(&self, at: usize, number: u32) -> Result<Record<'a>, BtfError> {
        let info = word(self.types, at + 4)?;
        let [low, high, _, upper] = info.to_le_bytes();
        let count = usize::from(u16::from_le_bytes([low, high]));
        let kind = upper & 0x1f;
        let length = match kind {
            kind::PTR
            | kind::FWD
            | kind::TYPEDEF
            | kind::VOLATILE
            | kind::CONST
            | kind::RESTRICT
            | kind::FUNC
            | kind::FLOAT
            | kind::TYPE_TAG => 0,
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => 12 * count,
            kind::ENUM | kind::FUNC_PROTO => 8 * count,
            kind => return Err(BtfError::UnknownKind { number, kind }),
        };
        let begin = at + RECORD;
        Ok(Record {
            name: word(self.types, at)?,
            kind,
            has_bit_fields: upper & 0x80 != 0,
            size_or_type: word(self.types, at + 8)?,
            more: self
                .types
                .get(begin..begin + length)
                .ok_or(BtfError::Truncated)?,
        })
    }

    /// The type of that number; none for `void` and for numbers of no type.
    fn record(&self, number: u32) -> Result<Option<Record<'a>>, BtfError> {
        let at = number
            .checked_sub(1)
            .and_then(|before| self.offsets.get(index(before)));
        at.map(|at| self.record_at(index(*at), number)).transpose()
    }

    /// Whether that name is this one. Names end with a NUL.
    fn is_named(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(index(offset)..)
            .and_then(|string| string.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }

    /// The number of the first type of that kind and name.
    ///
    /// # Errors
    ///
    /// When the types cannot be read.
    pub fn find(&self, kind: Kind, name: &str) -> Result<Option<u32>, BtfError> {
        let of_kind = Kind::ALL.iter().zip(&self.of_kind);
        for (_, numbers) in of_kind.filter(|(found, _)| **found == kind) {
            for number in numbers {
                if let Some(record) = self.record(*number)?
                    && self.is_named(record.name, name)
                {
                    return Ok(Some(*number));
                }
            }
        }
        Ok(None)
    }

    /// A member of a structure or union. Those of anonymous structures and
    /// unions inside count as members of what contains them, as in C.
    ///
    /// # Errors
    ///
    /// When the types cannot be read.
    pub fn member(&self, within: u32, name: &str) -> Result<Option<Member>, BtfError> {
        self.member_below(within, name, MAX_DEPTH)
    }

    fn member_below(
        &self,
        within: u32,
        name: &str,
        depth: u32,
    ) -> Result<Option<Member>, BtfError> {
        let depth = depth.checked_sub(1).ok_or(BtfError::Cycle(within))?;
        let Some(record) = self.record(within)? else {
            return Ok(None);
        };
        if !matches!(record.kind, kind::STRUCT | kind::UNION) {
            return Ok(None);
        }
        for member in record.more.chunks_exact(12) {
            let found = word(member, 0)?;
            let type_number = word(member, 4)?;
            let offset = word(member, 8)?;
            let (bit_offset, width) = if record.has_bit_fields {
                (offset & 0x00ff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            if self.is_named(found, name) {
                return Ok(Some(Member {
                    bit_offset,
                    is_bit_field: width != 0 || bit_offset % 8 != 0,
                    type_number,
                }));
            }
            if self.is_named(found, "")
                && let Some(inner) = self.content_of(type_number)?
                && let Some(member) = self.member_below(inner.number, name, depth)?
            {
                return Ok(Some(Member {
                    bit_offset: bit_offset.saturating_add(member.bit_offset),
                    ..member
                }));
            }
        }
        Ok(None)
    }

    /// What a member holds; none where its type is `void` or missing.
    ///
    /// # Errors
    ///
    /// When the types cannot be read, or lead back to themselves.
    pub fn content(&self, member: &Member) -> Result<Option<Content>, BtfError> {
        self.content_of(member.type_number)
    }

    fn content_of(&self, type_number: u32) -> Result<Option<Content>, BtfError> {
        let mut number = type_number;
        for _ in 0..MAX_DEPTH {
            let Some(record) = self.record(number)? else {
                return Ok(None);
            };
            let size = match record.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    number = record.size_or_type;
                    continue;
                }
                kind::INT | kind::ENUM | kind::ENUM64 | kind::STRUCT | kind::UNION => {
                    record.size_or_type
                }
                // BPF runs on 64-bit kernels here.
                kind::PTR => 8,
                _ => 0,
            };
            return Ok(Some(Content {
                number,
                size,
                has_members: matches!(record.kind, kind::STRUCT | kind::UNION),
            }));
        }
        Err(BtfError::Cycle(type_number))
    }

    /// The value of an enumerator; none where that is no enumeration, or has
    /// none of that name.
    ///
    /// # Errors
    ///
    /// When the types cannot be read.
    pub fn enumerator(&self, within: u32, name: &str) -> Result<Option<u32>, BtfError> {
        let Some(record) = self.record(within)? else {
            return Ok(None);
        };
        if record.kind != kind::ENUM {
            return Ok(None);
        }
        for enumerator in record.more.chunks_exact(8) {
            if self.is_named(word(enumerator, 0)?, name) {
                return word(enumerator, 4).map(Some);
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STRINGS: &[u8] = b"\0outer\0inner\0port\0flag\0number\0states\0OPEN\0";

    fn name(wanted: &str) -> u32 {
        let wanted = [b"\0", wanted.as_bytes(), b"\0"].concat();
        let at = STRINGS
            .windows(wanted.len())
            .position(|window| window == wanted)
            .unwrap();
        u32::try_from(at + 1).unwrap()
    }

    fn info(kind: u8, count: u32) -> u32 {
        u32::from(kind) << 24 | count
    }

    /// BTF of these words and [`STRINGS`].
    fn btf(words: &[u32]) -> Vec<u8> {
        let length = u32::try_from(words.len() * 4).unwrap();
        let strings = u32::try_from(STRINGS.len()).unwrap();
        let header = [0x0001_eb9f, 24, 0, length, length, strings];
        let words = header.iter().chain(words);
        let mut bytes: Vec<u8> = words.flat_map(|word| word.to_ne_bytes()).collect();
        bytes.extend(STRINGS);
        bytes
    }

    /// 1: a number; 2: a typedef of it; 3: a union with the port; 4: a
    /// structure with the union, without a name, and a flag; 5: an enumeration.
    fn sample() -> Vec<u8> {
        btf(&[
            [name("number"), info(kind::INT, 0), 4, 32].as_slice(),
            &[name("number"), info(kind::TYPEDEF, 0), 1],
            &[0, info(kind::UNION, 1), 4, name("port"), 2, 0],
            &[name("outer"), info(kind::STRUCT, 2) | 1 << 31, 12],
            &[0, 3, 64, name("flag"), 1, 0x0100_0021],
            &[name("states"), info(kind::ENUM, 1), 4, name("OPEN"), 7],
        ]
        .concat())
    }

    #[test]
    fn members_are_found_behind_anonymous_unions_and_typedefs() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        let outer = btf.find(Kind::Struct, "outer").unwrap().unwrap();
        let port = btf.member(outer, "port").unwrap().unwrap();
        assert_eq!((port.bit_offset, port.is_bit_field), (64, false));
        let content = btf.content(&port).unwrap().unwrap();
        assert_eq!((content.size, content.has_members), (4, false));
        let flag = btf.member(outer, "flag").unwrap().unwrap();
        assert_eq!((flag.bit_offset, flag.is_bit_field), (33, true));
        assert_eq!(btf.member(outer, "por"), Ok(None));
        assert_eq!(btf.member(outer, "number"), Ok(None));
    }

    #[test]
    fn names_belong_to_a_kind() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.find(Kind::Typedef, "number"), Ok(Some(2)));
        assert_eq!(btf.find(Kind::Struct, "number"), Ok(None));
        assert_eq!(btf.find(Kind::Function, "outer"), Ok(None));
        let states = btf.find(Kind::Enum, "states").unwrap().unwrap();
        assert_eq!(btf.enumerator(states, "OPEN"), Ok(Some(7)));
        assert_eq!(btf.enumerator(states, "PEN"), Ok(None));
        assert_eq!(btf.enumerator(1, "OPEN"), Ok(None));
    }

    #[test]
    fn a_circle_of_types_is_an_error() {
        let bytes = btf(&[
            [name("number"), info(kind::TYPEDEF, 0), 2].as_slice(),
            &[name("number"), info(kind::CONST, 0), 1],
            &[name("outer"), info(kind::STRUCT, 2), 4],
            &[0, 3, 0, name("port"), 1, 0],
        ]
        .concat());
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.member(3, "flag"), Err(BtfError::Cycle(3)));
        let member = Member {
            bit_offset: 0,
            is_bit_field: false,
            type_number: 1,
        };
        assert_eq!(btf.content(&member), Err(BtfError::Cycle(1)));
    }

    #[test]
    fn half_a_file_is_an_error() {
        let whole = sample();
        for length in 0..whole.len() {
            let parsed = Btf::parse(&whole[..length]);
            let expected = if length < 3 {
                BtfError::NotBtf
            } else {
                BtfError::Truncated
            };
            assert_eq!(parsed.unwrap_err(), expected, "{length}");
        }
        let unknown = btf(&[0, info(31, 0), 0]);
        let expected = BtfError::UnknownKind {
            number: 1,
            kind: 31,
        };
        assert_eq!(Btf::parse(&unknown).unwrap_err(), expected);
    }

    /// Asks everything that can be asked.
    fn ask(bytes: &[u8]) {
        let Ok(btf) = Btf::parse(bytes) else { return };
        for kind in Kind::ALL {
            for name in ["outer", "states", "number", ""] {
                let _ = btf.find(kind, name);
            }
        }
        for number in 0..32 {
            for name in ["port", "flag", "OPEN", ""] {
                let _ = btf.enumerator(number, name);
                if let Ok(Some(member)) = btf.member(number, name) {
                    let _ = btf.content(&member);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            ask(&bytes);
        }

        #[test]
        fn any_words_behind_a_header_are_survived(
            words in proptest::collection::vec(
                prop_oneof![any::<u32>(), 0_u32..64, (1_u8..20, 0_u32..4).prop_map(|(k, c)| info(k, c))],
                0..64,
            ),
        ) {
            ask(&btf(&words));
        }

        #[test]
        fn any_changed_byte_is_survived(at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
            let mut bytes = sample();
            let at = at.index(bytes.len());
            bytes[at] = byte;
            ask(&bytes);
        }
    }
}
