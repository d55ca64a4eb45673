//! Tar: ustar and pax (POSIX.1-2001 `pax`) and GNU tar, as far as archives of plain files need.
//!
//! [`Scanner`] does no I/O: it says which bytes it wants next and takes them, so it serves files
//! and pipes alike.

use crate::{FormatError, HostOffset, Limits};

/// Bytes of a tar block; headers and contents begin at its multiples.
pub const BLOCK: usize = 512;
const BLOCK_U64: u64 = BLOCK as u64;
/// The end of an archive: two blocks of zeros.
pub const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
/// Sizes from here on do not fit the eleven octal digits of ustar.
const OCTAL_SIZES_END: u64 = 1 << 33;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemberKind {
    /// A plain file.
    File,
    /// A folder.
    Directory,
    /// Anything else, by its type flag: links, devices, GNU sparse files. It has no use in an OVA.
    Other(u8),
}

/// A member of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name as stored. Hostile archives hold absolute names and `..`: compare, don't open.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: MemberKind,
    /// Bytes of its content.
    pub size: u64,
    /// Where its content begins in the archive.
    pub data: HostOffset,
    /// Where the next header begins.
    pub next: HostOffset,
}

/// What [`Scanner::feed`] has found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// More bytes are needed: see [`Scanner::want`].
    More,
    /// A member; [`Scanner::want`] goes on behind its content.
    Member(Member),
    /// The end of the archive.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Pax,
    GnuName,
    /// Read past: global pax headers, GNU long link names.
    Ignored,
}

/// Walks the headers of an archive.
#[derive(Debug)]
pub struct Scanner {
    at: u64,
    /// An extended header whose content is wanted, and its size.
    extension: Option<(Extension, usize)>,
    name: Option<Vec<u8>>,
    size: Option<u64>,
    members: u32,
    ended: bool,
    max_members: u32,
    max_extension: u64,
}

impl Scanner {
    /// A scanner at the start of an archive, under [`Limits::tar_members`] and
    /// [`Limits::tar_extension_bytes`].
    #[must_use]
    pub fn new(limits: &Limits) -> Self {
        Self {
            at: 0,
            extension: None,
            name: None,
            size: None,
            members: 0,
            ended: false,
            max_members: limits.tar_members,
            max_extension: limits.tar_extension_bytes,
        }
    }

    /// Where in the archive, and how many bytes, [`feed`](Self::feed) wants next; never more than
    /// [`Limits::tar_extension_bytes`] or one block.
    #[must_use]
    pub fn want(&self) -> (HostOffset, usize) {
        (HostOffset(self.at), self.extension.map_or(BLOCK, |(_, size)| size))
    }

    /// Takes the wanted bytes. No bytes where a header is wanted is the end of an archive whose
    /// end blocks were cut off.
    ///
    /// # Errors
    /// `NotThisFormat` when the first block is no tar header; `Corrupt` when a header is cut off,
    /// its checksum is wrong or a number is impossible; `Unsupported` for sparse members; `Limit`
    /// above the limits of [`new`](Self::new).
    pub fn feed(&mut self, bytes: &[u8]) -> Result<Step, FormatError> {
        let at = self.at;
        if self.ended {
            return Ok(Step::End);
        }
        let (_, wanted) = self.want();
        if bytes.len() < wanted {
            if bytes.is_empty() && self.extension.is_none() && at > 0 {
                self.ended = true;
                return Ok(Step::End);
            }
            return Err(FormatError::corrupt("tar header", "the archive is cut off").at(at));
        }
        let bytes = bytes.get(..wanted).unwrap_or_default();
        match self.extension.take() {
            Some((extension, size)) => {
                self.extend(extension, bytes).map_err(|error| error.at(at))?;
                self.at = padded(at, size as u64).ok_or_else(|| too_far(at))?;
                Ok(Step::More)
            }
            None => self.header(bytes),
        }
    }

