use super::payload::*;
use super::*;
use crate::content::{Pattern, fill};
use crate::{Oracle, scratch};

/// QEMU finds the image clean and reads `want`.
fn accepted(build: impl FnOnce(&mut ImageBuilder), mut builder: ImageBuilder, want: &[u8]) {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else {
        return;
    };
    build(&mut builder);
    let image = builder.build();
    image.write(&dir.path().join("a.qcow2"));
    assert_eq!(std::fs::read(dir.path().join("a.qcow2")).unwrap(), image.bytes());
    q.check_clean("a.qcow2");
    assert!(q.content("a.qcow2", "qcow2") == want, "content differs");
}

#[test]
fn every_refcount_width_and_version_is_clean() {
    for (version, bits, order) in
        [(2, 9, 4), (2, 16, 4), (3, 12, 0), (3, 9, 1), (3, 9, 2), (3, 9, 3), (3, 9, 5), (3, 16, 6)]
    {
        let cluster = 1usize << bits;
        let data = fill(Pattern::Random, 1, cluster);
        let mut want = vec![0; 100 * cluster - 512];
        want[7 * cluster..8 * cluster].copy_from_slice(&data);
        want[98 * cluster..99 * cluster].copy_from_slice(&data);
        let build = |b: &mut ImageBuilder| {
            b.refcount_order(order);
            b.data(98, &data);
            b.data(7, &data);
        };
        let builder = ImageBuilder::new(version, bits, want.len() as u64);
        accepted(build, builder, &want);
    }
}

#[test]
fn shared_zero_and_packed_clusters_are_clean() {
    let far: [u8; 1 << 15] = fill(Pattern::Random, 9, 1 << 15).try_into().unwrap();
    let c = 65536;
    let data = fill(Pattern::Text, 1, c);
    let mut want = Vec::new();
    for part in [&data[..], &data[..], &vec![0; 2 * c], &vec![7; c], &data[..], &far[..], &far[..]] {
        want.extend_from_slice(part);
    }
    let build = |b: &mut ImageBuilder| {
        let at = b.data(0, &data);
        b.map(1, Entry::Data(at)).map(2, Entry::Zero);
        let kept = b.alloc(&vec![9; c]);
        b.map(3, Entry::ZeroAt(kept));
        // Payloads beginning in the middle of a sector and crossing clusters.
        let mut at = b.alloc(&[]) + 65_536 - 700 + 3;
        for (guest, payload) in
            [(4, deflate_run(7, c)), (5, deflate_stored(&data)), (6, deflate_far(&far, c))]
        {
            b.place(at, &payload).map(guest, Entry::Packed(at, payload.len() as u64));
            at += payload.len() as u64;
        }
    };
    accepted(build, ImageBuilder::new(3, 16, want.len() as u64), &want);
}

#[test]
fn zstd_payloads_and_concatenated_frames_are_clean() {
    let c = 1 << 18;
    let data = fill(Pattern::Random, 3, c);
    let want = [vec![5; c], data.clone(), vec![6; c]].concat();
    let build = |b: &mut ImageBuilder| {
        b.zstd();
        let two = [zstd_run(6, c / 2), zstd_run(6, c / 2)].concat();
        for (guest, payload) in [(0, zstd_run(5, c)), (1, zstd_stored(&data)), (2, two)] {
            let at = b.alloc(&payload);
            b.map(guest, Entry::Packed(at, payload.len() as u64));
        }
    };
    accepted(build, ImageBuilder::new(3, 18, want.len() as u64), &want);
}

#[test]
fn subclusters_and_snapshots_are_clean() {
    let c = 16384;
    let data = fill(Pattern::Text, 4, c);
    let mut want = vec![0; 3 * c];
    want[..512].copy_from_slice(&data[..512]);
    want[1024..1536].copy_from_slice(&data[1024..1536]);
    want[2 * c..].copy_from_slice(&data);
    let build = |b: &mut ImageBuilder| {
        b.extended_l2();
        let at = b.alloc(&data);
        b.map(0, Entry::Sub(at, 0b101, 0b10)).map(1, Entry::Zero);
        b.snapshot("1", "first");
        b.data(2, &data);
    };
    accepted(build, ImageBuilder::new(3, 14, want.len() as u64), &want);
}

#[test]
fn a_feature_name_reaches_qemus_message() {
    let dir = scratch();
    let Some(q) = Oracle::find(dir.path()) else {
        return;
    };
    let mut b = ImageBuilder::new(3, 16, 1 << 20);
    b.incompatible(1 << 40).feature_names(&[(0, 40, "time travel")]);
    b.build().write(&dir.path().join("a"));
    q.img(["info", "-f", "qcow2", "a"]).fails(1).says(&["time travel"]);
}

#[test]
fn patches_land_where_they_should() {
    let image = ImageBuilder::new(3, 9, 4096).build();
    let len = image.len;
    let patched = image.put64(field::SIZE, 1 << 20).put(len + 5, b"x");
    assert_eq!(patched.bytes()[24..32], (1u64 << 20).to_be_bytes());
    assert_eq!(patched.len, len + 6);
}
