//! The text descriptor ("The Descriptor File" of Virtual Disk Format 5.0).
//!
//! Names and values are bytes: the text may be in any encoding that extends ASCII, and a name goes
//! to the file system as it stands.

mod line;
mod write;

use line::{Line, lines};
pub use write::replace_value;

use super::{AdapterType, Chs, sector_bytes};
use crate::{FormatError, Limits};

/// `parentCID` of a disk without a parent.
pub const NO_PARENT: u32 = 0xffff_ffff;
/// More entries than this are no descriptor (real ones have about 20).
const MAX_ENTRIES: usize = 4096;
/// As many doubts are told; more would say nothing new.
const MAX_DOUBTS: usize = 32;

/// A `createType`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are those of the specification")]
pub enum CreateType {
    MonolithicSparse,
    MonolithicFlat,
    /// Also written `2GbMaxExtentSparse`.
    TwoGbMaxExtentSparse,
    /// Also written `2GbMaxExtentFlat`.
    TwoGbMaxExtentFlat,
    StreamOptimized,
    Vmfs,
    VmfsPreallocated,
    VmfsEagerZeroedThick,
    VmfsThin,
    VmfsSparse,
    SeSparse,
    FullDevice,
    PartitionedDevice,
    VmfsRaw,
    /// Also written `vmfsRDM`.
    VmfsRawDeviceMap,
    /// Also written `vmfsRDMP`.
    VmfsPassthroughRawDeviceMap,
    VsanSparse,
    Custom,
    /// Anything else, kept as it was written.
    Unknown(Vec<u8>),
}

/// Each type with its names; the first one is written.
const CREATE_TYPES: [(CreateType, &[&str]); 18] = [
    (CreateType::MonolithicSparse, &["monolithicSparse"]),
    (CreateType::MonolithicFlat, &["monolithicFlat"]),
    (CreateType::TwoGbMaxExtentSparse, &["twoGbMaxExtentSparse", "2GbMaxExtentSparse"]),
    (CreateType::TwoGbMaxExtentFlat, &["twoGbMaxExtentFlat", "2GbMaxExtentFlat"]),
    (CreateType::StreamOptimized, &["streamOptimized"]),
    (CreateType::Vmfs, &["vmfs"]),
    (CreateType::VmfsPreallocated, &["vmfsPreallocated"]),
    (CreateType::VmfsEagerZeroedThick, &["vmfsEagerZeroedThick"]),
    (CreateType::VmfsThin, &["vmfsThin"]),
    (CreateType::VmfsSparse, &["vmfsSparse"]),
    (CreateType::SeSparse, &["seSparse"]),
    (CreateType::FullDevice, &["fullDevice"]),
    (CreateType::PartitionedDevice, &["partitionedDevice"]),
    (CreateType::VmfsRaw, &["vmfsRaw"]),
    (CreateType::VmfsRawDeviceMap, &["vmfsRawDeviceMap", "vmfsRDM"]),
    (CreateType::VmfsPassthroughRawDeviceMap, &["vmfsPassthroughRawDeviceMap", "vmfsRDMP"]),
    (CreateType::VsanSparse, &["vsanSparse"]),
    (CreateType::Custom, &["custom"]),
];

impl CreateType {
    /// Reads a value of `createType`; known names in any case.
    #[must_use]
    pub fn from_bytes(name: &[u8]) -> Self {
        let is_name = |known: &&str| known.as_bytes().eq_ignore_ascii_case(name);
        CREATE_TYPES
            .into_iter()
            .find(|(_, names)| names.iter().any(is_name))
            .map_or_else(|| Self::Unknown(name.to_vec()), |(kind, _)| kind)
    }

    /// The value of `createType`.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        if let Self::Unknown(name) = self {
            return name;
        }
        CREATE_TYPES
            .iter()
            .find(|(kind, _)| kind == self)
            .and_then(|(_, names)| names.first())
            .map_or(b"custom", |name| name.as_bytes())
    }
}

