use byteorder::{BigEndian, ByteOrder};

use super::{
    Extensions, FeatureKind, FeatureName, Geometry, MAGIC, MAX_CLUSTER_BITS, MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS, RefcountWidth, feature,
};
use crate::{FormatError, HostOffset, Limits};

const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// With the compression type field and its padding.
const FULL_LEN: usize = 112;

/// How compressed clusters are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CompressionType {
    /// Raw deflate (header value 0; called zlib everywhere).
    #[default]
    Zlib,
    /// Zstandard (header value 1).
    Zstd,
}

/// How guest data is encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CryptMethod {
    /// Not at all.
    #[default]
    None,
    /// Legacy AES-CBC.
    Aes,
    /// LUKS.
    Luks,
}

/// The qcow2 header, checked against the specification and [`Limits`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Where the backing file name stands and its length in bytes.
    pub backing_name: Option<(u64, u32)>,
    /// Cluster size and entry width.
    pub geometry: Geometry,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    /// Encryption.
    pub crypt: CryptMethod,
    /// Entries in the L1 table.
    pub l1_size: u32,
    /// Where the L1 table stands.
    pub l1_offset: HostOffset,
    /// Where the refcount table stands.
    pub refcount_table_offset: HostOffset,
    /// Clusters that the refcount table takes.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where the snapshot table stands.
    pub snapshots_offset: HostOffset,
    /// Incompatible feature bits (see [`feature`]).
    pub incompatible: u64,
    /// Compatible feature bits.
    pub compatible: u64,
    /// Autoclear feature bits.
    pub autoclear: u64,
    /// Width of a refcount.
    pub refcount_width: RefcountWidth,
    /// Bytes in the header; the extensions follow.
    pub header_length: u32,
    /// Packing of compressed clusters.
    pub compression: CompressionType,
}

fn corrupt(message: impl Into<String>) -> FormatError {
    FormatError::corrupt("qcow2 header", message).at(0)
}

impl Header {
    /// Parses the header at the start of `bytes` (104 bytes suffice, or 112 with a compression type).
    ///
    /// Unknown incompatible feature bits are not refused here but by [`HeaderArea::parse`], which can name them.
    ///
    /// # Errors
    /// For another magic, and for each field outside its range in the specification or in `limits`.
    pub fn parse(bytes: &[u8], limits: &Limits) -> Result<Self, FormatError> {
        if bytes.get(..4) != Some(&MAGIC) {
            return Err(FormatError::not_this_format("qcow2 header", "the magic number is another one").at(0));
        }
        let fixed = bytes.get(..V2_LEN).ok_or_else(|| corrupt("the file ends inside the header"))?;
        let u32_at = |at: usize| BigEndian::read_u32(&fixed[at..]);
        let u64_at = |at: usize| BigEndian::read_u64(&fixed[at..]);
        let version = u32_at(4);
        if !(2..=3).contains(&version) {
            return Err(FormatError::unsupported(
                "qcow2 header",
                format!("version {version}; 2 and 3 are supported"),
            )
            .at(4));
        }
        let v3 = if version >= 3 {
            Some(bytes.get(..V3_LEN).ok_or_else(|| corrupt("the file ends inside the header"))?)
        } else {
            None
        };
        let v3_u64 = |at: usize| v3.map_or(0, |bytes| BigEndian::read_u64(&bytes[at..]));
        let v3_u32 = |at: usize, otherwise| v3.map_or(otherwise, |bytes| BigEndian::read_u32(&bytes[at..]));
        let incompatible = v3_u64(72);
        let header_length = v3_u32(100, V2_LEN as u32);
        let cluster_bits = u32_at(20);
        let extended = incompatible & feature::EXTENDED_L2 != 0;
        let geometry = Geometry::new(cluster_bits, extended).ok_or_else(|| {
            let least = if extended { MIN_EXTENDED_CLUSTER_BITS } else { MIN_CLUSTER_BITS };
            corrupt(format!("cluster_bits is {cluster_bits}; {least} to {MAX_CLUSTER_BITS} are possible"))
        })?;
        if u64::from(header_length) > geometry.cluster_size()
            || (version >= 3 && (header_length as usize) < V3_LEN)
            || header_length % 8 != 0
        {
            return Err(corrupt(format!("header_length is {header_length}")));
        }
        let refcount_order = v3_u32(96, 4);
        let refcount_width = RefcountWidth::from_order(refcount_order).ok_or_else(|| {
            corrupt(format!("refcount_order is {refcount_order}; at most 6 (64 bits) is possible"))
        })?;
        let header = Self {
            version,
            backing_name: match (u64_at(8), u32_at(16)) {
                (0, _) => None,
                (offset, len) => Some((offset, len)),
            },
            geometry,
            size: u64_at(24),
            crypt: match u32_at(32) {
                0 => CryptMethod::None,
                1 => CryptMethod::Aes,
                2 => CryptMethod::Luks,
                other => {
                    return Err(FormatError::unsupported(
                        "qcow2 header",
                        format!("encryption method {other}"),
                    )
                    .at(32));
                }
            },
            l1_size: u32_at(36),
            l1_offset: HostOffset(u64_at(40)),
            refcount_table_offset: HostOffset(u64_at(48)),
            refcount_table_clusters: u32_at(56),
            snapshots: u32_at(60),
            snapshots_offset: HostOffset(u64_at(64)),
            incompatible,
            compatible: v3_u64(80),
            autoclear: v3_u64(88),
            refcount_width,
            header_length,
            compression: Self::parse_compression(bytes, header_length, incompatible)?,
        };
        header.check(limits)?;
        Ok(header)
    }