    fn extend(&mut self, extension: Extension, content: &[u8]) -> Result<(), FormatError> {
        match extension {
            Extension::Ignored => {}
            Extension::GnuName => self.name = Some(until_nul(content).to_vec()),
            Extension::Pax => {
                for record in PaxRecords(content) {
                    let (key, value) = record?;
                    match key {
                        b"path" => self.name = Some(value.to_vec()),
                        b"size" => {
                            let size = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
                            self.size = Some(size.ok_or_else(|| bad_pax("a size that is no number"))?);
                        }
                        key if key.starts_with(b"GNU.sparse.") => {
                            return Err(FormatError::unsupported(
                                "tar pax header",
                                "a sparse member: pack the archive again without --sparse",
                            ));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    fn header(&mut self, block: &[u8]) -> Result<Step, FormatError> {
        let at = self.at;
        if block.iter().all(|&byte| byte == 0) && at > 0 {
            self.ended = true;
            return Ok(Step::End);
        }
        let corrupt = |message: &str| FormatError::corrupt("tar header", message).at(at);
        if !checksum_holds(block) {
            return Err(match at {
                0 => FormatError::not_this_format("tar header", "the checksum of the first block is wrong"),
                _ => corrupt("the checksum is wrong"),
            });
        }
        let field = |range: std::ops::Range<usize>| block.get(range).unwrap_or_default();
        let stored = number(field(124..136)).ok_or_else(|| corrupt("the size is no number"))?;
        let data = at.checked_add(BLOCK_U64).ok_or_else(|| too_far(at))?;
        let kind = match block.get(156).copied().unwrap_or_default() {
            b'x' | b'X' => return self.begin(Extension::Pax, stored, data),
            b'L' => return self.begin(Extension::GnuName, stored, data),
            b'g' | b'K' => return self.begin(Extension::Ignored, stored, data),
            b'0' | b'7' | 0 => MemberKind::File,
            b'5' => MemberKind::Directory,
            other => MemberKind::Other(other),
        };
        if kind == MemberKind::Other(b'S') {
            return Err(FormatError::unsupported(
                "tar header",
                "a GNU sparse member: pack the archive again without --sparse",
            )
            .at(at));
        }
        self.members += 1;
        if self.members > self.max_members {
            return Err(FormatError::limit("tar", format!("more than {} members", self.max_members)).at(at));
        }
        let name = self.name.take().unwrap_or_else(|| {
            let (name, prefix) = (until_nul(field(0..100)), until_nul(field(345..500)));
            // GNU tar ("ustar  ") uses the room of the prefix for times.
            if field(257..263) == b"ustar\0" && !prefix.is_empty() {
                [prefix, b"/", name].concat()
            } else {
                name.to_vec()
            }
        });
        // Folders, links and devices have no content whatever their size field holds.
        let size = match (self.size.take().unwrap_or(stored), kind) {
            (size, MemberKind::File) => size,
            (_, MemberKind::Directory | MemberKind::Other(b'1'..=b'6')) => 0,
            (size, MemberKind::Other(_)) => size,
        };
        self.at = padded(data, size).ok_or_else(|| too_far(at))?;
        let next = HostOffset(self.at);
        Ok(Step::Member(Member { name, kind, size, data: HostOffset(data), next }))
    }

    fn begin(&mut self, extension: Extension, size: u64, data: u64) -> Result<Step, FormatError> {
        if size > self.max_extension {
            let max = self.max_extension;
            let text = format!("{size} bytes, the limit is {max}");
            return Err(FormatError::limit("tar extended header", text).at(self.at));
        }
        self.at = data;
        let size = usize::try_from(size).unwrap_or(0);
        self.extension = (size > 0).then_some((extension, size));
        Ok(Step::More)
    }
}

/// The next block boundary after `size` bytes from `at`; `None` beyond 2^63.
fn padded(at: u64, size: u64) -> Option<u64> {
    let end = at.checked_add(size)?.checked_next_multiple_of(BLOCK_U64)?;
    i64::try_from(end).is_ok().then_some(end)
}

fn too_far(at: u64) -> FormatError {
    FormatError::corrupt("tar header", "the member ends beyond 2^63").at(at)
}

fn bad_pax(message: &str) -> FormatError {
    FormatError::corrupt("tar pax header", message)
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Octal digits between blanks and NULs, or base 256 when the first bit is set (GNU, star).
/// `None` for anything else, negative numbers included.
fn number(field: &[u8]) -> Option<u64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let start = Some(u64::from(first & 0x7f)).filter(|&bits| bits < 0x40)?;
        return rest.iter().try_fold(start, |sum, &byte| sum.checked_mul(256)?.checked_add(u64::from(byte)));
    }
    let digits = until_nul(field).trim_ascii();
    digits.iter().try_fold(0u64, |sum, &digit| match digit {
        b'0'..=b'7' => sum.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// The sum of all bytes with the checksum field as blanks; old writers took bytes as signed.
fn checksums(block: &[u8]) -> (u64, i64) {
    block.iter().enumerate().fold((0, 0), |(unsigned, signed), (at, &byte)| {
        let byte = if (148..156).contains(&at) { b' ' } else { byte };
        (unsigned + u64::from(byte), signed + i64::from(byte.cast_signed()))
    })
}

fn checksum_holds(block: &[u8]) -> bool {
    let (unsigned, signed) = checksums(block);
    let field = block.get(148..156).unwrap_or_default();
    // Without a digit this is no checksum: a block of zeros must not pass.
    field.iter().any(u8::is_ascii_digit)
        && number(field)
            .is_some_and(|sum| sum == unsigned || i64::try_from(sum).is_ok_and(|sum| sum == signed))
}

/// The records `LENGTH KEY=VALUE\n` of a pax header; stops after the first error.
struct PaxRecords<'a>(&'a [u8]);

impl<'a> Iterator for PaxRecords<'a> {
    type Item = Result<(&'a [u8], &'a [u8]), FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        let content = std::mem::take(&mut self.0);
        // Some writers pad with NULs.
        if content.iter().all(|&byte| byte == 0) {
            return None;
        }
        let record = (|| {
            let digits = content.iter().position(|&byte| byte == b' ')?;
            let len: usize = std::str::from_utf8(content.get(..digits)?).ok()?.parse().ok()?;
            let record = content.get(digits.checked_add(1)?..len)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            self.0 = content.get(len..)?;
            Some((record.get(..equals)?, record.get(equals.checked_add(1)?..)?))
        })();
        Some(record.ok_or_else(|| bad_pax("a malformed record")))
    }
}

/// The header of a plain file, one block or, for a name that ustar cannot hold, three or more. The
/// content follows, then zeros up to [`padding`]. Sizes of 8 GiB and more are in base 256, which
/// GNU tar, libarchive, Go, and VMware's and VirtualBox's importers read.
///
/// # Errors
/// `Unsupported` for an empty name, one with a NUL or a line end, or a size beyond 2^63.
pub fn encode_file(name: &[u8], size: u64, mtime: u32) -> Result<Vec<u8>, FormatError> {
    let refuse = |message| Err(FormatError::unsupported("tar header", message));
    if name.is_empty() || name.iter().any(|byte| b"\0\n\r".contains(byte)) {
        return refuse("an empty name, or one with a NUL or a line end");
    }
    if i64::try_from(size).is_err() {
        return refuse("a member beyond 2^63 bytes");
    }
    let split = (name.len() <= 100).then_some((b"".as_slice(), name)).or_else(|| split_name(name));
    if let Some((prefix, rest)) = split {
        return Ok(block(prefix, rest, size, mtime, b'0').to_vec());
    }
    let record = pax_record(b"path", name);
    let mut out = block(b"", b"././@PaxHeader", record.len() as u64, mtime, b'x').to_vec();
    out.extend_from_slice(&record);
    out.resize(out.len().next_multiple_of(BLOCK), 0);
    out.extend_from_slice(&block(b"", name.get(..100).unwrap_or(name), size, mtime, b'0'));
    Ok(out)
}

/// Zero bytes after a content of `size` bytes.
#[must_use]
pub fn padding(size: u64) -> usize {
    let rest = usize::try_from(size % BLOCK_U64).unwrap_or(0);
    (BLOCK - rest) % BLOCK
}

/// The name at a slash: up to 155 bytes before, 1 to 100 after.
fn split_name(name: &[u8]) -> Option<(&[u8], &[u8])> {
    let slash = name.iter().take(156).rposition(|&byte| byte == b'/').filter(|&at| at > 0)?;
    let (prefix, rest) = (name.get(..slash)?, name.get(slash + 1..)?);
    (1..=100).contains(&rest.len()).then_some((prefix, rest))
}

/// The length counts itself: grow it until it fits.
fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body;
    while body + len.to_string().len() != len {
        len = body + len.to_string().len();
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

fn block(prefix: &[u8], name: &[u8], size: u64, mtime: u32, kind: u8) -> [u8; BLOCK] {
    let mut b = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name);
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < OCTAL_SIZES_END {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, format!("{mtime:011o}\0").as_bytes());
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    put(345, prefix);
    let (sum, _) = checksums(&b);
    b[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    b
}

#[cfg(test)]
#[path = "tar_tests.rs"]
mod tests;
