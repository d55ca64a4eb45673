//! A streamOptimized file walked marker by marker, as a reader of a pipe does; and markers there and back.
#![no_main]

use diskmill_codec::{Codec, Unpacker};
use diskmill_format::Limits;
use diskmill_format::vmdk::marker::{self, Marker};
use diskmill_format::vmdk::{SparseHeader, sparse};
use libfuzzer_sys::fuzz_target;

/// Grains that are unpacked for one input, and the largest.
const GRAINS: usize = 8;
const LARGEST_GRAIN: u64 = 256 << 10;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = SparseHeader::parse(data) else { return };
    if !header.directory_in_footer() {
        let end = marker::encode_footer(&header);
        let footer = marker::find_footer(&end).expect("the footer that was written");
        assert_eq!((footer.header, footer.doubts), (header.clone(), Vec::new()));
    }
    let Ok(geometry) = header.geometry(&Limits::default()) else { return };
    let mut unpacker = Unpacker::new();
    let mut grain = vec![0; geometry.grain_bytes.min(LARGEST_GRAIN) as usize];
    let mut left = GRAINS;
    let mut at = header.overhead.checked_mul(512).filter(|&at| at < data.len() as u64).unwrap_or(512);
    while let Some(rest) =
        usize::try_from(at).ok().and_then(|at| data.get(at..)).filter(|rest| !rest.is_empty())
    {
        let Ok(found) = Marker::parse(rest) else { break };
        let Some(span) = found.span() else { break };
        assert!(span > 0 && span % 512 == 0, "{found:?}");
        match found {
            Marker::Grain { lba, size } => {
                assert!(size > 0);
                let head = marker::encode_grain(lba, size);
                assert!(rest.starts_with(&head));
                let allowed = found.check_size(geometry.grain_bytes).is_ok();
                assert_eq!(allowed, u64::from(size) <= 2 * geometry.grain_bytes);
                let payload = rest.get(head.len()..).and_then(|rest| rest.get(..size as usize));
                if let Some(payload) = payload.filter(|_| allowed && left > 0) {
                    left -= 1;
                    let _ = unpacker.unpack(Codec::Zlib, payload, &mut grain);
                }
            }
            _ => assert_eq!(Marker::parse(&found.encode()), Ok(found)),
        }
        if let Marker::GrainTable { .. } = found {
            let table = rest.get(512..).unwrap_or_default();
            let entries = sparse::table_entries(table.get(..512).unwrap_or(table));
            for entry in entries {
                let _ = sparse::GrainEntry::new(entry, header.zeroed_grains());
            }
        }
        if found == Marker::EndOfStream {
            break;
        }
        let Some(next) = at.checked_add(span) else { break };
        at = next;
    }
    let _ = marker::find_footer(&data[data.len() % 512..]);
});
