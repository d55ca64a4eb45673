//! The seSparse extent of ESXi snapshots (VMFS 6, or disks above 2 TiB).
//!
//! VMware has published nothing; the names are those ESXi logs, the rules are what QEMU 10
//! accepts. Everything outside of them is refused, as the meaning would be a guess.

use byteorder::{ByteOrder, LittleEndian as Le};

use super::sparse::{HEADER_BYTES, SparseGeometry};
use super::{SECTOR_BYTES, prefix, sector_bytes};
use crate::{FormatError, Limits};

/// Magic of the constant header, the first eight bytes of the file.
pub const CONST_MAGIC: u64 = 0x0000_0000_cafe_babe;
/// Magic of the volatile header.
pub const VOLATILE_MAGIC: u64 = 0x0000_0000_cafe_cafe;
/// The only known version, 2.1.
pub const VERSION: u64 = 0x0000_0002_0000_0001;
/// Grain size in sectors.
pub const GRAIN_SECTORS: u64 = 8;
/// Size of a grain table in sectors: 4096 entries of eight bytes.
pub const TABLE_SECTORS: u64 = 64;
const TABLE_ENTRIES: u64 = TABLE_SECTORS * SECTOR_BYTES / 8;

/// An area of the file, in sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Area {
    /// First sector.
    pub offset: u64,
    /// Number of sectors.
    pub sectors: u64,
}

/// The constant header, sector 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeSparseHeader {
    /// Size of the guest data, in sectors.
    pub capacity: u64,
    /// The [`SeSparseVolatileHeader`].
    pub volatile_header: Area,
    /// The header of the journal.
    pub journal_header: Area,
    /// The journal.
    pub journal: Area,
    /// The grain directory.
    pub grain_directory: Area,
    /// The grain tables.
    pub grain_tables: Area,
    /// Bitmap of free grains.
    pub free_bitmap: Area,
    /// Map from grain to guest block.
    pub backmap: Area,
    /// The grains.
    pub grains: Area,
}

