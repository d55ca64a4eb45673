//! The COWD extent of vmfsSparse redo logs ("ESXi Host Sparse Extents" of Virtual Disk Format
//! 5.0; field offsets also in the libvmdk documentation).
//!
//! Directory and tables hold 32-bit sector numbers, read with
//! [`table_entries`](super::sparse::table_entries); 0 is unallocated, there are no zeroed grains.

use byteorder::{ByteOrder, LittleEndian as Le};

use super::sparse::SparseGeometry;
use super::{prefix, sector_bytes};
use crate::{FormatError, Limits};

/// The first four bytes of a COWD extent.
pub const MAGIC: &[u8; 4] = b"COWD";
/// Bytes of the header on disk.
pub const HEADER_BYTES: usize = 2048;
/// Entries of every grain table.
pub const GTES_PER_GT: u64 = 4096;

/// The header of a COWD extent. Offsets and sizes are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CowdHeader {
    /// Always 1. (Version 3 is the unrelated disk of Workstation 3.)
    pub version: u32,
    /// 3 in every known file; the meaning is not published.
    pub flags: u32,
    /// Size of the guest data of this extent, in sectors.
    pub capacity: u32,
    /// Grain size in sectors, usually 1.
    pub grain_sectors: u32,
    /// First sector of the grain directory, usually 4.
    pub gd_offset: u32,
    /// Entries of the grain directory.
    pub gd_entries: u32,
    /// The sector at which the writer would allocate next.
    pub next_free: u32,
    /// Cylinders, heads and sectors per track in a disk without a parent. In a child the parent's
    /// file name may begin at the same place; the descriptor is what names the parent.
    pub chs: [u32; 3],
    /// Not zero: the writer did not close the file. There is no journal; reading goes on.
    pub unclean_shutdown: u32,
}

