//! The grammar of one line of a descriptor.

use nom::branch::alt;
use nom::bytes::complete::{tag, take_till, take_till1, take_while, take_while1};
use nom::combinator::{map_opt, opt, rest, verify};
use nom::sequence::{delimited, preceded, terminated};
use nom::{IResult, Parser};

/// One line without its line end.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// Blank, or a comment from the `#` on.
    Nothing,
    Extent(ExtentLine<'a>),
    /// The line begins as an extent does and does not go on as one.
    BadExtent,
    Entry(EntryLine<'a>),
    /// Neither.
    Junk,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExtentLine<'a> {
    pub(super) access: &'a [u8],
    pub(super) sectors: u64,
    pub(super) kind: &'a [u8],
    pub(super) file: Option<&'a [u8]>,
    pub(super) offset: Option<u64>,
    pub(super) rest: &'a [u8],
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct EntryLine<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    pub(super) quoted: bool,
    /// The quotes do not match, or text follows the closing one.
    pub(super) odd: bool,
}

fn is_blank(byte: u8) -> bool {
    byte.is_ascii_whitespace()
}

fn blank0(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_while(is_blank).parse(input)
}

fn blank1(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_while1(is_blank).parse(input)
}

fn word(input: &[u8]) -> IResult<&[u8], &[u8]> {
    take_till1(is_blank).parse(input)
}

fn number(input: &[u8]) -> IResult<&[u8], u64> {
    map_opt(word, |digits: &[u8]| {
        let plain = digits.iter().all(u8::is_ascii_digit);
        plain.then(|| std::str::from_utf8(digits).ok()?.parse().ok()).flatten()
    })
    .parse(input)
}

fn quoted(input: &[u8]) -> IResult<&[u8], &[u8]> {
    delimited(tag("\""), take_till(|byte| byte == b'"'), tag("\"")).parse(input)
}

/// A file name: quoted as every known writer has it, or one word.
fn file(input: &[u8]) -> IResult<&[u8], &[u8]> {
    alt((quoted, verify(word, |name: &[u8]| !name.starts_with(b"\"")))).parse(input)
}

/// `ACCESS SECTORS TYPE ["FILE" [OFFSET] [device fields]]`
fn extent(input: &[u8]) -> IResult<&[u8], ExtentLine<'_>> {
    let (input, access) = terminated(word, blank1).parse(input)?;
    let (input, sectors) = terminated(number, blank1).parse(input)?;
    let (input, kind) = word(input)?;
    let (input, _) = blank0(input)?;
    if input.is_empty() {
        return Ok((input, ExtentLine { access, sectors, kind, file: None, offset: None, rest: b"" }));
    }
    let (input, file) = file(input)?;
    // QEMU's scanf asks for no blank after the closing quote; to miss an offset would be to read the wrong data.
    let (input, offset) = opt(preceded(blank0, number)).parse(input)?;
    let (input, rest) = preceded(blank0, rest).parse(input)?;
    Ok((input, ExtentLine { access, sectors, kind, file: Some(file), offset, rest: rest.trim_ascii_end() }))
}

/// `KEY = VALUE`, the value perhaps quoted.
fn entry(input: &[u8]) -> IResult<&[u8], EntryLine<'_>> {
    let (value, key) = terminated(take_till1(|byte| byte == b'='), tag("=")).parse(input)?;
    let (key, value) = (key.trim_ascii(), value.trim_ascii());
    let line = match value.strip_prefix(b"\"") {
        None => EntryLine { key, value, quoted: false, odd: value.contains(&b'"') },
        Some(open) => match open.iter().rposition(|&byte| byte == b'"') {
            // A quote within the quotes belongs to the value: no writer escapes it.
            Some(close) => {
                let (value, after) = open.split_at(close);
                EntryLine { key, value, quoted: true, odd: after.len() > 1 || value.contains(&b'"') }
            }
            None => EntryLine { key, value: open, quoted: true, odd: true },
        },
    };
    Ok((b"", line))
}

pub(super) fn parse(line: &[u8]) -> Line<'_> {
    let line = line.trim_ascii();
    if line.is_empty() || line.starts_with(b"#") {
        return Line::Nothing;
    }
    let first = line.split(|&byte| is_blank(byte) || byte == b'=').next().unwrap_or_default();
    let access = |name: &&[u8]| first.eq_ignore_ascii_case(name);
    if [b"RW".as_slice(), b"RDONLY", b"NOACCESS"].iter().any(access) {
        return extent(line).map_or(Line::BadExtent, |(_, extent)| Line::Extent(extent));
    }
    match entry(line) {
        Ok((_, entry)) if !entry.key.is_empty() => Line::Entry(entry),
        _ => Line::Junk,
    }
}

/// The lines of a text (LF, CRLF or CR), each with its byte offset. The text ends at the first NUL.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let end = text.iter().position(|&byte| byte == 0).unwrap_or(text.len());
    let text = text.get(..end).unwrap_or_default();
    let mut offset = 0;
    text.split(|&byte| byte == b'\n' || byte == b'\r').map(move |line| {
        let start = offset;
        offset += line.len() + 1;
        (start, line)
    })
}
