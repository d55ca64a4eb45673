use byteorder::{BigEndian, ByteOrder};

use crate::FormatError;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const LUKS_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAME_ENTRY: usize = 48;
const BITMAPS_LEN: usize = 24;

/// The feature set that a bit belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureKind {
    /// The image must not be opened by a program that does not know the bit.
    Incompatible,
    /// The bit may be ignored.
    Compatible,
    /// The bit is cleared by a writer that does not know it.
    Autoclear,
}

/// A row of the feature name table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// Which set.
    pub kind: FeatureKind,
    /// Which bit of it, 0 to 63.
    pub bit: u8,
    /// Its name.
    pub name: String,
}

/// The header extensions of an image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Extensions {
    /// Format of the backing file, such as `qcow2`.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file.
    pub data_file: Option<Vec<u8>>,
    /// Names of feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Number of bitmaps and (offset, bytes) of their directory.
    pub bitmaps: Option<(u32, u64, u64)>,
    /// Offset and length of the LUKS header, in bytes.
    pub luks_header: Option<(u64, u64)>,
    /// Extensions that are not known here, type and data: kept on a rewrite.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

impl Extensions {
    /// Parses the extensions in `area`, the bytes from the end of the header to the backing file name or
    /// the end of cluster 0. `offset` is the file offset of `area`.
    pub(super) fn parse(area: &[u8], offset: u64) -> Result<Self, FormatError> {
        let mut found = Self::default();
        let mut at = 0usize;
        // Ends at the end marker; QEMU also accepts that the area just ends.
        while let Some((head, rest)) = area.get(at..).and_then(|rest| rest.split_at_checked(8)) {
            let kind = BigEndian::read_u32(head);
            let len = BigEndian::read_u32(&head[4..]) as usize;
            if kind == END {
                break;
            }
            let here = offset.saturating_add(at as u64);
            let data = rest.get(..len).ok_or_else(|| {
                FormatError::corrupt(
                    format!("header extension {kind:#010x}"),
                    format!("{len} bytes long, which runs past the end of the header area"),
                )
                .at(here)
            })?;
            found.take(kind, data, here)?;
            at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
        }
        Ok(found)
    }

    fn take(&mut self, kind: u32, data: &[u8], offset: u64) -> Result<(), FormatError> {
        let wrong = |name: &str| {
            FormatError::corrupt(name, format!("{} bytes long, which is not its length", data.len()))
                .at(offset)
        };
        match kind {
            BACKING_FORMAT => self.backing_format = Some(data.to_vec()),
            DATA_FILE => self.data_file = Some(data.to_vec()),
            FEATURE_NAMES => {
                self.feature_names =
                    data.chunks_exact(FEATURE_NAME_ENTRY).filter_map(parse_feature_name).collect();
            }
            BITMAPS => {
                if data.len() != BITMAPS_LEN {
                    return Err(wrong("bitmaps extension"));
                }
                let (size, at) = (BigEndian::read_u64(&data[8..]), BigEndian::read_u64(&data[16..]));
                self.bitmaps = Some((BigEndian::read_u32(data), at, size));
            }
            LUKS_HEADER => {
                if data.len() != 16 {
                    return Err(wrong("LUKS header extension"));
                }
                self.luks_header = Some((BigEndian::read_u64(data), BigEndian::read_u64(&data[8..])));
            }
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }

    /// The name that the image gives to a feature bit.
    #[must_use]
    pub fn feature_name(&self, kind: FeatureKind, bit: u8) -> Option<&str> {
        self.feature_names.iter().find(|row| row.kind == kind && row.bit == bit).map(|row| row.name.as_str())
    }

    /// The bytes of all extensions, with the end marker.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |kind: u32, data: &[u8]| {
            out.extend(kind.to_be_bytes());
            out.extend((data.len() as u32).to_be_bytes());
            out.extend(data);
            out.resize(out.len().next_multiple_of(8), 0);
        };
        if let Some(format) = &self.backing_format {
            put(BACKING_FORMAT, format);
        }
        if let Some(name) = &self.data_file {
            put(DATA_FILE, name);
        }
        if let Some((at, len)) = self.luks_header {
            put(LUKS_HEADER, &[at.to_be_bytes(), len.to_be_bytes()].concat());
        }
        if !self.feature_names.is_empty() {
            let table: Vec<u8> = self.feature_names.iter().flat_map(encode_feature_name).collect();
            put(FEATURE_NAMES, &table);
        }
        if let Some(directory) = self.bitmaps {
            put(BITMAPS, &encode_bitmaps(directory));
        }
        for (kind, data) in &self.unknown {
            put(*kind, data);
        }
        put(END, &[]);
        out
    }
}