impl SeSparseHeader {
    /// Reads the constant header from its sector.
    ///
    /// # Errors
    /// `NotThisFormat` for another magic; `Corrupt` when cut off or an area lies beyond 2^63;
    /// `Unsupported` for another version, grain or table size, a flag, a reserved field or padding
    /// that is not zero.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "seSparse constant header";
        let b: &[u8; HEADER_BYTES] = prefix(bytes, WHAT)?;
        let field = |index: usize| b.get(index * 8..).map_or(0, Le::read_u64);
        if field(0) != CONST_MAGIC {
            return Err(FormatError::not_this_format(WHAT, "no seSparse magic"));
        }
        for (index, name, known) in [
            (1, "version", VERSION),
            (3, "grain size", GRAIN_SECTORS),
            (4, "grain table size", TABLE_SECTORS),
            (5, "flags", 0),
            (6, "reserved field 1", 0),
            (7, "reserved field 2", 0),
            (8, "reserved field 3", 0),
            (9, "reserved field 4", 0),
        ] {
            let value = field(index);
            if value != known {
                return Err(FormatError::unsupported(
                    WHAT,
                    format!("{name} {value:#x}, known is {known:#x}"),
                ));
            }
        }
        if b[26 * 8..].iter().any(|&byte| byte != 0) {
            return Err(FormatError::unsupported(WHAT, "the padding is not zero"));
        }
        sector_bytes(field(2), WHAT)?;
        let area = |index: usize| -> Result<Area, FormatError> {
            let area = Area { offset: field(index), sectors: field(index + 1) };
            let end = area.offset.saturating_add(area.sectors);
            sector_bytes(end, WHAT).map(|_| area)
        };
        Ok(Self {
            capacity: field(2),
            volatile_header: area(10)?,
            journal_header: area(12)?,
            journal: area(14)?,
            grain_directory: area(16)?,
            grain_tables: area(18)?,
            free_bitmap: area(20)?,
            backmap: area(22)?,
            grains: area(24)?,
        })
    }

    /// The constant header as its sector on disk.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        let head = [CONST_MAGIC, VERSION, self.capacity, GRAIN_SECTORS, TABLE_SECTORS, 0, 0, 0, 0, 0];
        let areas = [
            self.volatile_header,
            self.journal_header,
            self.journal,
            self.grain_directory,
            self.grain_tables,
            self.free_bitmap,
            self.backmap,
            self.grains,
        ];
        let fields = head.into_iter().chain(areas.into_iter().flat_map(|area| [area.offset, area.sectors]));
        for (place, field) in b.chunks_exact_mut(8).zip(fields) {
            Le::write_u64(place, field);
        }
        b
    }

    /// The sizes that follow from the header, checked. `directory_bytes` is what the capacity
    /// needs; the area on disk may be larger.
    ///
    /// # Errors
    /// `Corrupt` when the directory is too small for the capacity; `Limit` above
    /// [`Limits::vmdk_directory_entries`].
    pub fn geometry(&self, limits: &Limits) -> Result<SparseGeometry, FormatError> {
        const WHAT: &str = "seSparse constant header";
        let geometry = SparseGeometry::new(WHAT, self.capacity, GRAIN_SECTORS, TABLE_ENTRIES, 8, limits)?;
        if sector_bytes(self.grain_directory.sectors, WHAT)? < geometry.directory_bytes {
            return Err(FormatError::corrupt(
                WHAT,
                format!(
                    "the grain directory has {} sectors, the capacity needs {}",
                    self.grain_directory.sectors,
                    geometry.directory_bytes / SECTOR_BYTES
                ),
            ));
        }
        Ok(geometry)
    }

    /// Decodes a grain directory entry: the byte offset of the grain table, or `None` for a table
    /// that is not allocated.
    ///
    /// An allocated entry has `0x1000_0000` in its upper half; the lower half counts tables from
    /// the start of [`grain_tables`](Self::grain_tables).
    ///
    /// # Errors
    /// `Corrupt` for another upper half or a table beyond 2^63.
    pub fn table_offset(&self, entry: u64) -> Result<Option<u64>, FormatError> {
        const WHAT: &str = "seSparse grain directory entry";
        if entry == 0 {
            return Ok(None);
        }
        if entry >> 32 != 0x1000_0000 {
            return Err(FormatError::corrupt(WHAT, format!("{entry:#018x} is of no known type")));
        }
        let index = entry & 0xffff_ffff;
        let sector = index
            .checked_mul(TABLE_SECTORS)
            .and_then(|sectors| sectors.checked_add(self.grain_tables.offset))
            .unwrap_or(u64::MAX);
        sector_bytes(sector, WHAT).map(Some)
    }

    /// Decodes a grain table entry.
    ///
    /// The uppermost four bits are the type. The grain number of an allocated grain is stored
    /// rotated: its low 12 bits are bits 48–59 of the entry, its high 48 bits are bits 0–47. It
    /// counts grains from the start of [`grains`](Self::grains).
    ///
    /// # Errors
    /// `Corrupt` for an unknown type, an unallocated entry that is not all zero, or a grain beyond
    /// 2^63.
    pub fn grain(&self, entry: u64) -> Result<SeGrain, FormatError> {
        const WHAT: &str = "seSparse grain table entry";
        match entry >> 60 {
            0 if entry == 0 => Ok(SeGrain::Unallocated),
            1 => Ok(SeGrain::Unmapped),
            2 => Ok(SeGrain::Zero),
            3 => {
                let low = (entry >> 48) & 0xfff;
                let number = low | ((entry & 0xffff_ffff_ffff) << 12);
                let sector = number
                    .checked_mul(GRAIN_SECTORS)
                    .and_then(|sectors| sectors.checked_add(self.grains.offset))
                    .unwrap_or(u64::MAX);
                sector_bytes(sector, WHAT).map(SeGrain::Allocated)
            }
            _ => Err(FormatError::corrupt(WHAT, format!("{entry:#018x} is of no known type"))),
        }
    }
}

/// What a grain table entry of a seSparse extent says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SeGrain {
    /// From the parent, or zeros without one.
    Unallocated,
    /// The guest has unmapped (trimmed) it: zeros, whatever the parent holds.
    Unmapped,
    /// Zeros, whatever the parent holds.
    Zero,
    /// The byte offset of the grain in this file.
    Allocated(u64),
}

/// The entries of a grain directory or grain table; a rest of less than eight bytes is left out.
pub fn table_entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(Le::read_u64)
}

/// The volatile header: the state of the journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeSparseVolatileHeader {
    /// The next free grain table.
    pub free_table: u64,
    /// The next transaction number.
    pub next_transaction: u64,
    /// Not zero: the journal has to be replayed before the tables hold.
    pub replay_journal: u64,
}

