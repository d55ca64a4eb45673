//! What guestfish says: answers, messages, progress, its number.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| diskmill_guestfs::fuzzing::replies(bytes));