    fn parse_compression(
        bytes: &[u8],
        header_length: u32,
        incompatible: u64,
    ) -> Result<CompressionType, FormatError> {
        let flagged = incompatible & feature::COMPRESSION_TYPE != 0;
        let value = if header_length as usize > V3_LEN {
            *bytes.get(V3_LEN).ok_or_else(|| corrupt("the file ends inside the header"))?
        } else {
            0
        };
        match (value, flagged) {
            (0, false) => Ok(CompressionType::Zlib),
            (1, true) => Ok(CompressionType::Zstd),
            // The specification ties the bit to the field in both directions.
            (0, true) | (1, false) => {
                Err(corrupt("the compression type contradicts the compression type feature bit"))
            }
            (other, _) => {
                Err(FormatError::unsupported("qcow2 header", format!("compression type {other}")).at(104))
            }
        }
    }

    fn check(&self, limits: &Limits) -> Result<(), FormatError> {
        let cluster_size = self.geometry.cluster_size();
        let aligned = |name: &str, offset: HostOffset| {
            if !offset.get().is_multiple_of(cluster_size) || offset.get() >> 56 != 0 {
                return Err(corrupt(format!(
                    "the {name} is at {offset}, not a multiple of the cluster size below 2^56"
                )));
            }
            Ok(())
        };
        aligned("L1 table", self.l1_offset)?;
        aligned("refcount table", self.refcount_table_offset)?;
        aligned("snapshot table", self.snapshots_offset)?;
        let bounded = |name: &str, bytes: Option<u64>, limit: u64| match bytes {
            Some(bytes) if bytes <= limit => Ok(()),
            _ => {
                Err(FormatError::limit("qcow2 header", format!("the {name} is larger than {limit} bytes"))
                    .at(0))
            }
        };
        bounded("L1 table", u64::from(self.l1_size).checked_mul(8), limits.qcow2_l1_bytes)?;
        bounded(
            "refcount table",
            u64::from(self.refcount_table_clusters).checked_mul(cluster_size),
            limits.qcow2_refcount_table_bytes,
        )?;
        if self.snapshots > limits.qcow2_snapshots {
            return Err(FormatError::limit(
                "qcow2 header",
                format!("{} snapshots; at most {} are read", self.snapshots, limits.qcow2_snapshots),
            )
            .at(60));
        }
        // QEMU holds sizes as signed 64-bit integers.
        if self.size > i64::MAX as u64 {
            return Err(
                FormatError::limit("qcow2 header", format!("a virtual size of {} bytes", self.size)).at(24)
            );
        }
        let needed = self.geometry.l1_entries(self.size);
        if u64::from(self.l1_size) < needed {
            return Err(corrupt(format!(
                "the L1 table has {} entries, and a disk of {} bytes needs {needed}",
                self.l1_size, self.size
            )));
        }
        if let Some((offset, len)) = self.backing_name {
            if len > limits.backing_name_bytes {
                return Err(FormatError::limit(
                    "backing file name",
                    format!("{len} bytes long; at most {} are read", limits.backing_name_bytes),
                )
                .at(offset));
            }
            if offset.checked_add(u64::from(len)).is_none_or(|end| end > cluster_size) {
                return Err(FormatError::corrupt(
                    "backing file name",
                    "it does not lie in the first cluster",
                )
                .at(offset));
            }
        }
        Ok(())
    }

