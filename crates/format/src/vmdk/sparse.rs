//! The hosted sparse extent: header, grain directory, grain tables ("Hosted Sparse Extents" and
//! "Stream-Optimized Compressed Sparse Extents" of Virtual Disk Format 5.0).

use byteorder::{ByteOrder, LittleEndian as Le};

use super::{SECTOR_BYTES, prefix, sector_bytes};
use crate::{FormatError, Limits};

/// The first four bytes of a hosted sparse extent.
pub const MAGIC: &[u8; 4] = b"KDMV";
/// Where the header has its `uncleanShutdown` byte.
pub const UNCLEAN_SHUTDOWN_AT: u64 = 72;
/// Bytes of the header on disk.
pub const HEADER_BYTES: usize = 512;
/// `gdOffset` of a header whose grain directory is found through the footer.
pub const GD_AT_END: u64 = u64::MAX;
/// Entries of a grain table in every file VMware writes, and the most QEMU accepts.
pub const MAX_GTES_PER_GT: u32 = 512;
/// Grain size of every file VMware writes, in sectors (64 KiB).
pub const DEFAULT_GRAIN_SECTORS: u64 = 128;
/// Sectors that writers reserve for an embedded descriptor.
pub const DEFAULT_DESCRIPTOR_SECTORS: u64 = 20;

/// Flag bit 0: the four newline bytes are set and can be tested.
pub const FLAG_NEWLINE_TEST: u32 = 1 << 0;
/// Flag bit 1: a redundant grain directory stands at `rgd_offset`.
pub const FLAG_REDUNDANT_GD: u32 = 1 << 1;
/// Flag bit 2 (version ≥ 2): a grain table entry of 1 is a grain of zeros.
pub const FLAG_ZEROED_GRAIN: u32 = 1 << 2;
/// Flag bit 16: grains are compressed.
pub const FLAG_COMPRESSED: u32 = 1 << 16;
/// Flag bit 17: markers precede grains and metadata.
pub const FLAG_MARKERS: u32 = 1 << 17;
/// Flags a reader must know: a set bit outside [`FLAG_COMPRESSED`] and [`FLAG_MARKERS`] changes
/// the layout (`SPARSEFLAG_INCOMPAT_FLAGS` in VMware's open-vmdk).
const INCOMPATIBLE_FLAGS: u32 = 0xffff_0000;

/// `compressAlgorithm`: grains are stored plain.
pub const COMPRESSION_NONE: u16 = 0;
/// `compressAlgorithm`: zlib streams (RFC 1950), although the specification says RFC 1951.
pub const COMPRESSION_DEFLATE: u16 = 1;

/// What the newline bytes are in an undamaged file. A transfer in text mode changes them.
const NEWLINES: [u8; 4] = *b"\n \r\n";

/// The header of a hosted sparse extent; also the footer of a stream. Offsets and sizes are in
/// sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseHeader {
    /// 1; 2 adds zeroed grains; 3 is written for compressed streams and changed block tracking.
    pub version: u32,
    /// The `FLAG_*` bits, unknown compatible bits kept.
    pub flags: u32,
    /// Size of the guest data of this extent, in sectors.
    pub capacity: u64,
    /// Grain size in sectors.
    pub grain_sectors: u64,
    /// First sector of the embedded descriptor, 0 for none.
    pub descriptor_offset: u64,
    /// Sectors of the embedded descriptor.
    pub descriptor_sectors: u64,
    /// Entries of one grain table.
    pub gtes_per_gt: u32,
    /// First sector of the redundant grain directory; only with [`FLAG_REDUNDANT_GD`].
    pub rgd_offset: u64,
    /// First sector of the grain directory, or [`GD_AT_END`].
    pub gd_offset: u64,
    /// Sectors before the first grain.
    pub overhead: u64,
    /// Not zero: the file is open for writing, or its writer did not close it. QEMU neither sets
    /// nor reads it.
    pub unclean_shutdown: u8,
    /// `COMPRESSION_*`.
    pub compression: u16,
}

