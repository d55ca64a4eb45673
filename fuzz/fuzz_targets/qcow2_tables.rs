//! The structures of qcow2, each by itself: what is decoded encodes to what it was.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use diskmill_format::qcow2::{
    Cluster, CompressedRef, Geometry, HeaderArea, L1Entry, L2Codec, RefcountWidth, parse_snapshots,
};
use diskmill_format::{HostOffset, Limits};
use libfuzzer_sys::fuzz_target;

const COPIED: u64 = 1 << 63;

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    header(data, &limits);
    // The rest takes its parameters from the end, so that a seed that is a header stays one.
    let (front, back) = data.split_at(data.len().saturating_sub(64));
    let mut from_back = Unstructured::new(back);
    let _ = snapshots(front, &mut from_back, &limits);
    let mut input = Unstructured::new(data);
    let _ = entries(&mut input);
    let _ = refcounts(&mut input);
});

fn header(data: &[u8], limits: &Limits) {
    let Ok(area) = HeaderArea::parse(data, limits) else { return };
    let header = &area.header;
    assert!(header.size <= i64::MAX as u64);
    assert!(u64::from(header.l1_size) >= header.geometry.l1_entries(header.size));
    assert!(u64::from(header.l1_size) * 8 <= limits.qcow2_l1_bytes);
    for at in [header.l1_offset, header.refcount_table_offset, header.snapshots_offset] {
        assert_eq!(at.get() % header.geometry.cluster_size(), 0);
    }
    if let Some(name) = &area.backing_name {
        assert!(name.len() as u64 <= u64::from(limits.backing_name_bytes));
    }
    let Ok(bytes) = area.encode() else { return };
    assert_eq!(bytes.len() as u64, header.geometry.cluster_size());
    let back = HeaderArea::parse(&bytes, limits).expect("what was encoded parses");
    assert_eq!(back.encode().expect("encodes again").len(), bytes.len());
    let name = |area: &HeaderArea| area.backing_name.clone().filter(|name| !name.is_empty());
    assert_eq!(name(&back), name(&area));
    assert_eq!(back.extensions.backing_format, area.extensions.backing_format);
    assert_eq!(back.extensions.data_file, area.extensions.data_file);
    assert_eq!(back.extensions.unknown, area.extensions.unknown, "unknown extensions are kept");
    // Places inside the first cluster are the encoder's own.
    let mut expected = header.clone();
    expected.backing_name = back.header.backing_name;
    expected.header_length = back.header.header_length;
    assert_eq!(back.header, expected);
}

fn snapshots(data: &[u8], input: &mut Unstructured, limits: &Limits) -> arbitrary::Result<()> {
    let count = u32::from(u16::arbitrary(input)?) % 200;
    let at = HostOffset(u64::arbitrary(input)?);
    let Ok((found, used)) = parse_snapshots(data, count, at, limits) else { return Ok(()) };
    assert_eq!(found.len(), count as usize);
    assert!(used <= data.len().next_multiple_of(8), "only padding may lie past the end");
    assert!(used >= 40 * found.len());
    let fewer = input.int_in_range(0..=count)?;
    let (start, part) = parse_snapshots(data, fewer, at, limits).expect("a prefix of the table");
    assert!(part <= used && found.starts_with(&start));
    Ok(())
}