/// The access of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// `RW`.
    ReadWrite,
    /// `RDONLY`: read like `RW`. (QEMU skips the line without a word.)
    ReadOnly,
    /// `NOACCESS`: the guest cannot read it. (QEMU skips the line without a word.)
    NoAccess,
}

/// The type of an extent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// `FLAT`: guest bytes as they are.
    Flat,
    /// `SPARSE`: a hosted sparse extent.
    Sparse,
    /// `ZERO`: zeros, no file. (QEMU skips the line without a word.)
    Zero,
    /// `VMFS`: as `FLAT`, on VMFS.
    Vmfs,
    /// `VMFSSPARSE`: a COWD extent.
    VmfsSparse,
    /// `VMFSRDM`: a raw device mapping.
    VmfsRdm,
    /// `VMFSRAW`: a raw device.
    VmfsRaw,
    /// `SESPARSE`: a seSparse extent.
    SeSparse,
    /// Anything else, kept as it was written.
    Unknown(Vec<u8>),
}

impl ExtentKind {
    const KNOWN: [(Self, &'static [u8]); 8] = [
        (Self::Flat, b"FLAT"),
        (Self::Sparse, b"SPARSE"),
        (Self::Zero, b"ZERO"),
        (Self::Vmfs, b"VMFS"),
        (Self::VmfsSparse, b"VMFSSPARSE"),
        (Self::VmfsRdm, b"VMFSRDM"),
        (Self::VmfsRaw, b"VMFSRAW"),
        (Self::SeSparse, b"SESPARSE"),
    ];

    /// Reads an extent type, known ones in any case.
    #[must_use]
    pub fn from_bytes(name: &[u8]) -> Self {
        Self::KNOWN
            .into_iter()
            .find(|(_, known)| known.eq_ignore_ascii_case(name))
            .map_or_else(|| Self::Unknown(name.to_vec()), |(kind, _)| kind)
    }

    /// The type as an extent line has it.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        if let Self::Unknown(name) = self {
            return name;
        }
        Self::KNOWN.iter().find(|(kind, _)| kind == self).map_or(b"FLAT", |(_, name)| name)
    }
}

/// One extent line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// What the guest may do with it.
    pub access: Access,
    /// Guest sectors it covers; extents follow each other in the guest.
    pub sectors: u64,
    /// Its type.
    pub kind: ExtentKind,
    /// The file, relative to the descriptor; `None` only for [`ExtentKind::Zero`].
    pub file: Option<Vec<u8>>,
    /// The sector in the file at which a flat extent begins; seen on `VMFS` lines too.
    pub offset: Option<u64>,
    /// What follows, as it stands: see [`partition_uuid`](Self::partition_uuid).
    pub rest: Vec<u8>,
}

impl Extent {
    /// Guest bytes of the extent.
    ///
    /// # Errors
    /// `Corrupt` beyond 2^63; never for an extent that [`Descriptor::parse`] has read.
    pub fn bytes(&self) -> Result<u64, FormatError> {
        sector_bytes(self.sectors, "extent size")
    }

    /// Byte offset of the extent in its file, 0 where the line has none.
    ///
    /// # Errors
    /// `Corrupt` beyond 2^63; never for an extent that [`Descriptor::parse`] has read.
    pub fn file_offset(&self) -> Result<u64, FormatError> {
        sector_bytes(self.offset.unwrap_or(0), "extent offset")
    }

    /// The partition UUID of a device extent: the first field after the offset, without quotes.
    #[must_use]
    pub fn partition_uuid(&self) -> Option<&[u8]> {
        self.fields().next()
    }

    /// The device identifier of a device extent: the second field after the offset, without quotes.
    #[must_use]
    pub fn device_id(&self) -> Option<&[u8]> {
        self.fields().nth(1)
    }

