//! Writing a descriptor.

use super::line::{self, Line, lines};
use super::{Access, Descriptor, Entry, Extent, ExtentKind, NO_PARENT};
use crate::FormatError;

impl Descriptor {
    /// The text of the descriptor, laid out as VMware's open-vmdk does: header, extents, disk data
    /// base; lines end with LF. What is `None` is left out, except `version` (1) and `parentCID`
    /// ([`NO_PARENT`]).
    ///
    /// # Errors
    /// `Unsupported` for a name or value that no descriptor can hold: with a double quote, a line
    /// end or a NUL in it, or an extent without a file that is not `ZERO`.
    pub fn write(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = Writer(b"# Disk DescriptorFile\n".to_vec());
        out.plain("version", &self.version.unwrap_or(1).to_string());
        if let Some(encoding) = &self.encoding {
            out.header("encoding", encoding)?;
        }
        if let Some(cid) = self.cid {
            out.plain("CID", &format!("{cid:08x}"));
        }
        out.plain("parentCID", &format!("{:08x}", self.parent_cid.unwrap_or(NO_PARENT)));
        if let Some(native) = self.native_snapshot {
            out.header("isNativeSnapshot", if native { b"yes" } else { b"no" })?;
        }
        if let Some(kind) = &self.create_type {
            out.header("createType", kind.as_bytes())?;
        }
        if let Some(hint) = &self.parent_hint {
            out.header("parentFileNameHint", hint)?;
        }
        let (tracking, other): (Vec<_>, Vec<_>) =
            self.other.iter().partition(|entry| entry.key.eq_ignore_ascii_case(b"changeTrackPath"));
        for entry in other {
            out.entry(entry, "=")?;
        }
        out.section("# Extent description\n");
        for extent in &self.extents {
            out.extent(extent)?;
        }
        if !tracking.is_empty() {
            out.section("# Change Tracking File\n");
        }
        for entry in tracking {
            out.entry(entry, "=")?;
        }
        out.section("# The Disk Data Base\n#DDB\n\n");
        for entry in &self.ddb {
            out.entry(&Entry { quoted: true, ..entry.clone() }, " = ")?;
        }
        Ok(out.0)
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn section(&mut self, heading: &str) {
        self.0.push(b'\n');
        self.0.extend_from_slice(heading.as_bytes());
    }

    fn plain(&mut self, key: &str, value: &str) {
        self.0.extend_from_slice(format!("{key}={value}\n").as_bytes());
    }

    fn header(&mut self, key: &str, value: &[u8]) -> Result<(), FormatError> {
        self.entry(&Entry::quoted(key, value), "=")
    }

    fn entry(&mut self, entry: &Entry, equals: &str) -> Result<(), FormatError> {
        storable(&entry.key)?;
        storable(&entry.value)?;
        let quote: &[u8] = if entry.quoted { b"\"" } else { b"" };
        for part in [&entry.key, equals.as_bytes(), quote, &entry.value, quote, b"\n"] {
            self.0.extend_from_slice(part);
        }
        Ok(())
    }

    fn extent(&mut self, extent: &Extent) -> Result<(), FormatError> {
        let access: &[u8] = match extent.access {
            Access::ReadWrite => b"RW",
            Access::ReadOnly => b"RDONLY",
            Access::NoAccess => b"NOACCESS",
        };
        self.0.extend_from_slice(access);
        self.0.extend_from_slice(format!(" {} ", extent.sectors).as_bytes());
        self.0.extend_from_slice(storable(extent.kind.as_bytes())?);
        match &extent.file {
            Some(file) => {
                for part in [b" \"", storable(file)?, b"\""] {
                    self.0.extend_from_slice(part);
                }
                if let Some(offset) = extent.offset {
                    self.0.extend_from_slice(format!(" {offset}").as_bytes());
                }
                if !extent.rest.is_empty() {
                    self.0.push(b' ');
                    self.0.extend_from_slice(one_line(&extent.rest)?);
                }
            }
            None if extent.kind == ExtentKind::Zero => {}
            None => {
                return Err(FormatError::unsupported(
                    "descriptor",
                    "an extent without a file that is not ZERO",
                ));
            }
        }
        self.0.push(b'\n');
        Ok(())
    }
}

fn one_line(value: &[u8]) -> Result<&[u8], FormatError> {
    if value.iter().any(|byte| b"\n\r\0".contains(byte)) {
        let shown = String::from_utf8_lossy(value).into_owned();
        return Err(FormatError::unsupported(
            "descriptor",
            format!("{shown:?} holds a line end or a NUL: rename it"),
        ));
    }
    Ok(value)
}

fn storable(value: &[u8]) -> Result<&[u8], FormatError> {
    if value.contains(&b'"') {
        let shown = String::from_utf8_lossy(value).into_owned();
        return Err(FormatError::unsupported(
            "descriptor",
            format!("{shown:?} holds a double quote: rename it"),
        ));
    }
    one_line(value)
}

/// The text with the value of the first entry `key` (in any case) replaced, everything else byte
/// by byte as it was; quotes stay as they are. `None` when there is no such entry, or `value` has
/// a quote, a line end or a NUL in it. An embedded text may grow: check that it still fits.
#[must_use]
pub fn replace_value(text: &[u8], key: &str, value: &[u8]) -> Option<Vec<u8>> {
    storable(value).ok()?;
    let bom = if text.starts_with(b"\xef\xbb\xbf") { 3 } else { 0 };
    let (offset, line, old) = lines(text.get(bom..)?).find_map(|(offset, text)| match line::parse(text) {
        Line::Entry(entry) if entry.key.eq_ignore_ascii_case(key.as_bytes()) => Some((offset, text, entry)),
        _ => None,
    })?;
    // The value is the last thing on the line except quotes and blanks.
    let mut tail = line.len() - line.trim_ascii_end().len();
    if old.quoted {
        let close = line.iter().rposition(|&byte| byte == b'"')?;
        let open = line.iter().position(|&byte| byte == b'"')?;
        // An open quote ends where the line does, but for blanks.
        tail = if close > open { line.len() - close } else { tail };
    }
    let end = bom.checked_add(offset)?.checked_add(line.len())?.checked_sub(tail)?;
    let start = end.checked_sub(old.value.len())?;
    // Whatever reads the line differently must not lead to a cut in the wrong place.
    (text.get(start..end)? == old.value).then_some(())?;
    Some([text.get(..start)?, value, text.get(end..)?].concat())
}
