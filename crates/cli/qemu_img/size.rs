//! Numbers on the command line.

use diskmill::{Error, parse_size};

use super::{Fail, Outcome};

/// The largest size, offset or count.
const MAX: u64 = i64::MAX as u64;

/// Parses a size; `what` it is stands in the message.
pub(super) fn size(what: &str, text: &str) -> Outcome<u64> {
    size_between(what, text, 0, MAX)
}

/// Parses a size from `least` to `most`.
pub(super) fn size_between(what: &str, text: &str, least: u64, most: u64) -> Outcome<u64> {
    let range = || Fail::new(format!("Invalid {what} specified. Must be between {least} and {most}."));
    match bytes(text.trim_start()) {
        Ok(size) if (least..=most).contains(&size) => Ok(size),
        Ok(_) => Err(range()),
        Err(_) if is_out_of_range(text) => Err(range()),
        Err(_) => Err(Fail::new(format!(
            "Invalid {what} specified. You may use k, M, G, T, P or E suffixes for\n\
             qemu-img: kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes."
        ))),
    }
}

/// Parses a size as QEMU writes it: with a plus sign, and without a digit in front of the point, if the user likes.
pub(super) fn bytes(text: &str) -> Result<u64, Error> {
    let begins = |text: &str| text.starts_with(|first: char| first.is_ascii_digit());
    match text.strip_prefix('+').unwrap_or(text) {
        number if begins(number) => parse_size(number),
        number if number.strip_prefix('.').is_some_and(begins) => parse_size(&format!("0{number}")),
        _ => parse_size(text),
    }
}

/// Parses a plain number from `least` to `most`.
pub(super) fn number(what: &str, text: &str, least: u64, most: u64) -> Outcome<u64> {
    match text.trim_start().parse::<u64>() {
        Ok(number) if (least..=most).contains(&number) => Ok(number),
        _ => Err(Fail::new(format!("Invalid {what} specified. Must be between {least} and {most}."))),
    }
}

/// Whether `text` is a number as sizes are written, but a negative or too large one.
pub(super) fn is_out_of_range(text: &str) -> bool {
    let text = text.trim_start();
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |digits| (true, digits));
    let number =
        digits.trim_end_matches(['b', 'B', 'k', 'K', 'm', 'M', 'g', 'G', 't', 'T', 'p', 'P', 'e', 'E']);
    let well_formed = digits.len() - number.len() <= 1
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    well_formed && (negative || parse_size(digits).is_err())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(text: &str) -> String {
        size("image size", text).unwrap_err().message.unwrap()
    }

    #[test]
    fn mistakes_are_told_apart() {
        for text in ["-1", "-1k", "-1024", "9E", "9223372036854775808"] {
            assert!(message(text).contains("Must be between 0 and 9223372036854775807."), "{text}");
        }
        for text in ["abc", "1kilobyte", "", "k", "1 k"] {
            assert!(message(text).contains("You may use k, M"), "{text}: {}", message(text));
        }
        for (text, want) in [("1.5k", 1536), ("+1M", 1 << 20), (".5k", 512), ("+.5k", 512), ("+0x10", 16)] {
            assert_eq!(size("", text).unwrap(), want, "{text}");
        }
        for text in ["++1", "+", ".", ".k", "+-1"] {
            assert!(size("", text).is_err(), "{text}");
        }
    }
}