    fn fields(&self) -> impl Iterator<Item = &[u8]> {
        let mut rest = self.rest.trim_ascii();
        std::iter::from_fn(move || {
            let (field, after) = match rest.strip_prefix(b"\"") {
                Some(open) => open.split_at(open.iter().position(|&byte| byte == b'"')?),
                None if rest.is_empty() => return None,
                None => rest.split_at(rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len())),
            };
            rest = after.strip_prefix(b"\"").unwrap_or(after).trim_ascii_start();
            Some(field)
        })
    }
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The key as it was written.
    pub key: Vec<u8>,
    /// The value without quotes.
    pub value: Vec<u8>,
    /// Whether the value stands in quotes. (Entries of the disk data base always do when written.)
    pub quoted: bool,
}

impl Entry {
    /// An entry with its value in quotes.
    pub fn quoted(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), value: value.into(), quoted: true }
    }
}

/// A descriptor. Comments and spacing are not kept: to change a value in a text that has to stay
/// as it is otherwise, use [`replace_value`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// `version`, 1 to 3 in known files. It does not change the meaning of the rest.
    pub version: Option<u32>,
    /// `encoding` of this text, for example `UTF-8` or `windows-1252`.
    pub encoding: Option<Vec<u8>>,
    /// `CID`: changes whenever the content does.
    pub cid: Option<u32>,
    /// `parentCID`: the parent's `CID` when this delta was made; [`NO_PARENT`] without one.
    pub parent_cid: Option<u32>,
    /// `isNativeSnapshot`: `yes` where the storage array keeps the delta.
    pub native_snapshot: Option<bool>,
    /// `createType`.
    pub create_type: Option<CreateType>,
    /// `parentFileNameHint`: the parent, relative to this file or absolute.
    pub parent_hint: Option<Vec<u8>>,
    /// The extents in guest order.
    pub extents: Vec<Extent>,
    /// Other header entries (`changeTrackPath`, …) in their order.
    pub other: Vec<Entry>,
    /// The disk data base, every `ddb.` entry in its order.
    pub ddb: Vec<Entry>,
    /// What was read although no writer should write it, in words (at most 32).
    pub doubts: Vec<String>,
}

