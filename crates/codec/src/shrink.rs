//! A cheap guess whether a unit is worth packing.

/// Bytes in each stretch of a unit that is looked at.
const STRETCH: usize = 256;
/// Stretches of the first look, which settles most units that do shrink, and of the second.
const LOOKS: [usize; 2] = [16, 64];
/// Units smaller than this are packed in any case: too few bytes for statistics, and packing them is quick.
const SMALLEST: usize = LOOKS[1] * STRETCH;
/// Slots for the words that were seen.
const SLOTS: usize = 512;

/// Whether packing may make `unit` noticeably smaller. Data that is compressed or encrypted already is told by two
/// properties: all byte values are about equally frequent, so that a Huffman code gains nothing (well under one per
/// cent), and nothing of some hundred bytes occurs twice, so that there are no matches.
///
/// Errs towards `true`.
pub(crate) fn may_shrink(unit: &[u8]) -> bool {
    unit.len() < SMALLEST || LOOKS.iter().any(|&stretches| is_uneven(unit, stretches)) || has_repeats(unit)
}

/// Whether some byte values are clearly more frequent than others, in evenly spread stretches.
fn is_uneven(unit: &[u8], stretches: usize) -> bool {
    let mut counts = [[0u32; 256]; 2];
    for stretch in unit.chunks(unit.len() / stretches).filter_map(|part| part.first_chunk::<STRETCH>()) {
        // Two counters a value: the same value twice in a row would wait for the first addition.
        for [a, b] in stretch.as_chunks::<2>().0 {
            counts[0][usize::from(*a)] += 1;
            counts[1][usize::from(*b)] += 1;
        }
    }
    let [a, b] = &counts;
    let (mut total, mut squares) = (0, 0);
    for count in a.iter().zip(b).map(|(a, b)| u64::from(a + b)) {
        total += count;
        squares += count * count;
    }
    // Chi-squared over the number of bytes, in 256ths: about 1.4 times the bits that a Huffman code saves on each byte.
    // Equally likely values give 255 ÷ bytes on average, with little deviation.
    let excess = (squares * 256 * 256).saturating_sub(total * total * 256) / (total * total).max(1);
    excess > 256 * 256 / total.max(1) + 12
}

/// Whether some stretch of a few hundred bytes occurs twice: the words behind two rare byte values are compared.
fn has_repeats(unit: &[u8]) -> bool {
    let mut seen = [0u64; SLOTS];
    for at in memchr::memchr2_iter(0x5b, 0xa6, unit) {
        let Some(&word) = unit.get(at..).and_then(|rest| rest.first_chunk::<8>()) else { break };
        let word = u64::from_le_bytes(word);
        let slot = (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 55) as usize % SLOTS;
        if std::mem::replace(&mut seen[slot], word) == word {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes without structure (xorshift).
    fn noise(len: usize, mut state: u64) -> Vec<u8> {
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .take(len)
        .collect()
    }

    #[test]
    fn noise_does_not_shrink() {
        for len in [SMALLEST, 65_536, 100_000, 2 << 20] {
            for seed in 1..50 {
                assert!(!may_shrink(&noise(len, seed)), "{len} {seed}");
            }
        }
    }

    #[test]
    fn small_units_are_always_tried() {
        assert!(may_shrink(&noise(SMALLEST - 1, 1)));
        assert!(may_shrink(&[]));
    }

    #[test]
    fn a_repeat_is_seen() {
        let mut seen = 0;
        for seed in 1..=100 {
            let mut unit = noise(65_536, seed);
            unit.copy_within(1000..2500, 40_003);
            seen += u32::from(may_shrink(&unit));
        }
        assert!(seen > 95, "{seen}");
    }

    #[test]
    fn a_page_of_zeros_in_noise_is_seen() {
        for at in (0..61_440).step_by(1000) {
            let mut unit = noise(65_536, 7);
            unit[at..at + 4096].fill(0);
            assert!(may_shrink(&unit), "{at}");
        }
    }

    #[test]
    fn slightly_uneven_bytes_are_seen() {
        // As base85, or text that was scrambled byte by byte: no repeats, but fewer than eight bits a byte.
        let unit: Vec<u8> = noise(65_536, 3).into_iter().map(|byte| byte % 200).collect();
        assert!(may_shrink(&unit));
    }
}
