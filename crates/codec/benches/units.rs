//! What a codec does with one unit of 64 KiB: `cargo bench -p diskmill-codec -- --sample-count 20` is the quick form.
#![allow(clippy::unwrap_used, reason = "benches")]

use diskmill_codec::{Codec, Packer, Unpacker, default_level, fingerprint, is_zero, rewrap, runs};
use divan::counter::BytesCount;
use divan::{Bencher, black_box};

const UNIT: usize = 64 << 10;

fn main() {
    divan::main();
}

/// Words of a small vocabulary in no order: packs to about a third, as text and programs do.
fn text() -> Vec<u8> {
    let words: [&[u8]; 8] =
        [b"guest ", b"cluster ", b"offset ", b"table ", b"the ", b"of ", b"grain, ", b"refcount\n"];
    let mut unit = Vec::with_capacity(UNIT + 16);
    for word in noise().chunks(2).cycle() {
        if unit.len() >= UNIT {
            break;
        }
        unit.extend_from_slice(words[usize::from(word[0] % 8)]);
        unit.push(word[1]);
    }
    unit.truncate(UNIT);
    unit
}

/// Bytes that no codec can shrink (xorshift).
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(UNIT).collect()
}

fn pack_with(bencher: Bencher<'_, '_>, codec: Codec, unit: &[u8], room: usize) {
    let mut packer = Packer::new(codec, default_level(codec)).unwrap();
    let mut out = vec![0; room];
    bencher.counter(BytesCount::new(UNIT)).bench_local(|| packer.pack(black_box(unit), &mut out));
}

const CODECS: [Codec; 3] = [Codec::Deflate, Codec::Zlib, Codec::Zstd];

#[divan::bench(args = CODECS)]
fn pack_text(bencher: Bencher<'_, '_>, codec: Codec) {
    pack_with(bencher, codec, &text(), UNIT - 1);
}

#[divan::bench(args = CODECS)]
fn pack_noise(bencher: Bencher<'_, '_>, codec: Codec) {
    pack_with(bencher, codec, &noise(), UNIT - 1);
}

#[divan::bench]
fn pack_noise_that_must_be_packed(bencher: Bencher<'_, '_>) {
    pack_with(bencher, Codec::Zlib, &noise(), 2 * UNIT);
}

#[divan::bench(args = CODECS)]
fn unpack(bencher: Bencher<'_, '_>, codec: Codec) {
    let (unit, mut packed) = (text(), vec![0; UNIT]);
    let len = Packer::new(codec, default_level(codec)).unwrap().pack(&unit, &mut packed).unwrap().unwrap();
    let (mut unpacker, mut back) = (Unpacker::new(), vec![0; UNIT]);
    bencher
        .counter(BytesCount::new(UNIT))
        .bench_local(|| unpacker.unpack(codec, black_box(&packed[..len]), &mut back).unwrap());
}

#[divan::bench]
fn rewrap_deflate_as_zlib(bencher: Bencher<'_, '_>) {
    let (unit, mut packed, mut out) = (text(), vec![0; UNIT], vec![0; UNIT]);
    let len = Packer::new(Codec::Deflate, 1).unwrap().pack(&unit, &mut packed).unwrap().unwrap();
    bencher.counter(BytesCount::new(UNIT)).bench_local(|| {
        rewrap(Codec::Deflate, Codec::Zlib, black_box(&packed[..len]), black_box(&unit), &mut out)
    });
}

/// The whole unit is looked at.
#[divan::bench]
fn zero_scan_of_zeros(bencher: Bencher<'_, '_>) {
    let unit = vec![0; UNIT];
    bencher.counter(BytesCount::new(UNIT)).bench_local(|| is_zero(black_box(&unit)));
}

/// As jobs are scanned: 1 MiB, every second page zeros.
#[divan::bench]
fn zero_scan_of_mixed_pages(bencher: Bencher<'_, '_>) {
    let mut job = vec![0u8; 1 << 20];
    job.chunks_mut(8192).for_each(|pages| pages[0] = 1);
    bencher.counter(BytesCount::new(job.len())).bench_local(|| runs(black_box(&job), 4096).count());
}

#[divan::bench]
fn fingerprint_of_data(bencher: Bencher<'_, '_>) {
    let unit = noise();
    bencher.counter(BytesCount::new(UNIT)).bench_local(|| fingerprint(0, black_box(&unit), 4096));
}