impl CowdHeader {
    /// Reads the header from the first 2048 bytes of the file.
    ///
    /// # Errors
    /// `NotThisFormat` for another magic, `Corrupt` when cut off, `Unsupported` for another version.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        const WHAT: &str = "COWD header";
        if !bytes.starts_with(MAGIC) {
            return Err(FormatError::not_this_format(WHAT, "no COWD magic"));
        }
        let b: &[u8; HEADER_BYTES] = prefix(bytes, WHAT)?;
        let header = Self {
            version: Le::read_u32(&b[4..]),
            flags: Le::read_u32(&b[8..]),
            capacity: Le::read_u32(&b[12..]),
            grain_sectors: Le::read_u32(&b[16..]),
            gd_offset: Le::read_u32(&b[20..]),
            gd_entries: Le::read_u32(&b[24..]),
            next_free: Le::read_u32(&b[28..]),
            chs: [Le::read_u32(&b[32..]), Le::read_u32(&b[36..]), Le::read_u32(&b[40..])],
            unclean_shutdown: Le::read_u32(&b[1648..]),
        };
        match header.version {
            1 => Ok(header),
            3 => Err(FormatError::unsupported(WHAT, "version 3, a disk of VMware Workstation 3 or older")),
            version => Err(FormatError::unsupported(WHAT, format!("version {version}, known is 1"))),
        }
    }

    /// The header as its bytes on disk.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut b = [0; HEADER_BYTES];
        b[..4].copy_from_slice(MAGIC);
        let [cylinders, heads, sectors] = self.chs;
        let fields = [
            self.version,
            self.flags,
            self.capacity,
            self.grain_sectors,
            self.gd_offset,
            self.gd_entries,
            self.next_free,
            cylinders,
            heads,
            sectors,
        ];
        for (place, field) in b[4..].chunks_exact_mut(4).zip(fields) {
            Le::write_u32(place, field);
        }
        Le::write_u32(&mut b[1648..], self.unclean_shutdown);
        b
    }

    /// Byte offset of the grain directory.
    ///
    /// # Errors
    /// `Corrupt` when it is 0.
    pub fn directory_offset(&self) -> Result<u64, FormatError> {
        if self.gd_offset == 0 {
            return Err(FormatError::corrupt("COWD header", "no grain directory"));
        }
        sector_bytes(u64::from(self.gd_offset), "COWD grain directory")
    }

    /// The sizes that follow from the header, checked.
    ///
    /// # Errors
    /// `Corrupt` for a grain size of 0 or a directory with fewer entries than the capacity needs;
    /// `Limit` above [`Limits::vmdk_grain_bytes`] or [`Limits::vmdk_directory_entries`].
    pub fn geometry(&self, limits: &Limits) -> Result<SparseGeometry, FormatError> {
        const WHAT: &str = "COWD header";
        let geometry = SparseGeometry::new(
            WHAT,
            u64::from(self.capacity),
            u64::from(self.grain_sectors),
            GTES_PER_GT,
            4,
            limits,
        )?;
        if u64::from(self.gd_entries) < geometry.tables {
            return Err(FormatError::corrupt(
                WHAT,
                format!(
                    "{} grain directory entries, the capacity needs {}",
                    self.gd_entries, geometry.tables
                ),
            ));
        }
        Ok(geometry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Problem;
    use proptest::prelude::*;

    /// The header of a 4.5 GiB image made by DiscUtils, in the corpus.
    fn discutils() -> CowdHeader {
        CowdHeader {
            version: 1,
            flags: 3,
            capacity: 9_437_184,
            grain_sectors: 1,
            gd_offset: 4,
            gd_entries: 2304,
            next_free: 1782,
            chs: [0; 3],
            unclean_shutdown: 0,
        }
    }

    #[test]
    fn discutils_header_reads() {
        let mut bytes =
            b"COWD\x01\0\0\0\x03\0\0\0\0\0\x90\0\x01\0\0\0\x04\0\0\0\0\x09\0\0\xf6\x06\0\0".to_vec();
        bytes.resize(HEADER_BYTES, 0);
        let header = CowdHeader::parse(&bytes).unwrap();
        assert_eq!(header, discutils());
        assert_eq!(header.encode()[..], bytes[..]);
        let geometry = header.geometry(&Limits::default()).unwrap();
        assert_eq!((geometry.tables, geometry.directory_bytes, geometry.table_bytes), (2304, 9216, 16_384));
        assert_eq!(geometry.locate(512 * 4097), Some((1, 1, 0)));
        assert_eq!(header.directory_offset().unwrap(), 2048);
    }

    #[test]
    fn contradictions_are_refused() {
        let problem = |change: &dyn Fn(&mut CowdHeader)| {
            let mut header = discutils();
            change(&mut header);
            CowdHeader::parse(&header.encode())
                .and_then(|h| h.directory_offset().and_then(|_| h.geometry(&Limits::default())))
                .map_err(|error| error.problem)
        };
        assert!(problem(&|_| ()).is_ok());
        assert_eq!(problem(&|h| h.version = 3), Err(Problem::Unsupported));
        assert_eq!(problem(&|h| h.gd_entries = 2303), Err(Problem::Corrupt));
        assert_eq!(problem(&|h| h.grain_sectors = 0), Err(Problem::Corrupt));
        assert_eq!(problem(&|h| h.grain_sectors = u32::MAX), Err(Problem::Limit));
        assert_eq!(problem(&|h| h.gd_offset = 0), Err(Problem::Corrupt));
        assert_eq!(CowdHeader::parse(&discutils().encode()[..2047]).unwrap_err().problem, Problem::Corrupt);
        assert_eq!(CowdHeader::parse(b"KDMV").unwrap_err().problem, Problem::NotThisFormat);
    }

    proptest! {
        #[test]
        fn arbitrary_headers_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 2000..2100)) {
            bytes[..8].copy_from_slice(b"COWD\x01\0\0\0");
            if let Ok(header) = CowdHeader::parse(&bytes) {
                prop_assert_eq!(&CowdHeader::parse(&header.encode()).unwrap(), &header);
                let _ = (header.geometry(&Limits::default()), header.directory_offset());
            }
        }
    }
}
