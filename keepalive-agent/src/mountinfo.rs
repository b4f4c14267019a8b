//! What is mounted where: /proc/self/mountinfo (`proc_pid_mountinfo(5)`).
//!
//! Read as bytes: whoever may mount chooses the names.

use std::{ffi::OsString, os::unix::ffi::OsStringExt as _, path::PathBuf};

/// Where the kernel shows the mounts of this process.
pub const PATH: &str = "/proc/self/mountinfo";

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Which part of the file system it shows: the path of its root in there, or a
    /// name such as `net:[4026531840]`.
    pub root: Vec<u8>,
    /// Where it is. Something else may be mounted over it.
    pub point: PathBuf,
    /// Whether nothing can be written by way of it.
    pub is_read_only: bool,
    /// Type of the file system, such as `cgroup2`.
    pub kind: Vec<u8>,
}

/// The mounts, in the order in which the kernel shows them. Lines that are none are
/// passed over.
pub fn parse(mountinfo: &[u8]) -> impl Iterator<Item = Mount> {
    mountinfo.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        let root = fields.nth(3)?;
        let point = fields.next()?;
        let mut options = fields.next()?.split(|byte| *byte == b',');
        // Optional fields end with a lone dash; the type comes next.
        let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
        Some(Mount {
            root: unescape(root),
            point: PathBuf::from(OsString::from_vec(unescape(point))),
            is_read_only: options.any(|option| option == b"ro"),
            kind: unescape(kind),
        })
    })
}

/// Undoes the octal escapes of space, tab, newline, `#` and backslash
/// (`mangle()` in fs/proc_namespace.c).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if first == b'\\' => {
                let digit = |digit: u8| digit - b'0';
                Some((digit(*a) << 6 | digit(*b) << 3 | digit(*c), after))
            }
            _ => None,
        };
        let (byte, after) = escaped.unwrap_or((first, tail));
        out.push(byte);
        rest = after;
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_line_is_a_mount() {
        let line = b"34 25 0:31 /a\\134b /mnt/with\\040space\xff ro,nosuid shared:6 master:2 - cgroup2 none rw\n";
        let found: Vec<_> = parse(line).collect();
        assert_eq!(
            found,
            [Mount {
                root: b"/a\\b".to_vec(),
                point: PathBuf::from(OsString::from_vec(b"/mnt/with space\xff".to_vec())),
                is_read_only: true,
                kind: b"cgroup2".to_vec(),
            }]
        );
        assert_eq!(parse(b"nonsense\n\n1 2 3 4 5 6 - \n").count(), 1);
        assert_eq!(parse(b"1 2 3 4 5 6 7\n").count(), 0);
    }

    #[test]
    fn only_what_the_kernel_escapes_is_unescaped() {
        for (field, expected) in [
            (&b"\\040\\011\\012\\134\\043"[..], &b" \t\n\\#"[..]),
            (b"\\x2d", b"\\x2d"),
            (b"\\04", b"\\04"),
            (b"\\400", b"\\400"),
            (b"\\", b"\\"),
            (b"\\377", b"\xff"),
        ] {
            assert_eq!(unescape(field), expected);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(text in vec(any::<u8>(), 0..300)) {
            for mount in parse(&text) {
                prop_assert!(mount.point.as_os_str().len() <= text.len());
            }
        }

        #[test]
        fn any_mount_point_is_read(name in vec(any::<u8>(), 0..40)) {
            let escaped: Vec<u8> = name
                .iter()
                .flat_map(|byte| match byte {
                    b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
                    byte => vec![*byte],
                })
                .collect();
            let line = [b"1 2 0:3 / /", escaped.as_slice(), b" rw - tmpfs none rw\n"].concat();
            let found: Vec<_> = parse(&line).collect();
            prop_assert_eq!(found.len(), 1);
            let point = found[0].point.clone().into_os_string().into_vec();
            prop_assert_eq!(point, [b"/", name.as_slice()].concat());
        }
    }
}