    /// Writes the fields that an edit may change (size, places and lengths of tables, refcount width, feature bits) into `sector`, the
    /// first bytes of the file; the rest of it stays as it is. Returns whether `sector` holds the whole header.
    ///
    /// All of them lie in the first 512 bytes, so that one sector write changes them together or not at all.
    pub fn patch(&self, sector: &mut [u8]) -> bool {
        let length = if self.version >= 3 { V3_LEN } else { V2_LEN };
        let Some(out) = sector.get_mut(..length) else { return false };
        BigEndian::write_u64(&mut out[24..], self.size);
        BigEndian::write_u32(&mut out[36..], self.l1_size);
        BigEndian::write_u64(&mut out[40..], self.l1_offset.get());
        BigEndian::write_u64(&mut out[48..], self.refcount_table_offset.get());
        BigEndian::write_u32(&mut out[56..], self.refcount_table_clusters);
        BigEndian::write_u32(&mut out[60..], self.snapshots);
        BigEndian::write_u64(&mut out[64..], self.snapshots_offset.get());
        if self.version >= 3 {
            BigEndian::write_u64(&mut out[72..], self.incompatible);
            BigEndian::write_u64(&mut out[80..], self.compatible);
            BigEndian::write_u64(&mut out[88..], self.autoclear);
            BigEndian::write_u32(&mut out[96..], self.refcount_width.order());
        }
        true
    }

    /// Whether a feature bit of the incompatible set is on.
    #[must_use]
    pub const fn has(&self, incompatible_bit: u64) -> bool {
        self.incompatible & incompatible_bit != 0
    }
}

/// All that stands in the first cluster: header, extensions, backing file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderArea {
    /// The header.
    pub header: Header,
    /// Its extensions.
    pub extensions: Extensions,
    /// Name of the backing file, as the image gives it.
    pub backing_name: Option<Vec<u8>>,
}