impl SparseHeader {
    /// Reads the header (or footer) from its sector.
    ///
    /// # Errors
    /// `NotThisFormat` for another magic; `Corrupt` when cut off, when the newline bytes are
    /// damaged, or when capacity and grain size are impossible; `Unsupported` for a version above
    /// 3, an unknown incompatible flag or an unknown compression.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "sparse extent header";
        let b: &[u8; HEADER_BYTES] = prefix(bytes, WHAT)?;
        if b.starts_with(b"kdmv") {
            return Err(FormatError::corrupt(
                WHAT,
                "the magic is `kdmv`: the program that wrote this file was stopped before it had finished",
            ));
        }
        if !b.starts_with(MAGIC) {
            return Err(FormatError::not_this_format(WHAT, "no KDMV magic"));
        }
        let header = Self {
            version: Le::read_u32(&b[4..]),
            flags: Le::read_u32(&b[8..]),
            capacity: Le::read_u64(&b[12..]),
            grain_sectors: Le::read_u64(&b[20..]),
            descriptor_offset: Le::read_u64(&b[28..]),
            descriptor_sectors: Le::read_u64(&b[36..]),
            gtes_per_gt: Le::read_u32(&b[44..]),
            rgd_offset: Le::read_u64(&b[48..]),
            gd_offset: Le::read_u64(&b[56..]),
            overhead: Le::read_u64(&b[64..]),
            unclean_shutdown: b[UNCLEAN_SHUTDOWN_AT as usize],
            compression: Le::read_u16(&b[77..]),
        };
        if !(1..=3).contains(&header.version) {
            return Err(FormatError::unsupported(
                WHAT,
                format!("version {}, known are 1 to 3", header.version),
            ));
        }
        let unknown = header.flags & INCOMPATIBLE_FLAGS & !(FLAG_COMPRESSED | FLAG_MARKERS);
        if unknown != 0 {
            return Err(FormatError::unsupported(
                WHAT,
                format!("unknown incompatible flags {unknown:#010x}"),
            ));
        }
        if header.flags & FLAG_NEWLINE_TEST != 0 && b[73..77] != NEWLINES {
            return Err(FormatError::corrupt(
                WHAT,
                format!(
                    "the newline test bytes are {:02x?} instead of {NEWLINES:02x?}: the file was changed by a \
                     transfer in text mode; transfer it again in binary mode",
                    &b[73..77]
                ),
            ));
        }
        if header.compression > COMPRESSION_DEFLATE {
            return Err(FormatError::unsupported(
                WHAT,
                format!("compression algorithm {}", header.compression),
            ));
        }
        sector_bytes(header.capacity, WHAT)?;
        Ok(header)
    }

    /// The header as its sector on disk.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[..4].copy_from_slice(MAGIC);
        Le::write_u32(&mut b[4..], self.version);
        Le::write_u32(&mut b[8..], self.flags);
        Le::write_u64(&mut b[12..], self.capacity);
        Le::write_u64(&mut b[20..], self.grain_sectors);
        Le::write_u64(&mut b[28..], self.descriptor_offset);
        Le::write_u64(&mut b[36..], self.descriptor_sectors);
        Le::write_u32(&mut b[44..], self.gtes_per_gt);
        Le::write_u64(&mut b[48..], self.rgd_offset);
        Le::write_u64(&mut b[56..], self.gd_offset);
        Le::write_u64(&mut b[64..], self.overhead);
        b[UNCLEAN_SHUTDOWN_AT as usize] = self.unclean_shutdown;
        b[73..77].copy_from_slice(&NEWLINES);
        Le::write_u16(&mut b[77..], self.compression);
        b
    }

    /// The header of a streamOptimized file written front to back: version 3, markers, directory
    /// at the end. `overhead` is 128, as VMware's and VirtualBox's exports have it, so that the
    /// first grain begins at 64 KiB. The footer is the same header with the real `gd_offset`.
    #[must_use]
    pub fn stream_optimized(capacity: u64) -> Self {
        Self {
            version: 3,
            flags: FLAG_NEWLINE_TEST | FLAG_COMPRESSED | FLAG_MARKERS,
            capacity,
            grain_sectors: DEFAULT_GRAIN_SECTORS,
            descriptor_offset: 1,
            descriptor_sectors: DEFAULT_DESCRIPTOR_SECTORS,
            gtes_per_gt: MAX_GTES_PER_GT,
            rgd_offset: 0,
            gd_offset: GD_AT_END,
            overhead: 128,
            unclean_shutdown: 0,
            compression: COMPRESSION_DEFLATE,
        }
    }

    /// Whether grains are compressed: the flag or the algorithm says so. (QEMU looks at the
    /// algorithm only, VMware at the flag; [`doubts`](Self::doubts) tells when they disagree.)
    #[must_use]
    pub fn compressed(&self) -> bool {
        self.flags & FLAG_COMPRESSED != 0 || self.compression == COMPRESSION_DEFLATE
    }

    /// Whether markers precede grains and metadata.
    #[must_use]
    pub fn markers(&self) -> bool {
        self.flags & FLAG_MARKERS != 0
    }

    /// Whether a grain table entry of 1 means a grain of zeros. As in QEMU the flag alone decides.
    #[must_use]
    pub fn zeroed_grains(&self) -> bool {
        self.flags & FLAG_ZEROED_GRAIN != 0
    }

    /// Whether the grain directory must be looked up in the footer.
    #[must_use]
    pub fn directory_in_footer(&self) -> bool {
        self.gd_offset == GD_AT_END
    }

    /// Byte offset of the redundant grain directory, if the header has one.
    ///
    /// # Errors
    /// `Corrupt` when the offset lies beyond 2^63.
    pub fn redundant_directory(&self) -> Result<Option<u64>, FormatError> {
        if self.flags & FLAG_REDUNDANT_GD == 0 || self.rgd_offset == 0 {
            return Ok(None);
        }
        sector_bytes(self.rgd_offset, "redundant grain directory").map(Some)
    }

    /// Byte offset and length of the room for an embedded descriptor, if there is any. The text
    /// ends at the first NUL; QEMU leaves the room empty in the extents of a split disk.
    ///
    /// # Errors
    /// `Limit` above [`Limits::vmdk_descriptor_bytes`]; `Corrupt` beyond 2^63.
    pub fn descriptor(&self, limits: &Limits) -> Result<Option<(u64, u64)>, FormatError> {
        const WHAT: &str = "embedded descriptor";
        if self.descriptor_offset == 0 || self.descriptor_sectors == 0 {
            return Ok(None);
        }
        let offset = sector_bytes(self.descriptor_offset, WHAT)?;
        let len = sector_bytes(self.descriptor_sectors, WHAT)?;
        if len > limits.vmdk_descriptor_bytes {
            let max = limits.vmdk_descriptor_bytes;
            return Err(FormatError::limit(WHAT, format!("{len} bytes, the limit is {max}")).at(offset));
        }
        Ok(Some((offset, len)))
    }

    /// The sizes that follow from the header, checked.
    ///
    /// # Errors
    /// `Corrupt` for a grain or table size of zero or a size beyond 2^63; `Unsupported` above
    /// [`MAX_GTES_PER_GT`]; `Limit` above [`Limits::vmdk_grain_bytes`] or
    /// [`Limits::vmdk_directory_entries`].
    pub fn geometry(&self, limits: &Limits) -> Result<SparseGeometry, FormatError> {
        const WHAT: &str = "sparse extent header";
        if self.gtes_per_gt > MAX_GTES_PER_GT {
            let n = self.gtes_per_gt;
            return Err(FormatError::unsupported(
                WHAT,
                format!("{n} entries per grain table, 512 is the most"),
            ));
        }
        SparseGeometry::new(WHAT, self.capacity, self.grain_sectors, u64::from(self.gtes_per_gt), 4, limits)
    }

    /// What the header says that no writer should say, in words; empty for a sound header. None of
    /// it keeps the file from being read.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        let mut doubt = |yes: bool, text: &str| yes.then(|| doubts.push(text.to_owned()));
        doubt(
            (self.flags & FLAG_COMPRESSED != 0) != (self.compression == COMPRESSION_DEFLATE),
            "the compressed flag and the compression algorithm disagree; grains are taken as compressed",
        );
        doubt(self.markers() && !self.compressed(), "markers without compression");
        doubt(self.zeroed_grains() && self.version < 2, "zeroed grains in a version 1 header");
        doubt(
            self.grain_sectors < 8 || !self.grain_sectors.is_power_of_two(),
            "the grain size is not a power of two of at least 8 sectors",
        );
        doubt(self.unclean_shutdown != 0, "the file was not closed cleanly");
        doubts
    }
}

