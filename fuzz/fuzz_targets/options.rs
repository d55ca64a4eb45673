//! What users type: sizes, and the options of an output.
#![no_main]

use arbitrary::Arbitrary;
use diskmill::convert::{RawOptions, TargetFormat};
use diskmill::qcow2::Qcow2Options;
use diskmill::{Format, parse_size};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Input<'a> {
    text: &'a str,
    number: u64,
    suffix: u8,
    pairs: Vec<(u8, &'a str, &'a str)>,
}

fuzz_target!(|input: Input| {
    if let Ok(size) = parse_size(input.text) {
        assert!(size <= i64::MAX as u64);
        assert!(input.text.is_ascii());
        assert_eq!(parse_size(&size.to_string()).ok(), Some(size));
        assert_eq!(parse_size(&format!("{size:#x}")).ok(), Some(size));
    }

    let (letters, shift) =
        [("bB", 0), ("kK", 10), ("mM", 20), ("gG", 30), ("tT", 40), ("pP", 50), ("eE", 60)]
            [usize::from(input.suffix) % 7];
    let expected = input.number.checked_mul(1 << shift).filter(|&size| size <= i64::MAX as u64);
    for letter in letters.chars() {
        assert_eq!(parse_size(&format!("{}{letter}", input.number)).ok(), expected);
    }
    // A fraction adds less than one of its unit, whatever its digits.
    let fraction = format!("{}.{}{}", input.number, input.text.len(), &letters[..1]);
    if let (Ok(size), Some(whole)) = (parse_size(&fraction), expected) {
        assert!((whole..whole + (1 << shift)).contains(&size), "{fraction}: {size}");
    }

    let mut qcow2 = Qcow2Options::default();
    let mut raw = RawOptions::default();
    for (which, name, value) in &input.pairs {
        let name = Qcow2Options::NAMES.get(usize::from(*which)).copied().unwrap_or(name);
        let before = qcow2.clone();
        match qcow2.set(name, value) {
            Ok(()) => {
                let after = qcow2.clone();
                assert!(
                    qcow2.set(name, value).is_ok() && qcow2 == after,
                    "setting it twice is another thing"
                );
            }
            Err(error) => {
                assert!(qcow2 == before, "an error changed the options");
                assert!(!error.to_string().is_empty());
            }
        }
        let before = raw;
        if raw.set(name, value).is_err() {
            assert!(raw == before, "an error changed the options");
        }
    }

    if let Ok(format) = input.text.parse::<Format>() {
        assert_eq!(format.name().parse::<Format>().ok(), Some(format));
    }
    if let Ok(target) = TargetFormat::named(input.text) {
        assert_eq!(target.name(), input.text);
    }
});
