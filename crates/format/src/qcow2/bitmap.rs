use byteorder::{BigEndian, ByteOrder};

use super::{Geometry, HOST_OFFSET_MASK};
use crate::{FormatError, HostOffset, Limits};

/// An entry of the bitmap directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bitmap {
    /// Its name.
    pub name: Vec<u8>,
    /// Where the bitmap's table stands.
    pub table_offset: HostOffset,
    /// Entries in that table.
    pub table_size: u32,
    /// It was not saved properly and must not be trusted (flag bit 0).
    pub in_use: bool,
    /// A guest's writes are to be recorded in it when the image is opened (flag bit 1).
    pub auto: bool,
    /// Programs that do not know the extra data may use the bitmap all the same (flag bit 2).
    pub extra_compatible: bool,
    /// log2 of the guest bytes that one bit stands for, 9 to 31.
    pub granularity_bits: u8,
    /// Extra data as it stands in the file. No kind of it is known: it is kept on a rewrite.
    pub extra: Vec<u8>,
}

/// What an entry of a bitmap's table says of one cluster of the bitmap's bits (specification, "Bitmap table").
///
/// In a cluster bit 0 is the lowest bit of the first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitmapCluster {
    /// All bits are 0.
    Zeros,
    /// All bits are 1.
    Ones,
    /// The bits stand here.
    Bits(HostOffset),
}

impl BitmapCluster {
    /// Reserved bits of an entry: 1 to 8 and 56 to 63.
    const RESERVED: u64 = 0xff00_0000_0000_01fe;
    /// Marks a cluster of ones that is not there.
    const ONES: u64 = 1;

    /// Decodes an entry.
    ///
    /// # Errors
    /// Says what is wrong: reserved bits, or an offset that is no cluster's.
    pub const fn decode(raw: u64, geometry: Geometry) -> Result<Self, &'static str> {
        let host = raw & HOST_OFFSET_MASK;
        if raw & Self::RESERVED != 0 || (host != 0 && raw & Self::ONES != 0) {
            return Err("reserved bits are set");
        }
        if host & (geometry.cluster_size() - 1) != 0 {
            return Err("the host offset is not a multiple of the cluster size");
        }
        Ok(match (host, raw & Self::ONES) {
            (0, 0) => Self::Zeros,
            (0, _) => Self::Ones,
            (host, _) => Self::Bits(HostOffset(host)),
        })
    }

    /// The entry.
    #[must_use]
    pub const fn encode(self) -> u64 {
        match self {
            Self::Zeros => 0,
            Self::Ones => Self::ONES,
            Self::Bits(host) => host.get(),
        }
    }
}

impl Bitmap {
    /// Guest bytes that one bit stands for.
    #[must_use]
    pub const fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Bits that a disk of `size` bytes needs.
    #[must_use]
    pub const fn bits(&self, size: u64) -> u64 {
        size.div_ceil(self.granularity())
    }

    /// Entries that the table needs for a disk of `size` bytes.
    #[must_use]
    pub const fn table_entries(&self, size: u64, geometry: Geometry) -> u64 {
        self.bits(size).div_ceil(8).div_ceil(geometry.cluster_size())
    }

    /// Bytes in the entry of the directory.
    #[must_use]
    pub const fn encoded_len(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// The entry of the directory, padded.
    ///
    /// # Errors
    /// [`Problem::Limit`](crate::Problem::Limit) if the name is longer than 1023 bytes (specification).
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let too_long = || {
            let message = format!(
                "a bitmap's name of {} bytes; at most {MAX_BITMAP_NAME} are possible",
                self.name.len()
            );
            FormatError::limit("bitmap directory", message)
        };
        let name_len = u16::try_from(self.name.len()).ok().filter(|&len| usize::from(len) <= MAX_BITMAP_NAME);
        let name_len = name_len.ok_or_else(too_long)?;
        let mut out = Vec::with_capacity(self.encoded_len());
        out.extend(self.table_offset.get().to_be_bytes());
        out.extend(self.table_size.to_be_bytes());
        out.extend(self.flags().to_be_bytes());
        out.extend([DIRTY_TRACKING, self.granularity_bits]);
        out.extend(name_len.to_be_bytes());
        // Parsing bounds it by the directory, and a new bitmap has none.
        out.extend((self.extra.len() as u32).to_be_bytes());
        out.extend(&self.extra);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(out)
    }

    /// The field that stands [`BITMAP_FLAGS_AT`] bytes into the entry.
    #[must_use]
    pub const fn flags(&self) -> u32 {
        (self.in_use as u32) | (self.auto as u32) << 1 | (self.extra_compatible as u32) << 2
    }
}

/// Where the flags stand in an entry of the directory. They are aligned, so that one sector write changes them.
pub const BITMAP_FLAGS_AT: u64 = 12;
/// The longest name of a bitmap, in bytes.
pub const MAX_BITMAP_NAME: usize = 1023;
/// The only type of bitmap.
const DIRTY_TRACKING: u8 = 1;
const FIXED: usize = 24;
/// QEMU's bounds for the granularity.
pub const BITMAP_GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