impl Descriptor {
    /// Reads a descriptor file or an embedded descriptor; the text ends at the first NUL.
    ///
    /// # Errors
    /// `NotThisFormat` when nothing in the text belongs to a descriptor; `Corrupt` for a line that
    /// begins as an extent and is none, and for sizes beyond 2^63; `Limit` above
    /// [`Limits::vmdk_descriptor_bytes`], [`Limits::vmdk_extents`] or 4096 entries.
    pub fn parse(text: &[u8], limits: &Limits) -> Result<Self, FormatError> {
        const WHAT: &str = "descriptor";
        if text.len() as u64 > limits.vmdk_descriptor_bytes {
            let max = limits.vmdk_descriptor_bytes;
            return Err(FormatError::limit(WHAT, format!("{} bytes, the limit is {max}", text.len())));
        }
        let mut it = Self::default();
        let mut total = 0u64;
        let mut entries = 0;
        let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text);
        for (number, (offset, line)) in (1..).zip(lines(text)) {
            let error = |error: FormatError| error.at(offset as u64);
            let what = || format!("descriptor, line {number}");
            match line::parse(line) {
                Line::Nothing => {}
                Line::Extent(line) => {
                    let extent = Extent {
                        access: access(line.access),
                        sectors: line.sectors,
                        kind: ExtentKind::from_bytes(line.kind),
                        file: line.file.map(<[u8]>::to_vec),
                        offset: line.offset,
                        rest: line.rest.to_vec(),
                    };
                    if extent.file.as_ref().is_none_or(Vec::is_empty) && extent.kind != ExtentKind::Zero {
                        return Err(error(FormatError::corrupt(what(), "the extent names no file")));
                    }
                    extent.file_offset().map_err(error)?;
                    total = total.saturating_add(extent.sectors);
                    sector_bytes(total, "sum of the extents").map_err(error)?;
                    if it.extents.len() >= limits.vmdk_extents as usize {
                        let max = limits.vmdk_extents;
                        return Err(error(FormatError::limit(what(), format!("more than {max} extents"))));
                    }
                    if extent.sectors == 0 {
                        it.doubt(format!("line {number}: an extent of no sectors"));
                    }
                    it.extents.push(extent);
                }
                Line::BadExtent => {
                    return Err(error(FormatError::corrupt(
                        what(),
                        "not an extent: `ACCESS SECTORS TYPE \"FILE\" [OFFSET]` is expected",
                    )));
                }
                Line::Entry(line) => {
                    entries += 1;
                    if entries > MAX_ENTRIES {
                        let text = format!("more than {MAX_ENTRIES} entries");
                        return Err(error(FormatError::limit(what(), text)));
                    }
                    if line.odd {
                        it.doubt(format!("line {number}: the quotes do not match"));
                    }
                    it.entry(number, line.key, line.value, line.quoted);
                }
                Line::Junk => it.doubt(format!("line {number} is neither an extent nor an entry")),
            }
        }
        if it.extents.is_empty() && it.version.is_none() && it.cid.is_none() && it.create_type.is_none() {
            return Err(FormatError::not_this_format(WHAT, "no version, CID, createType or extent"));
        }
        for (missing, name) in [
            (it.version.is_none(), "version"),
            (it.cid.is_none(), "CID"),
            (it.create_type.is_none(), "createType"),
        ] {
            if missing {
                it.doubt(format!("no usable {name}"));
            }
        }
        Ok(it)
    }

    fn doubt(&mut self, text: String) {
        if self.doubts.len() < MAX_DOUBTS {
            self.doubts.push(text);
        }
    }

    /// Takes one entry. The first of several holds, as in QEMU.
    fn entry(&mut self, number: usize, key: &[u8], value: &[u8], quoted: bool) {
        let is = |name: &str| key.eq_ignore_ascii_case(name.as_bytes());
        let text = std::str::from_utf8(value).unwrap_or_default();
        let hex = || u32::from_str_radix(text.trim_start_matches("0x"), 16).ok();
        let fresh = if is("version") {
            set(&mut self.version, text.parse().ok())
        } else if is("CID") {
            set(&mut self.cid, hex())
        } else if is("parentCID") {
            set(&mut self.parent_cid, hex())
        } else if is("isNativeSnapshot") {
            let yes = text.eq_ignore_ascii_case("yes");
            set(&mut self.native_snapshot, (yes || text.eq_ignore_ascii_case("no")).then_some(yes))
        } else if is("encoding") {
            set(&mut self.encoding, Some(value.to_vec()))
        } else if is("createType") {
            set(&mut self.create_type, Some(CreateType::from_bytes(value)))
        } else if is("parentFileNameHint") {
            set(&mut self.parent_hint, Some(value.to_vec()))
        } else {
            let ddb = key.get(..4).is_some_and(|start| start.eq_ignore_ascii_case(b"ddb."));
            let list = if ddb { &mut self.ddb } else { &mut self.other };
            list.push(Entry { key: key.to_vec(), value: value.to_vec(), quoted });
            true
        };
        if !fresh {
            let key = String::from_utf8_lossy(key).into_owned();
            self.doubt(format!("line {number}: a second or unusable {key} is ignored"));
        }
    }

    /// Guest sectors of the disk: the sum of the extents.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.sectors))
    }

    /// The parent's `CID`, if this is a delta.
    #[must_use]
    pub fn parent(&self) -> Option<u32> {
        self.parent_cid.filter(|&cid| cid != NO_PARENT)
    }

    /// The value of the first entry of the disk data base with this key (in any case), given
    /// without `ddb.`: `descriptor.ddb("adapterType")`.
    #[must_use]
    pub fn ddb(&self, key: &str) -> Option<&[u8]> {
        let is_key =
            |entry: &&Entry| entry.key.get(4..).is_some_and(|name| name.eq_ignore_ascii_case(key.as_bytes()));
        self.ddb.iter().find(is_key).map(|entry| entry.value.as_slice())
    }

    /// As [`ddb`](Self::ddb), for a decimal number.
    #[must_use]
    pub fn ddb_number(&self, key: &str) -> Option<u32> {
        std::str::from_utf8(self.ddb(key)?).ok()?.trim().parse().ok()
    }

    /// `ddb.adapterType`.
    #[must_use]
    pub fn adapter(&self) -> Option<AdapterType> {
        self.ddb("adapterType").map(AdapterType::from_bytes)
    }

    /// `ddb.geometry.cylinders`, `.heads` and `.sectors`, if all are there.
    #[must_use]
    pub fn chs(&self) -> Option<Chs> {
        Some(Chs {
            cylinders: self.ddb_number("geometry.cylinders")?,
            heads: self.ddb_number("geometry.heads")?,
            sectors: self.ddb_number("geometry.sectors")?,
        })
    }

    /// `ddb.longContentID`, 32 hexadecimal digits.
    #[must_use]
    pub fn long_content_id(&self) -> Option<u128> {
        let text = std::str::from_utf8(self.ddb("longContentID")?).ok()?;
        (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok()).flatten()
    }

    /// A name of this descriptor as text, if its encoding is known here: UTF-8 (also when declared
    /// otherwise and valid), or windows-1252. A file that was moved from Windows to Linux has the
    /// UTF-8 form of the name that the descriptor holds in windows-1252.
    #[must_use]
    pub fn decode(&self, name: &[u8]) -> Option<String> {
        if let Ok(text) = std::str::from_utf8(name) {
            return Some(text.to_owned());
        }
        let windows = self.encoding.as_ref().is_some_and(|e| e.eq_ignore_ascii_case(b"windows-1252"));
        windows.then(|| name.iter().map(|&byte| windows_1252(byte)).collect())
    }
}

