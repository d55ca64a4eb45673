use crate::error::{Error, Result};

/// Parses a size in bytes as qemu-img does (`qemu_strtosz`): decimal with an optional fraction and one
/// letter of `bkKMGTPE` (powers of 1024), or `0x` and hexadecimal digits without a letter; at most 2^63 - 1.
///
/// # Errors
/// [`Kind::Invalid`](crate::Kind::Invalid), saying what is wrong.
pub fn parse_size(text: &str) -> Result<u64> {
    parse(text).filter(|&size| size <= i64::MAX as u64).ok_or_else(|| {
        Error::invalid(format!("{text:?} is not a size"))
            .hint("bytes, or a number with one of the letters k, M, G, T, P, E")
    })
}

fn parse(text: &str) -> Option<u64> {
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        // `from_str_radix` would take a sign.
        return hex
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then(|| u64::from_str_radix(hex, 16).ok())?;
    }
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = match digits.split_once('.') {
        Some((whole, fraction)) if shift > 0 => (whole, fraction),
        Some(_) => return None,
        None => (digits, ""),
    };
    let numeric = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !numeric(whole) || !numeric(fraction) {
        return None;
    }
    let whole = whole.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    if fraction.is_empty() {
        return Some(whole);
    }
    let fraction = format!("0.{fraction}").parse::<f64>().ok()?;
    whole.checked_add((fraction * (1u64 << shift) as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let ok = [
            ("0", 0),
            ("512", 512),
            ("1k", 1024),
            ("1.5G", 3 << 29),
            ("64K", 65_536),
            ("0x10", 16),
            ("2b", 2),
            ("7E", 7 << 60),
        ];
        for (text, size) in ok {
            assert_eq!(parse_size(text).unwrap(), size, "{text}");
        }
        for text in ["", "k", "-1", "1.5", "0x1k", "8E", "1kk", "1 k", "0x+1", "1e3", "９"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
