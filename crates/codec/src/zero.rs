/// Whether every byte is 0. True of the empty slice.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // Blocks of 256 bytes without a branch inside: the compiler turns each into vector ORs, and a block that is
    // not zero ends the scan.
    let (blocks, tail) = bytes.as_chunks::<256>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        if words.iter().fold(0, |any, word| any | u64::from_ne_bytes(*word)) != 0 {
            return false;
        }
    }
    tail.iter().all(|&byte| byte == 0)
}

/// A run of granules that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First byte.
    pub start: usize,
    /// Bytes in the run.
    pub len: usize,
    /// Whether they are all zero.
    pub zero: bool,
}

/// Splits `bytes` into runs of granules of `granule` bytes (the last may be shorter) that are all zero, or that
/// each hold something else. A `granule` of 0 means that nothing is to be looked for: one run of data.
pub fn runs(bytes: &[u8], granule: usize) -> impl Iterator<Item = Run> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let rest = bytes.get(at..).filter(|rest| !rest.is_empty())?;
        if granule == 0 {
            at = bytes.len();
            return Some(Run { start: 0, len: bytes.len(), zero: false });
        }
        let mut chunks = rest.chunks(granule);
        let first = chunks.next()?;
        let zero = is_zero(first);
        let len =
            first.len() + chunks.take_while(|chunk| is_zero(chunk) == zero).map(<[u8]>::len).sum::<usize>();
        let start = at;
        at += len;
        Some(Run { start, len, zero })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_single_byte_is_seen() {
        for len in [0, 1, 7, 255, 256, 257, 1024] {
            let mut bytes = vec![0u8; len];
            assert!(is_zero(&bytes));
            for at in 0..len {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {len}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn runs_cover_all() {
        let mut bytes = vec![0u8; 10_000];
        bytes[5000] = 1;
        let got: Vec<_> = runs(&bytes, 4096).map(|run| (run.start, run.len, run.zero)).collect();
        assert_eq!(got, [(0, 4096, true), (4096, 4096, false), (8192, 1808, true)]);
        assert_eq!(runs(&bytes, 0).count(), 1);
        assert_eq!(runs(&[], 4096).count(), 0);
    }
}
