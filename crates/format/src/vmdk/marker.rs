//! Markers of streamOptimized extents and the footer ("Stream-Optimized Compressed Sparse
//! Extents" of Virtual Disk Format 5.0).
//!
//! A stream is: header, descriptor, then from sector `overhead` on units that begin at sector
//! boundaries: grains (marker and zlib stream in one), grain tables, the grain directory, the
//! footer, and the end-of-stream marker as the last sector.

use byteorder::{ByteOrder, LittleEndian as Le};

use super::sparse::{HEADER_BYTES, MAGIC, SparseHeader};
use super::{SECTOR_BYTES, prefix};
use crate::FormatError;

/// Bytes of a grain marker; the zlib stream follows at once.
pub const GRAIN_MARKER_BYTES: u64 = 12;
/// Bytes of the footer marker, the footer and the end-of-stream marker at the end of a stream.
pub const FOOTER_BYTES: u64 = 3 * SECTOR_BYTES;

/// What stands at a sector boundary of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marker {
    /// A compressed grain.
    Grain {
        /// First guest sector of the grain within the extent.
        lba: u64,
        /// Bytes of the zlib stream that follows the marker, never 0.
        size: u32,
    },
    /// End of the stream: a sector of zeros.
    EndOfStream,
    /// A grain table follows in the next sector.
    GrainTable {
        /// Sectors of the table.
        sectors: u64,
    },
    /// The grain directory follows in the next sector.
    GrainDirectory {
        /// Sectors of the directory.
        sectors: u64,
    },
    /// The footer follows in the next sector.
    Footer {
        /// Sectors of the footer, 1.
        sectors: u64,
    },
}

impl Marker {
    /// Reads the marker from (at least) the first 16 bytes of its sector.
    ///
    /// # Errors
    /// `Corrupt` when cut off or of an unknown type.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "stream marker";
        let b: &[u8; 16] = prefix(bytes, WHAT)?;
        let value = Le::read_u64(&b[0..]);
        match (Le::read_u32(&b[8..]), Le::read_u32(&b[12..])) {
            (0, 0) => Ok(Self::EndOfStream),
            (0, 1) => Ok(Self::GrainTable { sectors: value }),
            (0, 2) => Ok(Self::GrainDirectory { sectors: value }),
            (0, 3) => Ok(Self::Footer { sectors: value }),
            (0, kind) => Err(FormatError::corrupt(WHAT, format!("unknown marker type {kind}"))),
            (size, _) => Ok(Self::Grain { lba: value, size }),
        }
    }

    /// Bytes from the start of this marker to the next one: marker, payload and padding. `None`
    /// where that exceeds 2^64.
    #[must_use]
    pub fn span(&self) -> Option<u64> {
        match *self {
            Self::Grain { size, .. } => {
                (GRAIN_MARKER_BYTES + u64::from(size)).checked_next_multiple_of(SECTOR_BYTES)
            }
            Self::EndOfStream => Some(SECTOR_BYTES),
            Self::GrainTable { sectors } | Self::GrainDirectory { sectors } | Self::Footer { sectors } => {
                sectors.checked_add(1)?.checked_mul(SECTOR_BYTES)
            }
        }
    }

    /// Refuses a grain whose zlib stream is longer than twice the grain, QEMU's limit; charge this
    /// before a buffer is allocated for it. Other markers pass.
    ///
    /// # Errors
    /// `Limit`.
    pub fn check_size(&self, grain_bytes: u64) -> Result<(), FormatError> {
        match *self {
            Self::Grain { lba, size } if u64::from(size) > grain_bytes.saturating_mul(2) => {
                Err(FormatError::limit(
                    format!("grain marker of guest sector {lba}"),
                    format!("{size} compressed bytes, the limit is twice the grain of {grain_bytes} bytes"),
                ))
            }
            _ => Ok(()),
        }
    }

    /// A metadata marker as its sector on disk; for a grain the sector holds only the marker, use
    /// [`encode_grain`].
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        let (value, size, kind) = match *self {
            Self::Grain { lba, size } => (lba, size, 0),
            Self::EndOfStream => (0, 0, 0),
            Self::GrainTable { sectors } => (sectors, 0, 1),
            Self::GrainDirectory { sectors } => (sectors, 0, 2),
            Self::Footer { sectors } => (sectors, 0, 3),
        };
        Le::write_u64(&mut b[0..], value);
        Le::write_u32(&mut b[8..], size);
        Le::write_u32(&mut b[12..], kind);
        b
    }
}

/// The twelve bytes before the zlib stream (`size` bytes, not 0) of the grain at guest sector `lba`.
#[must_use]
pub fn encode_grain(lba: u64, size: u32) -> [u8; GRAIN_MARKER_BYTES as usize] {
    let mut b = [0; GRAIN_MARKER_BYTES as usize];
    Le::write_u64(&mut b[0..], lba);
    Le::write_u32(&mut b[8..], size);
    b
}

/// The end of a stream: footer marker, `footer` (the header with the real `gd_offset`),
/// end-of-stream marker.
#[must_use]
pub fn encode_footer(footer: &SparseHeader) -> [u8; FOOTER_BYTES as usize] {
    let mut b = [0; FOOTER_BYTES as usize];
    b[..HEADER_BYTES].copy_from_slice(&Marker::Footer { sectors: 1 }.encode());
    b[HEADER_BYTES..2 * HEADER_BYTES].copy_from_slice(&footer.encode());
    b
}

/// A footer found by [`find_footer`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Byte position of the footer itself within the bytes that were searched.
    pub position: usize,
    /// The header that holds.
    pub header: SparseHeader,
    /// What is not as the rule says, in words; empty for a sound file.
    pub doubts: Vec<String>,
}