/// Parses the bitmap directory of `count` entries that stands at `offset` and takes exactly `bytes` (specification,
/// "Bitmap directory").
///
/// # Errors
/// If an entry runs over the end of `bytes`, bytes are left over, or a field is out of its range.
pub fn parse_bitmaps(
    bytes: &[u8],
    count: u32,
    offset: HostOffset,
    limits: &Limits,
) -> Result<Vec<Bitmap>, FormatError> {
    if count > limits.qcow2_bitmaps {
        return Err(FormatError::limit(
            "bitmap directory",
            format!("{count} bitmaps; at most {} are read", limits.qcow2_bitmaps),
        )
        .at(offset.get()));
    }
    let mut bitmaps = Vec::new();
    let mut rest = bytes;
    for index in 0..count {
        let at = offset.get().saturating_add((bytes.len() - rest.len()) as u64);
        let wrong = |why: &str| FormatError::corrupt(format!("bitmap directory, entry {index}"), why).at(at);
        let (bitmap, after) = parse_one(rest).map_err(wrong)?;
        bitmaps.push(bitmap);
        rest = after;
    }
    if !rest.is_empty() {
        let why = format!("{} bytes follow the last entry", rest.len());
        return Err(FormatError::corrupt("bitmap directory", why).at(offset.get()));
    }
    Ok(bitmaps)
}

/// The first entry of `bytes`, and what follows it.
fn parse_one(bytes: &[u8]) -> Result<(Bitmap, &[u8]), &'static str> {
    const CUT: &str = "it runs past the end of the directory";
    let (fixed, rest) = bytes.split_at_checked(FIXED).ok_or(CUT)?;
    let flags = BigEndian::read_u32(&fixed[12..]);
    let (kind, granularity_bits) = (fixed[16], fixed[17]);
    let name_len = usize::from(BigEndian::read_u16(&fixed[18..]));
    let extra_len = BigEndian::read_u32(&fixed[20..]) as usize;
    if kind != DIRTY_TRACKING {
        return Err("its type is not 1 (dirty tracking), the only one there is");
    }
    if !BITMAP_GRANULARITY_BITS.contains(&granularity_bits) {
        return Err("its granularity is not from 2^9 to 2^31");
    }
    let (extra, rest) = rest.split_at_checked(extra_len).ok_or(CUT)?;
    let name = rest.get(..name_len).ok_or(CUT)?;
    let len = (FIXED + name_len).checked_add(extra_len).and_then(|len| len.checked_next_multiple_of(8));
    let after = len.and_then(|len| bytes.get(len..)).ok_or(CUT)?;
    let bitmap = Bitmap {
        name: name.to_vec(),
        table_offset: HostOffset(BigEndian::read_u64(fixed)),
        table_size: BigEndian::read_u32(&fixed[8..]),
        in_use: flags & 1 != 0,
        auto: flags & 2 != 0,
        extra_compatible: flags & 4 != 0,
        granularity_bits,
        extra: extra.to_vec(),
    };
    Ok((bitmap, after))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, extra: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(0x30000u64.to_be_bytes());
        bytes.extend(7u32.to_be_bytes());
        bytes.extend(2u32.to_be_bytes());
        bytes.extend([1, 16]);
        bytes.extend((name.len() as u16).to_be_bytes());
        bytes.extend((extra as u32).to_be_bytes());
        bytes.resize(bytes.len() + extra, 0xee);
        bytes.extend(name.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    fn parse(bytes: &[u8], count: u32) -> Result<Vec<Bitmap>, FormatError> {
        parse_bitmaps(bytes, count, HostOffset(0), &Limits::default())
    }

    #[test]
    fn parses_two_and_refuses_cut_ones() {
        let two = [entry("a", 0), entry("second", 5)].concat();
        let got = parse(&two, 2).unwrap();
        assert_eq!((got[0].name.as_slice(), got[1].name.as_slice()), (&b"a"[..], &b"second"[..]));
        assert_eq!((got[1].granularity(), got[1].auto, got[1].in_use), (65536, true, false));
        assert_eq!((got[1].table_offset.get(), got[1].table_size), (0x30000, 7));
        assert_eq!((got[1].extra.as_slice(), got[1].extra_compatible), (&[0xee; 5][..], false));
        let again: Vec<u8> = got.iter().flat_map(|bitmap| bitmap.encode().unwrap()).collect();
        assert_eq!(again, two);
        assert_eq!(got[1].encoded_len(), got[1].encode().unwrap().len());
        for cut in 0..two.len() {
            assert!(parse(&two[..cut], 2).is_err(), "{cut}");
        }
        assert!(parse(&two, 1).is_err(), "bytes are left over");
        assert!(parse(&two, u32::MAX).is_err());
    }

    #[test]
    fn sizes_and_table_entries() {
        let bitmap = parse(&entry("a", 0), 1).unwrap().remove(0);
        let geometry = Geometry::new(16, false).unwrap();
        // 64 KiB of bits for each 64 KiB: 32 GiB in one cluster.
        for (size, bits, entries) in
            [(0, 0, 0), (1, 1, 1), (1 << 35, 1 << 19, 1), ((1 << 35) + 1, (1 << 19) + 1, 2)]
        {
            assert_eq!((bitmap.bits(size), bitmap.table_entries(size, geometry)), (bits, entries), "{size}");
        }
        for raw in [0, 1, 0x7_0000] {
            assert_eq!(BitmapCluster::decode(raw, geometry).unwrap().encode(), raw);
        }
        for raw in [2, 0x7_0001, 0x7_0200, 1 << 56] {
            assert!(BitmapCluster::decode(raw, geometry).is_err(), "{raw:#x}");
        }
        let long = Bitmap { name: vec![b'x'; MAX_BITMAP_NAME + 1], ..bitmap };
        assert!(long.encode().is_err());
    }

    #[test]
    fn refuses_what_is_out_of_range() {
        for (at, value) in [(16, 2), (17, 8), (17, 32), (20, 0xff)] {
            let mut bytes = entry("a", 0);
            bytes[at] = value;
            assert!(parse(&bytes, 1).is_err(), "byte {at} = {value}");
        }
    }
}
