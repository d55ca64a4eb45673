//! VMDK: descriptors, hosted sparse extents ("KDMV"), stream markers, COWD and seSparse.
//!
//! Sources: VMware "Virtual Disk Format 5.0" (technical note) for descriptors, hosted sparse
//! extents, markers and COWD; the observed behaviour of QEMU 10 and ESXi for seSparse, which has
//! no published specification. All integers on disk are little-endian.

mod builder;
pub mod cowd;
pub mod descriptor;
pub mod geometry;
pub mod marker;
pub mod sesparse;
pub mod sparse;

pub use builder::DescriptorBuilder;
pub use cowd::CowdHeader;
pub use descriptor::{CreateType, Descriptor, Extent, ExtentKind};
pub use geometry::{AdapterType, Chs};
pub use marker::Marker;
pub use sesparse::{SeSparseHeader, SeSparseVolatileHeader};
pub use sparse::{SparseGeometry, SparseHeader, SparseLayout};

use crate::FormatError;

/// Bytes of a sector; every VMDK structure counts in these.
pub const SECTOR_BYTES: u64 = 512;

/// Bytes from the start of a file that let [`probe`] recognise any VMDK file met so far,
/// descriptors that begin with a long licence comment included.
pub const PROBE_BYTES: usize = 64 << 10;

/// What the first bytes of a file say it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A hosted sparse extent, magic `KDMV`: monolithicSparse, one extent of a split disk, or
    /// streamOptimized.
    Sparse,
    /// A COWD extent (vmfsSparse), magic `COWD`.
    Cowd,
    /// A seSparse extent, constant header magic `0x00000000cafebabe`.
    SeSparse,
    /// A text descriptor.
    Descriptor,
}

/// Recognises a VMDK file by its first bytes, best [`PROBE_BYTES`] of them.
///
/// A text descriptor is one whose leading comments hold `# Disk DescriptorFile`, or whose first
/// line that is neither blank nor a comment is `version=` and a digit (QEMU knows only the latter).
#[must_use]
pub fn probe(bytes: &[u8]) -> Option<Kind> {
    if bytes.starts_with(sparse::MAGIC) {
        return Some(Kind::Sparse);
    }
    if bytes.starts_with(cowd::MAGIC) {
        return Some(Kind::Cowd);
    }
    if bytes.starts_with(&sesparse::CONST_MAGIC.to_le_bytes()) {
        return Some(Kind::SeSparse);
    }
    descriptor::looks_like(bytes).then_some(Kind::Descriptor)
}

/// `sectors` in bytes, or a corruption of `structure` when no file can be that long (2^63 − 1).
pub(crate) fn sector_bytes(sectors: u64, structure: &str) -> Result<u64, FormatError> {
    sectors
        .checked_mul(SECTOR_BYTES)
        .filter(|&bytes| i64::try_from(bytes).is_ok())
        .ok_or_else(|| FormatError::corrupt(structure, format!("{sectors} sectors exceed 2^63 bytes")))
}

/// The first `N` bytes of `bytes`, or the error that `structure` is cut off.
pub(crate) fn prefix<'a, const N: usize>(
    bytes: &'a [u8],
    structure: &str,
) -> Result<&'a [u8; N], FormatError> {
    bytes.first_chunk().ok_or_else(|| {
        FormatError::corrupt(
            structure,
            format!("{} bytes where {N} are needed: the file is cut off", bytes.len()),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn each_kind_is_recognised() {
        assert_eq!(probe(b"KDMV\x01\0\0\0"), Some(Kind::Sparse));
        assert_eq!(probe(b"COWD\x01\0\0\0"), Some(Kind::Cowd));
        assert_eq!(probe(b"\xbe\xba\xfe\xca\0\0\0\0\x01"), Some(Kind::SeSparse));
        assert_eq!(probe(b"# Disk DescriptorFile\nversion=1\n"), Some(Kind::Descriptor));
        assert_eq!(probe(b"\xca\xfe\xba\xbe\0\0\0\x34"), None, "a Java class");
        assert_eq!(probe(b"QFI\xfb"), None);
        assert_eq!(probe(b""), None);
    }

    #[test]
    fn a_descriptor_may_begin_with_anything_harmless() {
        assert_eq!(probe(b"\r\n  \t\r\nversion=1\r\nCID=1"), Some(Kind::Descriptor));
        assert_eq!(probe(b"Version = 3\n"), Some(Kind::Descriptor));
        assert_eq!(probe(b"\xef\xbb\xbf# disk descriptorfile\n"), Some(Kind::Descriptor));
        let mut long = b"# licence text\n".repeat(200);
        assert_eq!(probe(&long), None, "comments alone prove nothing");
        long.extend_from_slice(b"version=1\n");
        assert_eq!(probe(&long), Some(Kind::Descriptor));
        assert_eq!(probe(b"#!/bin/sh\nversion=$1\n"), None, "a shell script");
        assert_eq!(probe(b"versions=1\n"), None);
    }

    proptest! {
        #[test]
        fn probing_never_panics(bytes: Vec<u8>) {
            let _ = probe(&bytes);
        }
    }
}