impl HeaderArea {
    /// Parses the first cluster, or as much of it as the file has.
    ///
    /// # Errors
    /// As [`Header::parse`]; for a damaged extension; and for incompatible feature bits that are not
    /// known here, by the name in the image's feature name table.
    pub fn parse(cluster: &[u8], limits: &Limits) -> Result<Self, FormatError> {
        let header = Header::parse(cluster, limits)?;
        let start = header.header_length as usize;
        let end = header.backing_name.map_or(cluster.len() as u64, |(offset, _)| offset);
        let area = cluster
            .get(start..cluster.len().min(usize::try_from(end).unwrap_or(usize::MAX)))
            .unwrap_or_default();
        let extensions = Extensions::parse(area, start as u64)?;
        let unknown = header.incompatible & !feature::KNOWN_INCOMPATIBLE;
        if unknown != 0 {
            let names: Vec<String> = (0..64)
                .filter(|bit| unknown >> bit & 1 != 0)
                .map(|bit| match extensions.feature_name(FeatureKind::Incompatible, bit) {
                    Some(name) if !name.is_empty() => format!("{name:?} (bit {bit})"),
                    _ => format!("bit {bit}"),
                })
                .collect();
            return Err(FormatError::unsupported(
                "qcow2 header",
                format!("incompatible feature {}", names.join(", ")),
            )
            .at(72));
        }
        if header.crypt == CryptMethod::Luks && extensions.luks_header.is_none() {
            let message = "the extension that tells where the LUKS header stands is missing";
            return Err(FormatError::corrupt("qcow2 header", message).at(0));
        }
        let backing_name = match header.backing_name {
            None => None,
            Some((offset, len)) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let name =
                    cluster.get(start..).and_then(|rest| rest.get(..len as usize)).ok_or_else(|| {
                        FormatError::corrupt("backing file name", "it runs past the end of the file")
                            .at(offset)
                    })?;
                Some(name.to_vec())
            }
        };
        Ok(Self { header, extensions, backing_name })
    }

    /// The bitmap directory, as [`Extensions::bitmaps`] has it; `None` if the image says that it is out of date.
    #[must_use]
    pub fn bitmap_directory(&self) -> Option<(u32, u64, u64)> {
        self.extensions.bitmaps.filter(|_| self.header.autoclear & feature::BITMAPS != 0)
    }

    /// The bytes of the first cluster. Offsets and lengths that follow from the parts (`backing_name`,
    /// `header_length`, the feature name table) are filled in here; a feature name table that does not fit is left out.
    ///
    /// # Errors
    /// [`Problem::Limit`](crate::Problem::Limit) if extensions and backing file name do not fit into a cluster.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut extensions = self.extensions.clone();
        if self.header.version >= 3 && extensions.feature_names.is_empty() {
            extensions.feature_names = known_feature_names();
        }
        match self.encode_with(&extensions) {
            Err(_) if !extensions.feature_names.is_empty() => {
                extensions.feature_names.clear();
                self.encode_with(&extensions)
            }
            done => done,
        }
    }

    fn encode_with(&self, extensions: &Extensions) -> Result<Vec<u8>, FormatError> {
        let cluster_size = self.header.geometry.cluster_size() as usize;
        let mut out = self.header.encode();
        out.extend(extensions.encode());
        let name = self.backing_name.as_deref().unwrap_or_default();
        let name_at = out.len();
        out.extend(name);
        if out.len() > cluster_size {
            return Err(FormatError::limit(
                "qcow2 header",
                format!(
                    "header, extensions and backing file name need {} bytes, and a cluster has {cluster_size}",
                    out.len()
                ),
            ));
        }
        out.resize(cluster_size, 0);
        if !name.is_empty() {
            BigEndian::write_u64(&mut out[8..], name_at as u64);
            BigEndian::write_u32(&mut out[16..], name.len() as u32);
        }
        Ok(out)
    }
}

impl Header {
    /// The fields of the header without the place of the backing file name; with all that are known of its version.
    pub(super) fn encode(&self) -> Vec<u8> {
        let length = if self.version >= 3 { FULL_LEN } else { V2_LEN };
        let mut out = vec![0; length];
        out[..4].copy_from_slice(&MAGIC);
        let mut put_u32 = |at: usize, value: u32| BigEndian::write_u32(&mut out[at..], value);
        put_u32(4, self.version);
        put_u32(20, self.geometry.cluster_bits());
        put_u32(
            32,
            match self.crypt {
                CryptMethod::None => 0,
                CryptMethod::Aes => 1,
                CryptMethod::Luks => 2,
            },
        );
        if self.version >= 3 {
            put_u32(100, length as u32);
            out[V3_LEN] = match self.compression {
                CompressionType::Zlib => 0,
                CompressionType::Zstd => 1,
            };
        }
        self.patch(&mut out);
        out
    }
}

