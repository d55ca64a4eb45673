//! Sizes for people, as qemu-img writes them.

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Three significant digits and a unit of 1024: `1.5 GiB`.
pub(crate) fn human_size(bytes: u64) -> String {
    let mut value = bytes as f64;
    let mut unit = 0;
    // QEMU (`size_to_str`) goes to the next unit at 1000, so that there are at most three digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let unit = UNITS.get(unit).unwrap_or(&"");
    format!("{} {unit}", three_digits(value))
}

/// C's `%0.3g` for 0 to 1000.
fn three_digits(value: f64) -> String {
    // Rounding may carry into a fourth digit.
    if value >= 999.5 {
        return "1e+03".to_owned();
    }
    let decimals = match value {
        99.95.. => 0,
        9.995.. => 1,
        1.0.. | 0.0 => 2,
        // 0.977 is 1000 of the unit below.
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_as_by_qemu() {
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (10_234, "9.99 KiB"),
            (10_240, "10 KiB"),
            (197_120, "192 KiB"),
            (1_000_448, "977 KiB"),
            (1 << 30, "1 GiB"),
            (2_297_856, "2.19 MiB"),
            (1_048_064_000, "1e+03 MiB"),
            (i64::MAX as u64, "8 EiB"),
        ];
        for (bytes, want) in cases {
            assert_eq!(human_size(bytes), want, "{bytes}");
        }
    }
}
