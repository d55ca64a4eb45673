use byteorder::{BigEndian, ByteOrder};

use crate::FormatError;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const LUKS_HEADER: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAME_ENTRY: usize = 48;

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
                if data.len() != 24 {
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
        for (kind, data) in &self.unknown {
            put(*kind, data);
        }
        put(END, &[]);
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
