//! LUKS headers: what is read is written to the same bytes, and unlocking with key material from a stranger ends.
#![no_main]

use diskmill_crypt::{CryptError, Header, Secret};
use libfuzzer_sys::fuzz_target;

/// Iterations that a case may cost.
const AFFORDABLE: u32 = 50;

fuzz_target!(|data: &[u8]| {
    let Ok(header) = Header::parse(data) else { return };
    let written = header.fixed_part();
    assert_eq!(Header::parse(&written).as_ref(), Ok(&header));
    let mut cost = vec![header.digest_iterations];
    cost.extend(header.slots.iter().filter(|slot| slot.active).map(|slot| slot.iterations));
    if cost.iter().any(|&iterations| iterations > AFFORDABLE) {
        return;
    }
    let read = |at: u64, out: &mut [u8]| {
        let from = usize::try_from(at).ok().and_then(|at| data.get(at..)).unwrap_or_default();
        for (to, from) in out.iter_mut().zip(from) {
            *to = *from;
        }
        Ok::<(), CryptError>(())
    };
    let _ = header.unlock(&Secret::new(b"passphrase".to_vec()), read);
});
