//! Names out of a guest: any bytes but NUL and `/`, and nothing that a terminal or a parser may trust.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;

use serde_json::{Map, Value};

/// `name` for people: control characters, what turns the writing direction, and bytes that are no UTF-8 are escaped as
/// by `ls -b` (`\n`, `\033`, `\377`), and so is the backslash.
pub(crate) fn shown(name: &[u8]) -> String {
    let mut out = String::with_capacity(name.len());
    for chunk in name.utf8_chunks() {
        for char in chunk.valid().chars() {
            match char {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                _ if drives_terminal(char) => {
                    char.encode_utf8(&mut [0; 4]).bytes().for_each(|byte| put_octal(&mut out, byte));
                }
                _ => out.push(char),
            }
        }
        chunk.invalid().iter().for_each(|&byte| put_octal(&mut out, byte));
    }
    out
}

/// Control characters, and the marks and overrides of bidirectional text (UAX #9), which make a name look like another.
fn drives_terminal(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

fn put_octal(out: &mut String, byte: u8) {
    out.push_str(&format!("\\{byte:03o}"));
}

/// Puts `name` into a JSON object under `key`: as text, and where it is no UTF-8 also as `KEY-hex`, two lower-case hex
/// digits a byte, with U+FFFD in the text for what could not be kept.
pub(crate) fn put(object: &mut Map<String, Value>, key: &str, name: &[u8]) {
    let text = String::from_utf8_lossy(name);
    let lossy = matches!(text, std::borrow::Cow::Owned(_));
    object.insert(key.to_owned(), text.into());
    if lossy {
        let hex: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        object.insert(format!("{key}-hex"), hex.into());
    }
}

/// The guest's path that was typed as `typed`: absolute, as every path inside an image, and without empty or `.` parts.
/// `..` stays: the guest's file system resolves it.
pub(crate) fn guest_path(typed: &OsStr) -> Vec<u8> {
    let mut path = Vec::new();
    for part in parts(typed.as_bytes()) {
        path.push(b'/');
        path.extend_from_slice(part);
    }
    if path.is_empty() {
        path.push(b'/');
    }
    path
}

/// The parts of a path, without empty ones and `.`.
pub(crate) fn parts(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// `dir` and `name` as one path.
pub(crate) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    let mut path = dir.to_vec();
    if !path.ends_with(b"/") {
        path.push(b'/');
    }
    path.extend_from_slice(name);
    path
}

/// The last part of a path; empty for `/`.
pub(crate) fn base(path: &[u8]) -> &[u8] {
    parts(path).next_back().unwrap_or_default()
}

/// The folder that a path as [`guest_path`] makes them is in; of `/`, itself.
pub(crate) fn parent(path: &[u8]) -> &[u8] {
    let slash = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
    path.get(..slash.max(1)).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_cannot_drive_the_terminal() {
        assert_eq!(shown("a b'\"ü\u{1f600}".as_bytes()), "a b'\"ü\u{1f600}");
        assert_eq!(shown(b"a\\\n\r\t\x1b[31m\x7f\xff"), "a\\\\\\n\\r\\t\\033[31m\\177\\377");
        assert_eq!(shown("\u{9b}x\u{202e}y".as_bytes()), "\\302\\233x\\342\\200\\256y");
    }

    #[test]
    fn json_keeps_every_byte() {
        let mut object = Map::new();
        put(&mut object, "name", "ü\n".as_bytes());
        put(&mut object, "to", b"a\xff");
        assert_eq!(Value::from(object), json!({"name": "ü\n", "to": "a\u{fffd}", "to-hex": "61ff"}));
    }

    #[test]
    fn paths_are_absolute_and_plain() {
        for (typed, want) in
            [("", "/"), ("/", "/"), ("etc//x/", "/etc/x"), ("/./a/../b", "/a/../b"), ("-x", "/-x")]
        {
            assert_eq!(guest_path(OsStr::new(typed)), want.as_bytes(), "{typed}");
        }
        assert_eq!((base(b"/a/b"), base(b"/")), (&b"b"[..], &b""[..]));
        assert_eq!((parent(b"/a/b"), parent(b"/a"), parent(b"/")), (&b"/a"[..], &b"/"[..], &b"/"[..]));
        assert_eq!((join(b"/", b"a"), join(b"/a", b"b")), (b"/a".to_vec(), b"/a/b".to_vec()));
    }
}