/// The sizes of a two-level grain map: directory → tables → grains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseGeometry {
    /// Guest bytes of the extent.
    pub capacity_bytes: u64,
    /// Bytes of a grain.
    pub grain_bytes: u64,
    /// Entries of one grain table.
    pub table_entries: u64,
    /// Bytes of one grain table on disk, whole sectors.
    pub table_bytes: u64,
    /// Guest bytes that one grain table covers.
    pub table_coverage: u64,
    /// Grain tables, which is also the entries in use of the grain directory.
    pub tables: u64,
    /// Bytes of the grain directory on disk, whole sectors.
    pub directory_bytes: u64,
}

impl SparseGeometry {
    /// Checks and multiplies out; `entry_bytes` is 4, for seSparse 8.
    pub(crate) fn new(
        what: &str,
        capacity: u64,
        grain_sectors: u64,
        table_entries: u64,
        entry_bytes: u64,
        limits: &Limits,
    ) -> Result<Self, FormatError> {
        if grain_sectors == 0 || table_entries == 0 {
            return Err(FormatError::corrupt(
                what,
                format!(
                    "grains of {grain_sectors} sectors, {table_entries} entries per grain table: neither may be 0"
                ),
            ));
        }
        let capacity_bytes = sector_bytes(capacity, what)?;
        let grain_bytes = sector_bytes(grain_sectors, what)?;
        if grain_bytes > limits.vmdk_grain_bytes {
            let max = limits.vmdk_grain_bytes;
            return Err(FormatError::limit(
                what,
                format!("grains of {grain_bytes} bytes, the limit is {max}"),
            ));
        }
        let too_large = || FormatError::corrupt(what, "a grain table covers more than 2^64 bytes");
        let table_coverage = grain_bytes.checked_mul(table_entries).ok_or_else(too_large)?;
        let table_bytes = table_entries
            .checked_mul(entry_bytes)
            .and_then(|bytes| bytes.checked_next_multiple_of(SECTOR_BYTES))
            .ok_or_else(too_large)?;
        let tables = capacity_bytes.div_ceil(table_coverage);
        if tables > limits.vmdk_directory_entries {
            let max = limits.vmdk_directory_entries;
            return Err(FormatError::limit(
                what,
                format!("{tables} grain directory entries, the limit is {max}"),
            ));
        }
        let directory_bytes = tables
            .checked_mul(entry_bytes)
            .and_then(|bytes| bytes.checked_next_multiple_of(SECTOR_BYTES))
            .ok_or_else(too_large)?;
        Ok(Self {
            capacity_bytes,
            grain_bytes,
            table_entries,
            table_bytes,
            table_coverage,
            tables,
            directory_bytes,
        })
    }

