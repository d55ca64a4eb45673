use super::*;
use crate::Problem;
use proptest::prelude::*;

/// The first 80 bytes of an image by open-vmdk (8192 sectors), as in the corpus.
const OPEN_VMDK: &str = "4b444d5603000000010003000020000000000000800000000000000001000000\
    0000000014000000000000000002000000000000000000001500000000000000\
    1a00000000000000000a200d0a010000";

fn sector(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
    let mut bytes: Vec<u8> = digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect();
    bytes.resize(HEADER_BYTES, 0);
    bytes
}

#[test]
fn open_vmdk_header_reads_and_writes_back() {
    let bytes = sector(OPEN_VMDK);
    let header = SparseHeader::parse(&bytes).unwrap();
    assert_eq!(
        header,
        SparseHeader { gd_offset: 0x15, overhead: 0x1a, ..SparseHeader::stream_optimized(8192) }
    );
    assert!(header.compressed() && header.markers() && !header.directory_in_footer());
    assert_eq!(header.descriptor(&Limits::default()).unwrap(), Some((512, 20 * 512)));
    assert_eq!(header.redundant_directory().unwrap(), None);
    assert!(header.doubts().is_empty());
    assert_eq!(header.encode()[..], bytes[..]);
}

#[test]
fn layout_is_the_one_qemu_and_vmware_write() {
    // (sectors, gdOffset, overHead) of files made by qemu-img 10.0.2 and DiscUtils.
    for (capacity, gd, overhead) in
        [(8192, 0x1a, 0x80), (10_485_760, 0x297, 0x580), (629_145_600, 0x9660, 0x12d00)]
    {
        let layout = SparseLayout::new(capacity, 20, capacity > 1 << 25, &Limits::default()).unwrap();
        assert_eq!((layout.header.gd_offset, layout.header.overhead), (gd, overhead), "{capacity}");
        assert_eq!(layout.header.rgd_offset, 0x15);
    }
    // The extents of a disk that DiscUtils and VirtualBox split.
    for (capacity, gd, overhead) in [(4_192_256, 258, 640), (1_052_672, 70, 256)] {
        let header = SparseLayout::new(capacity, 0, false, &Limits::default()).unwrap().header;
        assert_eq!((header.rgd_offset, header.gd_offset, header.overhead), (1, gd, overhead));
        assert_eq!((header.descriptor_offset, header.descriptor_sectors), (0, 0));
    }
    let layout = SparseLayout::new(8192, 20, false, &Limits::default()).unwrap();
    assert_eq!((layout.redundant_tables, layout.tables), (0x16, 0x1b));
    assert_eq!(table_entries(&layout.directory(0x1b)).take(2).collect::<Vec<_>>(), [0x1b, 0]);
    assert_eq!(layout.header.flags, 3);
    assert_eq!(SparseLayout::new(8192, 20, true, &Limits::default()).unwrap().header.flags, 7);
    // Beyond 2 TiB only the file, not the disk, is limited to 2^32 sectors.
    let large = SparseLayout::new(1 << 41, 20, false, &Limits::default()).unwrap();
    assert_eq!(large.geometry.tables, Limits::default().vmdk_directory_entries);
    assert!(large.header.overhead < 1 << 32);
    assert!(SparseLayout::new((1 << 41) + 1, 20, false, &Limits::default()).is_err());
}

#[test]
fn damage_is_named() {
    let good = SparseHeader::stream_optimized(8192).encode();
    let problem = |at: usize, value: u8| {
        let mut bytes = good;
        bytes[at] = value;
        SparseHeader::parse(&bytes).unwrap_err()
    };
    assert_eq!(problem(0, b'X').problem, Problem::NotThisFormat);
    assert_eq!(problem(4, 4).problem, Problem::Unsupported);
    assert_eq!(problem(4, 0).problem, Problem::Unsupported);
    assert_eq!(problem(11, 1).problem, Problem::Unsupported);
    assert_eq!(problem(77, 2).problem, Problem::Unsupported);
    assert_eq!(problem(19, 1).problem, Problem::Corrupt);
    let newline = problem(75, b'\n');
    assert_eq!(newline.problem, Problem::Corrupt);
    assert!(newline.message.contains("binary mode"), "{newline}");
    assert_eq!(SparseHeader::parse(&good[..511]).unwrap_err().problem, Problem::Corrupt);
    let mut untested = good;
    untested[8] = 0;
    untested[75] = b'\n';
    assert!(SparseHeader::parse(&untested).is_ok(), "without flag bit 0 the bytes mean nothing");
}

