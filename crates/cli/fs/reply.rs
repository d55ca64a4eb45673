//! What guestfish prints, taken apart.

use std::collections::BTreeMap;

/// The fields of one structure, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Record(BTreeMap<String, Vec<u8>>);

impl Record {
    /// A structure or hash as guestfish prints it alone: a line `name: value` for each field.
    pub(crate) fn single(output: &[u8]) -> Self {
        let mut record = Self::default();
        for line in lines(output) {
            if let Some((name, value)) = field(line) {
                record.0.insert(name.to_owned(), value.to_vec());
            }
        }
        record
    }

    /// A list of structures: `[N] = {`, fields that are indented by two spaces, `}`. A value may go on over further
    /// lines (descriptions of packages do).
    pub(crate) fn list(output: &[u8]) -> Vec<Self> {
        let mut records: Vec<Self> = Vec::new();
        let mut last = None;
        for line in lines(output) {
            let Some(record) = records.last_mut().filter(|_| !opens(line)) else {
                if opens(line) {
                    records.push(Self::default());
                    last = None;
                }
                continue;
            };
            if let Some((name, value)) = line.strip_prefix(b"  ").and_then(field) {
                record.0.insert(name.to_owned(), value.to_vec());
                last = Some(name.to_owned());
            } else if line != b"}"
                && let Some(value) = last.as_ref().and_then(|last| record.0.get_mut(last))
            {
                value.push(b'\n');
                value.extend_from_slice(line);
            }
        }
        records
    }

    pub(crate) fn bytes(&self, name: &str) -> &[u8] {
        self.0.get(name).map(Vec::as_slice).unwrap_or_default()
    }

    /// The field as text; empty where it is missing.
    pub(crate) fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(self.bytes(name)).into_owned()
    }

    /// The field as a number; `None` where it is missing or none.
    pub(crate) fn number<N: std::str::FromStr>(&self, name: &str) -> Option<N> {
        std::str::from_utf8(self.bytes(name)).ok()?.parse().ok()
    }
}

/// The lines of an output, without their ends.
pub(crate) fn lines(output: &[u8]) -> impl Iterator<Item = &[u8]> {
    let output = output.strip_suffix(b"\n").unwrap_or(output);
    output.split(|&byte| byte == b'\n').filter(move |_| !output.is_empty())
}

/// The lines of an output as text.
pub(crate) fn texts(output: &[u8]) -> Vec<String> {
    lines(output).map(|line| String::from_utf8_lossy(line).into_owned()).collect()
}

/// The lines `key: value` of an output, in their order. Neither mount points nor device names are quoted; the first `: `
/// ends the key.
pub(crate) fn pairs(output: &[u8]) -> Vec<(String, String)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let pair = |line| {
        let at = find(line, b": ")?;
        Some((text(line.get(..at)?), text(line.get(at.checked_add(2)?..)?)))
    };
    lines(output).filter_map(pair).collect()
}

/// Strings that end with NUL each.
pub(crate) fn null_ended(output: &[u8]) -> impl Iterator<Item = &[u8]> {
    output.split(|&byte| byte == 0).filter(|name| !name.is_empty())
}

fn opens(line: &[u8]) -> bool {
    line.strip_prefix(b"[")
        .and_then(|rest| rest.strip_suffix(b"] = {"))
        .is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

/// `name: value`, where the value may be empty.
fn field(line: &[u8]) -> Option<(&str, &[u8])> {
    let colon = line.iter().position(|&byte| byte == b':')?;
    let (name, value) = (line.get(..colon)?, line.get(colon.checked_add(1)?..)?);
    let is_name = !name.is_empty() && name.iter().all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
    let value = if value.is_empty() { value } else { value.strip_prefix(b" ")? };
    Some((std::str::from_utf8(name).ok().filter(|_| is_name)?, value))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_are_taken_apart() {
        let single = Record::single(b"st_mode: 33188\nst_size: -1\nempty: \n");
        assert_eq!(single.number::<u32>("st_mode"), Some(0o100_644));
        assert_eq!((single.number::<u32>("st_size"), single.number::<i64>("st_size")), (None, Some(-1)));
        assert_eq!((single.bytes("empty"), single.bytes("missing")), (&b""[..], &b""[..]));

        let list = Record::list(
            b"[0] = {\n  name: a: b\n  text: one\n two\n\n  three\n  more: x\n}\n[1] = {\n  name: \xff\n}\n",
        );
        assert_eq!(list.len(), 2);
        assert_eq!(
            (list[0].text("name"), list[0].text("text")),
            ("a: b".into(), "one\n two\n\n  three".into())
        );
        assert_eq!((list[0].text("more"), list[1].bytes("name")), ("x".into(), &b"\xff"[..]));
        assert!(Record::list(b"").is_empty() && Record::list(b"nonsense\n}\n").is_empty());
    }

    #[test]
    fn lines_and_pairs() {
        assert_eq!(lines(b"").count(), 0);
        assert_eq!(lines(b"a\n\nb\n").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
        let got = pairs(b"/dev/sda1: ext4\nbtrfsvol:/dev/sda2/a: b: btrfs\n/: /dev/sda1\n");
        let got: Vec<_> = got.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(got, [("/dev/sda1", "ext4"), ("btrfsvol:/dev/sda2/a", "b: btrfs"), ("/", "/dev/sda1")]);
        assert_eq!(null_ended(b"a\0\0b\n\0").collect::<Vec<_>>(), [&b"a"[..], b"b\n"]);
    }
}