    /// Where the guest byte `at` is mapped: directory index, table index, offset in the grain.
    /// `None` at and beyond the capacity.
    #[must_use]
    pub fn locate(&self, at: u64) -> Option<(u64, u64, u64)> {
        let table = at / self.table_coverage;
        let in_table = at % self.table_coverage;
        (at < self.capacity_bytes).then(|| (table, in_table / self.grain_bytes, in_table % self.grain_bytes))
    }

    /// Guest bytes of grain number `grain` (the last one may be short), 0 beyond the capacity.
    #[must_use]
    pub fn grain_len(&self, grain: u64) -> u64 {
        let start = grain.saturating_mul(self.grain_bytes);
        self.capacity_bytes.saturating_sub(start).min(self.grain_bytes)
    }
}

/// One entry of a grain table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrainEntry {
    /// 0: from the parent, or zeros without one.
    Unallocated,
    /// 1 where the header has [`FLAG_ZEROED_GRAIN`]: zeros, whatever the parent holds.
    Zero,
    /// The first sector of the grain (of its marker in a stream) in this file.
    Sector(u32),
}

impl GrainEntry {
    /// Decodes an entry; `zeroed_grains` as [`SparseHeader::zeroed_grains`] says.
    #[must_use]
    pub fn new(raw: u32, zeroed_grains: bool) -> Self {
        match raw {
            0 => Self::Unallocated,
            1 if zeroed_grains => Self::Zero,
            sector => Self::Sector(sector),
        }
    }
}