/// The data of the bitmaps extension: number of bitmaps, and offset and bytes of their directory.
fn encode_bitmaps((count, at, len): (u32, u64, u64)) -> [u8; BITMAPS_LEN] {
    let mut out = [0; BITMAPS_LEN];
    BigEndian::write_u32(&mut out, count);
    BigEndian::write_u64(&mut out[8..], len);
    BigEndian::write_u64(&mut out[16..], at);
    out
}

/// Where the bitmaps extension stands in the first cluster, or may be added, for changes in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsPlace {
    /// File offset of the extension; of the end marker if there is none.
    pub offset: u64,
    /// There is one.
    pub exists: bool,
    /// Nothing but the end marker follows it.
    pub last: bool,
}

impl BitmapsPlace {
    /// Bytes of the extension's head, type and length.
    pub const HEAD: u64 = 8;
    /// Bytes of the extension with its head.
    pub const LEN: u64 = Self::HEAD + BITMAPS_LEN as u64;

    /// Looks for the extension in `cluster`, the first cluster, whose extensions stand in `range`. `None` if there is no
    /// end marker.
    #[must_use]
    pub fn find(cluster: &[u8], range: std::ops::Range<u64>) -> Option<Self> {
        let area = cluster.get(..usize::try_from(range.end).ok()?)?;
        let mut at = usize::try_from(range.start).ok()?;
        let mut found = None;
        loop {
            let head = area.get(at..)?.first_chunk::<8>()?;
            let (kind, len) = (BigEndian::read_u32(head), BigEndian::read_u32(&head[4..]) as usize);
            match kind {
                END => {
                    let here = Self { offset: at as u64, exists: false, last: true };
                    return Some(found.map_or(here, |place: Self| Self {
                        last: place.offset + Self::LEN == at as u64,
                        ..place
                    }));
                }
                BITMAPS => found = Some(Self { offset: at as u64, exists: true, last: false }),
                _ => {}
            }
            at = at.checked_add(8)?.checked_add(len.checked_next_multiple_of(8)?)?;
        }
    }

    /// The extension's head and data, as [`Extensions::bitmaps`] has them, and an end marker.
    #[must_use]
    pub fn encode(directory: (u32, u64, u64)) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::LEN as usize + 8);
        out.extend(BITMAPS.to_be_bytes());
        out.extend((BITMAPS_LEN as u32).to_be_bytes());
        out.extend(encode_bitmaps(directory));
        out.extend([0; 8]);
        out
    }
}

fn parse_feature_name(row: &[u8]) -> Option<FeatureName> {
    let kind = match row.first()? {
        0 => FeatureKind::Incompatible,
        1 => FeatureKind::Compatible,
        2 => FeatureKind::Autoclear,
        _ => return None,
    };
    let name = row.get(2..)?.split(|&byte| byte == 0).next()?;
    Some(FeatureName { kind, bit: *row.get(1)?, name: String::from_utf8_lossy(name).into_owned() })
}

fn encode_feature_name(row: &FeatureName) -> [u8; FEATURE_NAME_ENTRY] {
    let mut out = [0; FEATURE_NAME_ENTRY];
    out[0] = match row.kind {
        FeatureKind::Incompatible => 0,
        FeatureKind::Compatible => 1,
        FeatureKind::Autoclear => 2,
    };
    out[1] = row.bit;
    for (to, from) in out[2..].iter_mut().zip(row.name.bytes()) {
        *to = from;
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bitmaps_extension_is_found_and_kept() {
        let with = |bitmaps, unknown: &[u32]| {
            let unknown = unknown.iter().map(|&kind| (kind, vec![1, 2, 3])).collect();
            let all = Extensions {
                bitmaps,
                unknown,
                backing_format: Some(b"raw".to_vec()),
                ..Extensions::default()
            };
            let bytes = [vec![0xff; 104], all.encode()].concat();
            let parsed = Extensions::parse(&bytes[104..], 104).unwrap();
            assert_eq!(parsed, all);
            bytes
        };
        let find = |bytes: &[u8]| BitmapsPlace::find(bytes, 104..bytes.len() as u64);
        let place = |offset, exists, last| Some(BitmapsPlace { offset, exists, last });
        let directory = (3, 0x5_0000, 77);
        assert_eq!(find(&with(None, &[])), place(120, false, true));
        assert_eq!(find(&with(None, &[9])), place(136, false, true));
        assert_eq!(find(&with(Some(directory), &[])), place(120, true, true));
        assert_eq!(find(&with(Some(directory), &[9])), place(120, true, false));
        let bytes = with(Some(directory), &[]);
        assert_eq!(bytes[120..], BitmapsPlace::encode(directory));
        assert_eq!(find(&bytes[..bytes.len() - 8]), None, "no end marker");
        assert_eq!(find(&[]), None);
    }
}