/// Fills an empty field; `false` when it is taken or there is no value.
fn set<T>(field: &mut Option<T>, value: Option<T>) -> bool {
    let fresh = field.is_none() && value.is_some();
    if fresh {
        *field = value;
    }
    fresh
}

fn access(name: &[u8]) -> Access {
    match name.to_ascii_uppercase().as_slice() {
        b"RW" => Access::ReadWrite,
        b"RDONLY" => Access::ReadOnly,
        _ => Access::NoAccess,
    }
}

fn windows_1252(byte: u8) -> char {
    /// 0x80 to 0x9f; the five bytes that are not assigned map to the C1 controls (WHATWG).
    const HIGH: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž', '\u{8f}',
        '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}', 'ž', 'Ÿ',
    ];
    let high = usize::from(byte).checked_sub(0x80).and_then(|index| HIGH.get(index));
    high.copied().unwrap_or(char::from(byte))
}

/// Whether these first bytes of a file are a descriptor; see [`probe`](super::probe).
pub(super) fn looks_like(bytes: &[u8]) -> bool {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    for (_, line) in lines(text) {
        let line = line.trim_ascii();
        if let Some(comment) = line.strip_prefix(b"#") {
            if comment.trim_ascii().eq_ignore_ascii_case(b"Disk DescriptorFile") {
                return true;
            }
        } else if !line.is_empty() {
            return match line::parse(line) {
                Line::Entry(entry) => {
                    entry.key.eq_ignore_ascii_case(b"version")
                        && !entry.value.is_empty()
                        && entry.value.iter().all(u8::is_ascii_digit)
                }
                _ => false,
            };
        }
    }
    false
}

#[cfg(test)]
mod tests;