impl SeSparseVolatileHeader {
    /// Reads the volatile header from its sector.
    ///
    /// # Errors
    /// `Corrupt` for another magic or when cut off; `Unsupported` when the journal is dirty or the
    /// padding is not zero.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "seSparse volatile header";
        let b: &[u8; HEADER_BYTES] = prefix(bytes, WHAT)?;
        if Le::read_u64(&b[0..]) != VOLATILE_MAGIC {
            return Err(FormatError::corrupt(WHAT, "no volatile header magic"));
        }
        let header = Self {
            free_table: Le::read_u64(&b[8..]),
            next_transaction: Le::read_u64(&b[16..]),
            replay_journal: Le::read_u64(&b[24..]),
        };
        if header.replay_journal != 0 {
            return Err(FormatError::unsupported(
                WHAT,
                "the journal is dirty and replaying it is not supported: open and close the disk on ESXi first",
            ));
        }
        if b[32..].iter().any(|&byte| byte != 0) {
            return Err(FormatError::unsupported(WHAT, "the padding is not zero"));
        }
        Ok(header)
    }

    /// The volatile header as its sector on disk.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        let fields = [VOLATILE_MAGIC, self.free_table, self.next_transaction, self.replay_journal];
        for (place, field) in b.chunks_exact_mut(8).zip(fields) {
            Le::write_u64(place, field);
        }
        b
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;
    use proptest::prelude::*;

    fn header() -> SeSparseHeader {
        let area = |offset, sectors| Area { offset, sectors };
        SeSparseHeader {
            capacity: 1 << 21,
            volatile_header: area(1, 1),
            journal_header: area(2, 2),
            journal: area(2048, 2048),
            grain_directory: area(4096, 8),
            grain_tables: area(6144, 4096),
            free_bitmap: area(10_240, 8),
            backmap: area(10_248, 8),
            grains: area(12_288, 1 << 21),
        }
    }

    #[test]
    fn headers_round_trip() {
        let bytes = header().encode();
        assert_eq!(bytes[..16], *b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0");
        assert_eq!(SeSparseHeader::parse(&bytes).unwrap(), header());
        let geometry = header().geometry(&Limits::default()).unwrap();
        assert_eq!((geometry.tables, geometry.table_bytes, geometry.grain_bytes), (64, 32_768, 4096));
        let volatile = SeSparseVolatileHeader { free_table: 3, next_transaction: 9, replay_journal: 0 };
        assert_eq!(SeSparseVolatileHeader::parse(&volatile.encode()).unwrap(), volatile);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for at in [8, 12, 24, 32, 40, 48, 72, 208, 511] {
            let mut bytes = header().encode();
            bytes[at] ^= 0x40;
            assert_eq!(SeSparseHeader::parse(&bytes).unwrap_err().problem, Problem::Unsupported, "byte {at}");
        }
        let mut bytes = header().encode();
        bytes[87] = 0xff;
        assert_eq!(SeSparseHeader::parse(&bytes).unwrap_err().problem, Problem::Corrupt);
        let small = SeSparseHeader { grain_directory: Area::default(), ..header() };
        assert_eq!(small.geometry(&Limits::default()).unwrap_err().problem, Problem::Corrupt);
        let dirty = SeSparseVolatileHeader { free_table: 0, next_transaction: 0, replay_journal: 1 }.encode();
        let error = SeSparseVolatileHeader::parse(&dirty).unwrap_err();
        assert_eq!(error.problem, Problem::Unsupported);
        assert!(error.message.contains("journal"));
        assert_eq!(SeSparseVolatileHeader::parse(&[0; 512]).unwrap_err().problem, Problem::Corrupt);
    }

    #[test]
    fn entries_are_decoded() {
        let header = header();
        assert_eq!(header.table_offset(0).unwrap(), None);
        assert_eq!(header.table_offset(0x1000_0000_0000_0002).unwrap(), Some((6144 + 128) * 512));
        assert!(header.table_offset(2).is_err());
        assert!(header.table_offset(0x1000_0001_0000_0000).is_err());
        assert_eq!(header.grain(0).unwrap(), SeGrain::Unallocated);
        assert!(header.grain(1).is_err());
        assert_eq!(header.grain(0x1000_0000_0000_0000).unwrap(), SeGrain::Unmapped);
        assert_eq!(header.grain(0x2000_0000_0000_0007).unwrap(), SeGrain::Zero);
        // Grain 0x3_abc: the low twelve bits abc come first, the rest, 3, at the bottom.
        let at = (12_288 + 0x3abc * 8) * 512;
        assert_eq!(header.grain(0x3abc_0000_0000_0003).unwrap(), SeGrain::Allocated(at));
        assert!(header.grain(0x3fff_ffff_ffff_ffff).is_err());
        assert!(header.grain(0x4000_0000_0000_0000).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(tail in proptest::collection::vec(any::<u64>(), 16), entry: u64) {
            let mut bytes = header().encode();
            for (place, value) in bytes[80..].chunks_exact_mut(8).zip(&tail) {
                place.copy_from_slice(&(value >> 10).to_le_bytes());
            }
            if let Ok(header) = SeSparseHeader::parse(&bytes) {
                let _ = (header.geometry(&Limits::default()), header.table_offset(entry), header.grain(entry));
            }
            let _ = SeSparseVolatileHeader::parse(&bytes);
        }
    }
}
