//! The codecs: hostile payloads, round trips, and the zero scan against a slow one.
#![no_main]

use std::cell::RefCell;

use arbitrary::Arbitrary;
use diskmill_codec::{Codec, Packer, Run, Unpacker, is_zero, level_range, runs};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    codec: u8,
    level: u8,
    /// Bytes that the unit has; payloads are made for other sizes too.
    unit: u16,
    granule: u16,
    payload: &'a [u8],
}

thread_local! {
    /// Used for all inputs: what one payload leaves behind must not change the next.
    static USED: RefCell<Unpacker> = RefCell::new(Unpacker::new());
}

fuzz_target!(|input: Input| {
    let codec = [Codec::Deflate, Codec::Zlib, Codec::Zstd][usize::from(input.codec % 3)];

    let mut unit = vec![0xa5; usize::from(input.unit)];
    let mut again = vec![0x5a; unit.len()];
    let got = Unpacker::new().unpack(codec, input.payload, &mut unit);
    let with_used = USED.with_borrow_mut(|used| used.unpack(codec, input.payload, &mut again));
    assert_eq!(got, with_used, "the result depends on the context's past");
    if got.is_ok() {
        assert!(unit == again, "a part of the unit was not written, or depends on the context's past");
    }

    let plain = input.payload;
    let levels = level_range(codec);
    let count = (levels.end() - levels.start() + 1) as u8;
    let level = levels.start() + i32::from(input.level % count);
    let mut packed = vec![0; plain.len() + 64];
    let packed_len =
        Packer::new(codec, level).and_then(|mut packer| packer.pack(plain, &mut packed)).expect("packs");
    if let Some(len) = packed_len {
        // As on disk: sectors, whose rest is somebody else's.
        packed[len..].fill(input.granule as u8);
        let mut back = vec![0xa5; plain.len()];
        Unpacker::new().unpack(codec, &packed, &mut back).expect("what was packed unpacks");
        assert!(back == plain, "other bytes came back");
    }

    assert_eq!(is_zero(plain), plain.iter().all(|&byte| byte == 0));
    let granule = usize::from(input.granule);
    let found: Vec<Run> = runs(plain, granule).collect();
    assert_eq!(found.iter().map(|run| run.len).sum::<usize>(), plain.len());
    let mut at = 0;
    for run in &found {
        assert_eq!(run.start, at);
        assert!(run.len > 0);
        at += run.len;
        if granule > 0 {
            assert!(
                plain[run.start..at]
                    .chunks(granule)
                    .all(|chunk| chunk.iter().all(|&byte| byte == 0) == run.zero)
            );
        }
    }
    if granule > 0 {
        assert!(found.windows(2).all(|pair| pair[0].zero != pair[1].zero), "two runs that are one");
    }
});
