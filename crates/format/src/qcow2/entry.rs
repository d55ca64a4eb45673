use byteorder::{BigEndian, ByteOrder};

use super::{Geometry, HOST_OFFSET_MASK, SUBCLUSTERS};
use crate::HostOffset;

/// Of an L1 or L2 entry: what it points to has exactly one reference.
pub const COPIED: u64 = 1 << 63;
/// Of an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Of an L2 entry that is not an extended one: the cluster reads as zeros.
pub const ZERO: u64 = 1;
/// Reserved bits of an L1 entry: 56-62 and 0-8 (specification, "L1 table entry").
pub const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
/// Reserved bits of an L2 entry that is not compressed: 56-61 and 1-8 (specification, "Standard Cluster Descriptor").
pub const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// An entry of the L1 table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum L1Entry {
    /// No L2 table: the whole span is unallocated.
    Unallocated,
    /// The L2 table stands here.
    Table(HostOffset),
}

impl L1Entry {
    /// Decodes an entry.
    ///
    /// # Errors
    /// In words, what is wrong: reserved bits, or an offset that is no multiple of the cluster size.
    pub fn decode(raw: u64, geometry: Geometry) -> Result<Self, &'static str> {
        let host = raw & HOST_OFFSET_MASK;
        if host == 0 {
            return Ok(Self::Unallocated);
        }
        if raw & L1_RESERVED != 0 {
            return Err("reserved bits are set");
        }
        if host & (geometry.cluster_size() - 1) != 0 {
            return Err("the L2 table's offset is not a multiple of the cluster size");
        }
        Ok(Self::Table(HostOffset(host)))
    }

    /// The entry of an L2 table at `table` that nobody else refers to (refcount 1).
    #[must_use]
    pub const fn encode_owned(table: HostOffset) -> u64 {
        table.get() | COPIED
    }
}

/// Where the payload of a compressed cluster stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompressedRef {
    /// First byte of the payload; any alignment.
    pub host: HostOffset,
    /// Bytes up to the end of the payload's last 512-byte sector. The payload itself may end earlier.
    pub len: u32,
}

/// What an L2 entry says of a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cluster {
    /// Not in this image: the backing file's bytes, or zeros without one.
    Unallocated,
    /// Reads as zeros; `Some` where a host cluster is kept allocated for it.
    Zero(Option<HostOffset>),
    /// One host cluster.
    Standard(HostOffset),
    /// A packed payload.
    Compressed(CompressedRef),
    /// Extended L2: each subcluster by itself. A subcluster is allocated, zero, or (neither) unallocated.
    Subclusters {
        /// The host cluster, if there is one. Always there if a subcluster is allocated.
        host: Option<HostOffset>,
        /// Bit n: subcluster n is in the host cluster.
        allocated: u32,
        /// Bit n: subcluster n reads as zeros.
        zero: u32,
    },
}

/// Decodes and encodes L2 entries of one image.
#[derive(Debug, Clone, Copy)]
pub struct L2Codec {
    geometry: Geometry,
    version: u32,
    /// With an external data file host offset 0 is the first cluster of that file, and only
    /// the copied bit tells it from "unallocated" (QEMU `qcow2_get_cluster_type`).
    external_data: bool,
}

impl L2Codec {
    /// A codec for an image of this geometry and version, with or without an external data file.
    #[must_use]
    pub const fn new(geometry: Geometry, version: u32, external_data: bool) -> Self {
        Self { geometry, version, external_data }
    }

