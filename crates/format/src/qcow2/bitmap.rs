use byteorder::{BigEndian, ByteOrder};

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
    /// log2 of the guest bytes that one bit stands for, 9 to 31.
    pub granularity_bits: u8,
}

impl Bitmap {
    /// Guest bytes that one bit stands for.
    #[must_use]
    pub const fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }
}

const FIXED: usize = 24;
/// QEMU's bounds.
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;

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
    if kind != 1 {
        return Err("its type is not 1 (dirty tracking), the only one there is");
    }
    if !GRANULARITY_BITS.contains(&granularity_bits) {
        return Err("its granularity is not from 2^9 to 2^31");
    }
    let name = rest.get(extra_len..).and_then(|rest| rest.get(..name_len)).ok_or(CUT)?;
    let len = (FIXED + name_len).checked_add(extra_len).and_then(|len| len.checked_next_multiple_of(8));
    let after = len.and_then(|len| bytes.get(len..)).ok_or(CUT)?;
    let bitmap = Bitmap {
        name: name.to_vec(),
        table_offset: HostOffset(BigEndian::read_u64(fixed)),
        table_size: BigEndian::read_u32(&fixed[8..]),
        in_use: flags & 1 != 0,
        auto: flags & 2 != 0,
        granularity_bits,
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
        for cut in 0..two.len() {
            assert!(parse(&two[..cut], 2).is_err(), "{cut}");
        }
        assert!(parse(&two, 1).is_err(), "bytes are left over");
        assert!(parse(&two, u32::MAX).is_err());
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