/// The names that QEMU gives to the bits it knows.
pub(super) fn known_feature_names() -> Vec<FeatureName> {
    use FeatureKind::{Autoclear, Compatible, Incompatible};
    [
        (Incompatible, 0, "dirty bit"),
        (Incompatible, 1, "corrupt bit"),
        (Incompatible, 2, "external data file"),
        (Incompatible, 3, "compression type"),
        (Incompatible, 4, "extended L2 entries"),
        (Compatible, 0, "lazy refcounts"),
        (Autoclear, 0, "bitmaps"),
        (Autoclear, 1, "raw external data"),
    ]
    .into_iter()
    .map(|(kind, bit, name)| FeatureName { kind, bit, name: name.to_owned() })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(version: u32) -> HeaderArea {
        HeaderArea {
            header: Header {
                version,
                backing_name: None,
                geometry: Geometry::new(16, false).unwrap(),
                size: 1 << 30,
                crypt: CryptMethod::None,
                l1_size: 2,
                l1_offset: HostOffset(0x3_0000),
                refcount_table_offset: HostOffset(0x1_0000),
                refcount_table_clusters: 1,
                snapshots: 0,
                snapshots_offset: HostOffset(0),
                incompatible: 0,
                compatible: 0,
                autoclear: 0,
                refcount_width: RefcountWidth::from_bits(16).unwrap(),
                header_length: if version == 3 { 112 } else { 72 },
                compression: CompressionType::Zlib,
            },
            extensions: Extensions { backing_format: Some(b"raw".to_vec()), ..Extensions::default() },
            backing_name: Some(b"base.img".to_vec()),
        }
    }

    #[test]
    fn round_trip() {
        for version in [2, 3] {
            let bytes = area(version).encode().unwrap();
            let back = HeaderArea::parse(&bytes, &Limits::default()).unwrap();
            assert_eq!(back.backing_name.as_deref(), Some(&b"base.img"[..]));
            assert_eq!(back.extensions.backing_format.as_deref(), Some(&b"raw"[..]));
            assert_eq!(Header { backing_name: None, ..back.header.clone() }, area(version).header);
            assert_eq!(back.encode().unwrap(), bytes);
        }
    }

    #[test]
    fn unknown_incompatible_bit_is_refused_by_its_name() {
        let mut area = area(3);
        area.header.incompatible = 1 << 40;
        area.extensions.feature_names =
            vec![FeatureName { kind: FeatureKind::Incompatible, bit: 40, name: "time travel".to_owned() }];
        let error = HeaderArea::parse(&area.encode().unwrap(), &Limits::default()).unwrap_err();
        assert!(error.to_string().contains("time travel"), "{error}");
        assert_eq!(error.problem, crate::Problem::Unsupported);
    }

    #[test]
    fn feature_names_give_way_in_small_clusters() {
        let mut area = area(3);
        area.header.geometry = Geometry::new(9, false).unwrap();
        area.header.size = 1 << 20;
        area.header.l1_size = 64;
        area.backing_name = Some(vec![b'x'; 300]);
        assert!(HeaderArea::parse(&area.encode().unwrap(), &Limits::default()).is_ok());
        area.backing_name = Some(vec![b'x'; 500]);
        assert!(area.encode().is_err());
    }

    #[test]
    fn each_cut_and_each_damaged_byte_is_handled() {
        let bytes = area(3).encode().unwrap();
        for cut in 0..112 {
            assert!(HeaderArea::parse(&bytes[..cut], &Limits::default()).is_err(), "{cut}");
        }
        for at in 0..600 {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                let _ = HeaderArea::parse(&bytes, &Limits::default());
            }
        }
    }
}