    /// Decodes entry `index` of `table`.
    ///
    /// # Errors
    /// In words, what is wrong with the entry.
    pub fn decode(&self, table: &[u8], index: usize) -> Result<Cluster, &'static str> {
        let size = self.geometry.l2_entry_size();
        let bytes = index
            .checked_mul(size)
            .and_then(|start| table.get(start..)?.get(..size))
            .ok_or("the entry lies outside its table")?;
        let (descriptor, bitmap) = bytes.split_at(8);
        let raw = BigEndian::read_u64(descriptor);
        if raw & COMPRESSED != 0 {
            return self.decode_compressed(raw).map(Cluster::Compressed);
        }
        if raw & L2_RESERVED != 0 {
            return Err("reserved bits are set");
        }
        let host = raw & HOST_OFFSET_MASK;
        if host & (self.geometry.cluster_size() - 1) != 0 {
            return Err("the host offset is not a multiple of the cluster size");
        }
        let host = (host != 0 || (self.external_data && raw & COPIED != 0)).then_some(HostOffset(host));
        if self.geometry.extended_l2() {
            if raw & ZERO != 0 {
                return Err("bit 0 is set, which is reserved in extended entries");
            }
            return Self::decode_bitmap(host, BigEndian::read_u64(bitmap));
        }
        if raw & ZERO != 0 {
            if self.version < 3 {
                return Err("a zero cluster, which version 2 does not have");
            }
            return Ok(Cluster::Zero(host));
        }
        Ok(host.map_or(Cluster::Unallocated, Cluster::Standard))
    }

    fn decode_bitmap(host: Option<HostOffset>, bitmap: u64) -> Result<Cluster, &'static str> {
        // Low half: allocation; high half: reads as zeros (specification, "Extended L2 Entries").
        let [allocated, zero] = [bitmap & 0xffff_ffff, bitmap >> 32].map(|half| half as u32);
        if allocated & zero != 0 {
            return Err("a subcluster is marked both allocated and zero");
        }
        match (host, allocated, zero) {
            (None, 0, 0) => Ok(Cluster::Unallocated),
            (None, 0, u32::MAX) => Ok(Cluster::Zero(None)),
            (None, 0, _) => Ok(Cluster::Subclusters { host, allocated, zero }),
            (None, ..) => Err("subclusters are marked allocated, but there is no host cluster"),
            (Some(host), u32::MAX, _) => Ok(Cluster::Standard(host)),
            (Some(_), 0, u32::MAX) => Ok(Cluster::Zero(host)),
            (Some(_), ..) => Ok(Cluster::Subclusters { host, allocated, zero }),
        }
    }

    /// Bits of a compressed descriptor that hold the host offset: 62 - (cluster_bits - 8).
    const fn offset_bits(&self) -> u32 {
        70 - self.geometry.cluster_bits()
    }

    fn decode_compressed(&self, raw: u64) -> Result<CompressedRef, &'static str> {
        if self.external_data {
            return Err("a compressed cluster in an image with an external data file");
        }
        let (host, len) = self.compressed_range(raw);
        if host >> 56 != 0 {
            return Err("the host offset has more than 56 bits");
        }
        Ok(CompressedRef { host: HostOffset(host), len: len as u32 })
    }

    /// Where the payload of the compressed entry `raw` begins, and the bytes up to the end of its last 512-byte sector,
    /// whatever they are worth.
    #[must_use]
    pub const fn compressed_range(&self, raw: u64) -> (u64, u64) {
        let bits = self.offset_bits();
        let host = raw & ((1 << bits) - 1);
        let sectors = ((raw & !(COPIED | COMPRESSED)) >> bits) + 1;
        // At most 2^14 sectors, since bits >= 49: the product fits, and exceeds host % 512.
        (host, sectors * 512 - host % 512)
    }

    /// The entry of a compressed payload of `len` bytes at `host`, or `None` if the descriptor cannot hold it.
    #[must_use]
    pub fn encode_compressed(&self, host: HostOffset, len: u32) -> Option<u64> {
        let bits = self.offset_bits();
        let last = host.get().checked_add(u64::from(len).checked_sub(1)?)?;
        let sectors = (last / 512) - (host.get() / 512);
        let fits = host.get() >> bits.min(56) == 0 && sectors >> (62 - bits) == 0;
        fits.then(|| COMPRESSED | (sectors << bits) | host.get())
    }

    /// Whether entry `index` of `table` has the copied bit: its host cluster has refcount 1 and may be written in place.
    #[must_use]
    pub fn is_copied(&self, table: &[u8], index: usize) -> bool {
        let first = index.checked_mul(self.geometry.l2_entry_size()).and_then(|start| table.get(start));
        first.is_some_and(|byte| byte & 0x80 != 0)
    }

    /// Sets or clears the copied bit of entry `index`. Returns whether the table has that entry.
    pub fn set_copied(&self, table: &mut [u8], index: usize, copied: bool) -> bool {
        let first = index.checked_mul(self.geometry.l2_entry_size()).and_then(|start| table.get_mut(start));
        let Some(byte) = first else { return false };
        *byte = *byte & 0x7f | if copied { 0x80 } else { 0 };
        true
    }

    /// Makes entry `index` of `table` say `cluster`; with a host cluster, `copied` tells whether its refcount is 1.
    /// Returns whether the entry exists and can say that: a payload may lie too far behind for its descriptor, version 2
    /// has no zero clusters, and only extended entries have subclusters.
    pub fn set(&self, table: &mut [u8], index: usize, cluster: Cluster, copied: bool) -> bool {
        let extended = self.geometry.extended_l2();
        let standard = |host: HostOffset| host.get() | if copied { COPIED } else { 0 };
        let (first, allocated, zero) = match cluster {
            Cluster::Unallocated => (0, 0, 0),
            Cluster::Zero(_) if self.version < 3 => return false,
            Cluster::Zero(host) => (host.map_or(0, standard), 0, u32::MAX),
            Cluster::Standard(host) => (standard(host), u32::MAX, 0),
            Cluster::Subclusters { host, allocated, zero } if extended => {
                (host.map_or(0, standard), allocated, zero)
            }
            Cluster::Subclusters { .. } => return false,
            Cluster::Compressed(CompressedRef { host, len }) => {
                let Some(descriptor) = self.encode_compressed(host, len) else { return false };
                (descriptor, 0, 0)
            }
        };
        let size = self.geometry.l2_entry_size();
        let bytes = index.checked_mul(size).and_then(|start| table.get_mut(start..)?.get_mut(..size));
        let Some(bytes) = bytes else { return false };
        let marked = if extended {
            BigEndian::write_u64(&mut bytes[8..], Self::encode_bitmap(allocated, zero));
            0
        } else if zero != 0 {
            ZERO
        } else {
            0
        };
        BigEndian::write_u64(bytes, first | marked);
        true
    }

    /// The first word of an entry whose host cluster has refcount 1.
    #[must_use]
    pub const fn encode_standard(host: HostOffset) -> u64 {
        host.get() | COPIED
    }

    /// The first word of a zero entry (not for extended entries), keeping `host` allocated where given.
    #[must_use]
    pub const fn encode_zero(host: Option<HostOffset>) -> u64 {
        match host {
            Some(host) => host.get() | COPIED | ZERO,
            None => ZERO,
        }
    }

    /// The second word of an extended entry. Bit n of each mask stands for subcluster n.
    #[must_use]
    pub const fn encode_bitmap(allocated: u32, zero: u32) -> u64 {
        ((zero as u64) << SUBCLUSTERS) | allocated as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codec(bits: u32, extended: bool) -> L2Codec {
        L2Codec::new(Geometry::new(bits, extended).unwrap(), 3, false)
    }

    #[test]
    fn compressed_descriptor_round_trips_at_every_cluster_size() {
        for bits in super::super::MIN_CLUSTER_BITS..=super::super::MAX_CLUSTER_BITS {
            let codec = codec(bits, false);
            for (host, len) in [(512, 1), (1023, 1), (1023, 2), (65_537, (1 << bits) - 1)] {
                let raw = codec.encode_compressed(HostOffset(host), len).unwrap();
                let got = codec.decode(&raw.to_be_bytes(), 0).unwrap();
                let Cluster::Compressed(got) = got else { panic!("{got:?}") };
                assert_eq!(got.host.get(), host);
                let end = (host + u64::from(len)).next_multiple_of(512);
                assert_eq!(u64::from(got.len), end - host, "bits {bits}");
            }
        }
    }

    #[test]
    fn standard_and_zero_entries() {
        let codec = codec(16, false);
        let at = |raw: u64| codec.decode(&raw.to_be_bytes(), 0);
        assert_eq!(at(0), Ok(Cluster::Unallocated));
        assert_eq!(at(1), Ok(Cluster::Zero(None)));
        assert_eq!(at(0x5_0001 | COPIED), Ok(Cluster::Zero(Some(HostOffset(0x5_0000)))));
        assert_eq!(at(0x5_0000), Ok(Cluster::Standard(HostOffset(0x5_0000))));
        assert!(at(0x5_0200).is_err(), "unaligned");
        assert!(at(0x5_0002).is_err(), "reserved");
        assert!(codec.decode(&[0; 8], 1).is_err(), "outside");
        let v2 = L2Codec { version: 2, ..codec };
        assert!(v2.decode(&1u64.to_be_bytes(), 0).is_err());
        let external = L2Codec { external_data: true, ..codec };
        assert_eq!(external.decode(&COPIED.to_be_bytes(), 0), Ok(Cluster::Standard(HostOffset(0))));
    }

    #[test]
    fn what_is_set_is_what_is_decoded() {
        let host = HostOffset(0x5_0000);
        let parts = Cluster::Subclusters { host: Some(host), allocated: 0b101, zero: 0b10 };
        let plain =
            [Cluster::Unallocated, Cluster::Zero(None), Cluster::Zero(Some(host)), Cluster::Standard(host)];
        for extended in [false, true] {
            let codec = codec(16, extended);
            let mut table = vec![0xff; 64];
            for cluster in plain.into_iter().chain(extended.then_some(parts)) {
                for copied in [false, true] {
                    assert!(codec.set(&mut table, 1, cluster, copied));
                    assert_eq!(codec.decode(&table, 1), Ok(cluster));
                    let has_host = !matches!(cluster, Cluster::Unallocated | Cluster::Zero(None));
                    assert_eq!(codec.is_copied(&table, 1), copied && has_host);
                }
            }
            assert!(codec.set_copied(&mut table, 1, true) && codec.is_copied(&table, 1));
            assert!(!codec.set(&mut table, 8, Cluster::Unallocated, false), "outside");
            assert!(extended || !codec.set(&mut table, 0, parts, true));
        }
        let v2 = L2Codec { version: 2, ..codec(16, false) };
        assert!(!v2.set(&mut [0; 8], 0, Cluster::Zero(None), false));
    }

    #[test]
    fn extended_entries() {
        let codec = codec(16, true);
        let at = |raw: u64, bitmap: u64| codec.decode(&[raw.to_be_bytes(), bitmap.to_be_bytes()].concat(), 0);
        let host = HostOffset(0x5_0000);
        assert_eq!(at(0, 0), Ok(Cluster::Unallocated));
        assert_eq!(at(0, u64::MAX << 32), Ok(Cluster::Zero(None)));
        assert_eq!(at(0x5_0000, 0xffff_ffff), Ok(Cluster::Standard(host)));
        assert_eq!(
            at(0x5_0000, L2Codec::encode_bitmap(1, 2)),
            Ok(Cluster::Subclusters { host: Some(host), allocated: 1, zero: 2 })
        );
        assert!(at(0x5_0000, L2Codec::encode_bitmap(1, 1)).is_err());
        assert!(at(0, 1).is_err());
        assert!(at(1, 0).is_err());
    }
}