#[test]
fn sizes_are_limited() {
    let limits = Limits::default();
    let header = SparseHeader::stream_optimized(8192);
    let with = |change: &dyn Fn(&mut SparseHeader)| {
        let mut header = header.clone();
        change(&mut header);
        header.geometry(&limits).unwrap_err().problem
    };
    assert_eq!(with(&|h| h.grain_sectors = 0), Problem::Corrupt);
    assert_eq!(with(&|h| h.gtes_per_gt = 0), Problem::Corrupt);
    assert_eq!(with(&|h| h.gtes_per_gt = 513), Problem::Unsupported);
    assert_eq!(with(&|h| h.grain_sectors = (64 << 20) / 512 + 1), Problem::Limit);
    assert_eq!(with(&|h| h.grain_sectors = u64::MAX), Problem::Corrupt);
    assert_eq!(with(&|h| h.capacity = u64::MAX / 1024), Problem::Limit);
    let header = SparseHeader { descriptor_sectors: 1 << 20, ..header };
    assert_eq!(header.descriptor(&limits).unwrap_err().problem, Problem::Limit);
}

#[test]
fn guest_bytes_are_located() {
    let geometry = SparseHeader::stream_optimized(12_291).geometry(&Limits::default()).unwrap();
    assert_eq!(geometry.tables, 1);
    assert_eq!(geometry.directory_bytes, 512);
    assert_eq!(geometry.table_bytes, 2048);
    assert_eq!(geometry.locate(65_536 + 7), Some((0, 1, 7)));
    assert_eq!(geometry.locate(12_291 * 512), None);
    assert_eq!(geometry.grain_len(95), 65_536);
    assert_eq!(geometry.grain_len(96), 3 * 512);
    assert_eq!(geometry.grain_len(u64::MAX), 0);
    let two = SparseHeader::stream_optimized(65_537).geometry(&Limits::default()).unwrap();
    assert_eq!((two.tables, two.locate(32 << 20)), (2, Some((1, 0, 0))));
}

#[test]
fn entries_are_decoded() {
    assert_eq!(GrainEntry::new(0, true), GrainEntry::Unallocated);
    assert_eq!(GrainEntry::new(1, true), GrainEntry::Zero);
    assert_eq!(GrainEntry::new(1, false), GrainEntry::Sector(1));
    assert_eq!(GrainEntry::new(9, true), GrainEntry::Sector(9));
    let bytes = encode_table(&[7, 9]);
    assert_eq!(bytes.len(), 512);
    assert_eq!(table_entries(&bytes[..11]).collect::<Vec<_>>(), [7, 9]);
}

#[test]
fn odd_combinations_are_doubted_not_refused() {
    let mut header = SparseHeader::stream_optimized(8);
    header.compression = COMPRESSION_NONE;
    assert!(header.compressed());
    assert_eq!(header.doubts().len(), 1);
    header.flags = FLAG_ZEROED_GRAIN;
    header.version = 1;
    header.unclean_shutdown = 1;
    header.grain_sectors = 24;
    assert_eq!(header.doubts().len(), 3);
}

proptest! {
    #[test]
    fn headers_round_trip(
        version in 1u32..=3, flags in 0u32..8, capacity in 0u64..1 << 54, grain: u64,
        descriptor: (u64, u64), gtes: u32, rgd: u64, gd: u64, overhead: u64, unclean: u8, compression in 0u16..2,
    ) {
        let header = SparseHeader {
            version, flags, capacity, grain_sectors: grain, descriptor_offset: descriptor.0,
            descriptor_sectors: descriptor.1, gtes_per_gt: gtes, rgd_offset: rgd, gd_offset: gd, overhead,
            unclean_shutdown: unclean, compression,
        };
        prop_assert_eq!(SparseHeader::parse(&header.encode()).unwrap(), header);
    }

    #[test]
    fn arbitrary_headers_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..600), at: u64) {
        for (byte, magic) in bytes.iter_mut().zip(*b"KDMV\x01\0\0\0\0\0\0\0") {
            *byte = magic;
        }
        if let Ok(header) = SparseHeader::parse(&bytes) {
            let limits = Limits::default();
            let _ = (header.doubts(), header.descriptor(&limits), header.redundant_directory());
            if let Ok(geometry) = header.geometry(&limits) {
                let _ = (geometry.locate(at), geometry.grain_len(at));
            }
        }
    }

    #[test]
    fn layouts_never_overlap(capacity in 0u64..1 << 33, descriptor in 0u64..40) {
        if let Ok(layout) = SparseLayout::new(capacity, descriptor, false, &Limits::default()) {
            let (h, g) = (&layout.header, layout.geometry);
            let tables = g.tables * g.table_bytes / 512;
            prop_assert_eq!(u64::from(layout.redundant_tables), h.rgd_offset + g.directory_bytes / 512);
            prop_assert_eq!(h.gd_offset, u64::from(layout.redundant_tables) + tables);
            prop_assert!(h.overhead >= u64::from(layout.tables) + tables);
            prop_assert!(h.overhead < 1 << 32);
        }
    }
}