/// Searches the last footer in `tail`, bytes that begin at a sector boundary and reach to the end
/// of the file.
///
/// QEMU takes the last 1536 bytes or refuses ("Invalid footer"). Files exist that were padded
/// after the end-of-stream marker, or lost it: a footer is also taken when a footer marker stands
/// right before it, and the difference is told in [`Footer::doubts`].
///
/// # Errors
/// `Corrupt` when there is none, or the error of [`SparseHeader::parse`].
pub fn find_footer(tail: &[u8]) -> Result<Footer, FormatError> {
    let whole = tail.len() - tail.len() % HEADER_BYTES;
    let sector = |at: usize| tail.get(at..at.checked_add(HEADER_BYTES)?);
    let position = (0..whole)
        .step_by(HEADER_BYTES)
        .rev()
        .find(|&at| {
            let before = at.checked_sub(HEADER_BYTES).and_then(sector);
            sector(at).is_some_and(|s| s.starts_with(MAGIC))
                && before.is_some_and(|s| matches!(Marker::parse(s), Ok(Marker::Footer { .. })))
        })
        .ok_or_else(|| {
            FormatError::corrupt(
                "footer",
                "the header refers to a footer and there is none: the file is cut off",
            )
        })?;
    let header = sector(position).map_or_else(|| SparseHeader::parse(&[]), SparseHeader::parse)?;
    let mut doubts = Vec::new();
    if header.directory_in_footer() {
        return Err(FormatError::corrupt("footer", "it does not say where the grain directory is"));
    }
    let rest = tail.get(position + HEADER_BYTES..).unwrap_or_default();
    if rest.len() != HEADER_BYTES {
        doubts.push(format!("{} bytes follow the footer instead of 512", rest.len()));
    }
    if rest.first_chunk::<16>() != Some(&[0; 16]) {
        doubts.push("no end-of-stream marker follows the footer".to_owned());
    }
    Ok(Footer { position, header, doubts })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;
    use proptest::prelude::*;

    fn footer() -> SparseHeader {
        SparseHeader { gd_offset: 138, ..SparseHeader::stream_optimized(8192) }
    }

    #[test]
    fn markers_are_told_apart() {
        // A grain marker with the start of its zlib stream, by open-vmdk.
        let grain = Marker::parse(b"\0\x01\0\0\0\0\0\0\xa2\x01\0\0\x78\xda\x01\x02").unwrap();
        assert_eq!(grain, Marker::Grain { lba: 256, size: 418 });
        assert_eq!(grain.span(), Some(512));
        assert_eq!(Marker::Grain { lba: 0, size: 501 }.span(), Some(1024));
        assert_eq!(Marker::parse(&[0; 16]).unwrap(), Marker::EndOfStream);
        let table = Marker::parse(b"\x04\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0").unwrap();
        assert_eq!((table, table.span()), (Marker::GrainTable { sectors: 4 }, Some(5 * 512)));
        assert_eq!(Marker::Footer { sectors: u64::MAX }.span(), None);
        assert_eq!(
            Marker::parse(b"\0\0\0\0\0\0\0\0\0\0\0\0\x09\0\0\0").unwrap_err().problem,
            Problem::Corrupt
        );
        assert!(Marker::parse(&[0; 15]).is_err());
    }

    #[test]
    fn a_grain_is_at_most_twice_its_size() {
        assert!(Marker::Grain { lba: 0, size: 131_072 }.check_size(65_536).is_ok());
        let error = Marker::Grain { lba: 0, size: 131_073 }.check_size(65_536).unwrap_err();
        assert_eq!(error.problem, Problem::Limit);
    }

    #[test]
    fn the_footer_is_found_at_the_end() {
        let bytes = encode_footer(&footer());
        assert_eq!(bytes.len() as u64, FOOTER_BYTES);
        let found = find_footer(&bytes).unwrap();
        assert_eq!((found.position, &found.header), (512, &footer()));
        assert!(found.doubts.is_empty());
    }

    #[test]
    fn damaged_ends_are_doubted() {
        let mut padded = vec![0; 512];
        padded.extend_from_slice(&encode_footer(&footer()));
        padded.extend_from_slice(&[0; 700]);
        let found = find_footer(&padded).unwrap();
        assert_eq!((found.position, found.doubts.len()), (1024, 1), "{:?}", found.doubts);
        let cut = &encode_footer(&footer())[..1024];
        assert_eq!(find_footer(cut).unwrap().doubts.len(), 2);
        assert_eq!(find_footer(&[0; 4096]).unwrap_err().problem, Problem::Corrupt);
        assert!(find_footer(&encode_footer(&SparseHeader::stream_optimized(8))).is_err());
    }

    proptest! {
        #[test]
        fn markers_round_trip(value: u64, size in 1u32.., kind in 0..4) {
            let marker = match kind {
                0 => Marker::Grain { lba: value, size },
                1 => Marker::GrainTable { sectors: value },
                2 => Marker::GrainDirectory { sectors: value },
                _ => Marker::Footer { sectors: value },
            };
            prop_assert_eq!(Marker::parse(&marker.encode()).unwrap(), marker);
            if let Marker::Grain { lba, size } = marker {
                prop_assert_eq!(&encode_grain(lba, size)[..], &marker.encode()[..12]);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            if let Ok(marker) = Marker::parse(&bytes) {
                let _ = (marker.span(), marker.check_size(65_536));
            }
            let _ = find_footer(&bytes);
        }
    }
}