/// The entries of a grain directory or grain table; a rest of less than four bytes is left out.
pub fn table_entries(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(Le::read_u32)
}

/// A grain directory or grain table as its bytes on disk, padded with zeros to whole sectors.
#[must_use]
pub fn encode_table(entries: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(HEADER_BYTES), 0);
    bytes
}

/// Where the metadata of a new monolithicSparse or split sparse extent lies, as VMware and QEMU
/// lay it out: header, descriptor, redundant directory and tables, directory and tables, grains
/// from the next grain boundary. Offsets are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseLayout {
    /// The header to write.
    pub header: SparseHeader,
    /// Its sizes.
    pub geometry: SparseGeometry,
    /// First sector of the redundant grain tables.
    pub redundant_tables: u32,
    /// First sector of the grain tables.
    pub tables: u32,
}

impl SparseLayout {
    /// The layout for `capacity` sectors. `descriptor_sectors` is the room for an embedded
    /// descriptor: [`DEFAULT_DESCRIPTOR_SECTORS`] for monolithicSparse, 0 for an extent of a split
    /// disk. `zeroed_grains` makes it version 2 with zeroed grains.
    ///
    /// # Errors
    /// `Limit` as [`SparseHeader::geometry`], or where the first grain's sector would not fit 32
    /// bits. The capacity itself may be larger (as in QEMU): whoever adds grains has to see to it
    /// that they begin below 2^32 sectors of the file.
    pub fn new(
        capacity: u64,
        descriptor_sectors: u64,
        zeroed_grains: bool,
        limits: &Limits,
    ) -> Result<Self, FormatError> {
        const WHAT: &str = "sparse extent layout";
        let zeroed = if zeroed_grains { FLAG_ZEROED_GRAIN } else { 0 };
        let mut header = SparseHeader {
            version: if zeroed_grains { 2 } else { 1 },
            flags: FLAG_NEWLINE_TEST | FLAG_REDUNDANT_GD | zeroed,
            descriptor_offset: u64::from(descriptor_sectors != 0),
            descriptor_sectors,
            compression: COMPRESSION_NONE,
            ..SparseHeader::stream_optimized(capacity)
        };
        header.descriptor(limits)?;
        header.rgd_offset = descriptor_sectors.saturating_add(1);
        let geometry = header.geometry(limits)?;
        let too_large = || {
            FormatError::limit(
                WHAT,
                format!("the tables of {capacity} sectors need more than 2^32 sectors of the file"),
            )
        };
        let directory = geometry.directory_bytes / SECTOR_BYTES;
        let all_tables =
            (geometry.table_bytes / SECTOR_BYTES).checked_mul(geometry.tables).ok_or_else(too_large)?;
        let redundant_tables = header.rgd_offset.checked_add(directory).ok_or_else(too_large)?;
        header.gd_offset = redundant_tables.checked_add(all_tables).ok_or_else(too_large)?;
        let tables = header.gd_offset.checked_add(directory).ok_or_else(too_large)?;
        let metadata = tables.checked_add(all_tables).ok_or_else(too_large)?;
        header.overhead = metadata.checked_next_multiple_of(header.grain_sectors).ok_or_else(too_large)?;
        u32::try_from(header.overhead).map_err(|_| too_large())?;
        Ok(Self {
            header,
            geometry,
            redundant_tables: u32::try_from(redundant_tables).map_err(|_| too_large())?,
            tables: u32::try_from(tables).map_err(|_| too_large())?,
        })
    }

    /// The grain directory (or the redundant one, given [`redundant_tables`](Self::redundant_tables))
    /// whose tables follow each other from sector `first`, as its bytes on disk.
    #[must_use]
    pub fn directory(&self, first: u32) -> Vec<u8> {
        let step = u32::try_from(self.geometry.table_bytes / SECTOR_BYTES).unwrap_or(u32::MAX);
        let tables = u32::try_from(self.geometry.tables).unwrap_or(u32::MAX);
        // `new` has checked that the last table ends below 2^32.
        let entries: Vec<u32> = (0..tables).map(|i| first.saturating_add(i.saturating_mul(step))).collect();
        encode_table(&entries)
    }
}

#[cfg(test)]
#[path = "sparse_tests.rs"]
mod tests;