fn entries(input: &mut Unstructured) -> arbitrary::Result<()> {
    let bits = input.int_in_range(9..=21)?;
    let extended = bits >= 14 && bool::arbitrary(input)?;
    let Some(geometry) = Geometry::new(bits, extended) else { return Ok(()) };
    let version = input.int_in_range(2..=3)?;
    let external = bool::arbitrary(input)?;
    let codec = L2Codec::new(geometry, version, external);
    let cluster = geometry.cluster_size();

    let (raw, bitmap) = (u64::arbitrary(input)?, u64::arbitrary(input)?);
    let table = [raw.to_be_bytes(), bitmap.to_be_bytes()].concat();
    let same =
        |first: u64, second: u64| codec.decode(&[first.to_be_bytes(), second.to_be_bytes()].concat(), 0);
    let decoded = codec.decode(&table, 0);
    match decoded {
        Err(why) => assert!(!why.is_empty()),
        Ok(Cluster::Unallocated) => assert_eq!(raw & 0x00ff_ffff_ffff_fe00, 0),
        Ok(Cluster::Zero(host)) => {
            assert!(host.is_none_or(|host| host.get() % cluster == 0 && host.get() >> 56 == 0));
            let (first, second) = if extended {
                (host.map_or(0, L2Codec::encode_standard), bitmap)
            } else {
                (L2Codec::encode_zero(host), 0)
            };
            assert_eq!(same(first, second), decoded);
        }
        Ok(Cluster::Standard(host)) => {
            assert!(host.get() % cluster == 0 && host.get() >> 56 == 0);
            assert_eq!(L2Codec::encode_standard(host), raw | COPIED);
            assert_eq!(same(raw | COPIED, bitmap), decoded);
        }
        Ok(Cluster::Compressed(CompressedRef { host, len })) => {
            assert!(!external && host.get() >> 56 == 0 && len > 0);
            assert_eq!((host.get() + u64::from(len)) % 512, 0);
            assert_eq!(codec.encode_compressed(host, len), Some(raw & !COPIED));
        }
        Ok(Cluster::Subclusters { host, allocated, zero }) => {
            assert!(extended && allocated & zero == 0 && (host.is_some() || allocated == 0));
            assert_eq!(L2Codec::encode_bitmap(allocated, zero), bitmap);
        }
    }

    let (host, len) = (HostOffset(u64::arbitrary(input)?), u32::arbitrary(input)?);
    if let Some(raw) = codec.encode_compressed(host, len).filter(|_| !external) {
        let Ok(Cluster::Compressed(got)) = same(raw, 0) else { panic!("{raw:#x} is not read back") };
        assert_eq!(got.host, host);
        assert!(
            (u64::from(len)..u64::from(len) + 512).contains(&u64::from(got.len)),
            "{got:?} for {len} bytes"
        );
    }

    let index = usize::arbitrary(input)?;
    let entry = geometry.l2_entry_size();
    assert_eq!(codec.decode(&table, index).ok().is_some_and(|_| index >= 16 / entry), false, "outside");

    match L1Entry::decode(raw, geometry) {
        Ok(L1Entry::Table(host)) => {
            assert!(host.get() % cluster == 0 && host.get() != 0);
            assert_eq!(L1Entry::encode_owned(host), raw | COPIED);
        }
        Ok(L1Entry::Unallocated) => assert_eq!(raw & 0x00ff_ffff_ffff_fe00, 0),
        Err(why) => assert!(!why.is_empty()),
    }

    // A guest offset is the sum of what its indices stand for.
    let guest = u64::arbitrary(input)?;
    let sum =
        geometry.l1_index(guest) * geometry.l2_span() + geometry.l2_index(guest) * cluster + guest % cluster;
    assert_eq!(sum, guest);
    assert!(
        geometry.l1_index(guest) < geometry.l1_entries(guest.saturating_add(1).max(1)) || guest == u64::MAX
    );
    Ok(())
}

fn refcounts(input: &mut Unstructured) -> arbitrary::Result<()> {
    let order = input.int_in_range(0..=8)?;
    let Some(width) = RefcountWidth::from_order(order) else {
        assert!(order > 6);
        return Ok(());
    };
    assert_eq!(RefcountWidth::from_bits(u64::from(width.bits())), Some(width));
    let mut block = input.bytes(input.len().min(64) / 2)?.to_vec();
    let count = width.entries(block.len() as u64) as usize;
    let mut model: Vec<u64> = (0..count).map(|index| width.get(&block, index).expect("inside")).collect();
    assert_eq!(width.get(&block, count), None);
    while !input.is_empty() {
        let (index, value) = (usize::from(u16::arbitrary(input)?) % (count + 2), u64::arbitrary(input)?);
        let value = if bool::arbitrary(input)? { value & width.max() } else { value };
        assert_eq!(width.set(&mut block, index, value), index < count && value <= width.max());
        if index < count && value <= width.max() {
            model[index] = value;
        }
        let now: Vec<u64> = (0..count).map(|index| width.get(&block, index).expect("inside")).collect();
        assert_eq!(now, model);
    }
    let far = usize::arbitrary(input)?.max(count);
    assert_eq!(width.get(&block, far), None);
    assert!(!width.set(&mut block, far, 0));
    assert!(!width.set(&mut block, usize::MAX, 0));
    Ok(())
}
