//! Guest content that can be made again from a seed.

/// A small deterministic generator (splitmix64): the same seed gives the same numbers everywhere.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts from `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`; `n` must not be 0.
    pub fn below(&mut self, n: usize) -> usize {
        // The remainder is below `n`, so it fits.
        (self.next_u64() % n as u64) as usize
    }
}

/// What a run of guest bytes looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Zeros.
    Zero,
    /// One byte over and over.
    Byte(u8),
    /// Words of a small vocabulary: packs to about a third.
    Text,
    /// Does not pack.
    Random,
}

/// Compressible text, noise and holes, with an odd tail.
pub fn sample(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    (0..len)
        .map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            match at >> 14 & 7 {
                0 | 1 => b"all work and no play "[at % 21],
                2 => state as u8,
                3 if at % 5000 == 0 => 1,
                _ => 0,
            }
        })
        .collect()
}

/// `len` bytes of `pattern`; `seed` varies text and random bytes.
pub fn fill(pattern: Pattern, seed: u64, len: usize) -> Vec<u8> {
    const WORDS: [&[u8]; 8] =
        [b"cluster ", b"grain ", b"refcount ", b"backing file ", b"extent\n", b"L2 table ", b"0x", b" = "];
    let mut rng = Rng::new(seed);
    let mut out = Vec::with_capacity(len + 16);
    match pattern {
        Pattern::Zero => out.resize(len, 0),
        Pattern::Byte(b) => out.resize(len, b),
        Pattern::Text => {
            while out.len() < len {
                let bits = rng.next_u64();
                out.extend_from_slice(WORDS[(bits & 7) as usize]);
                if bits & 0x18 == 0 {
                    out.extend_from_slice(format!("{:x}", bits >> 40).as_bytes());
                }
            }
        }
        Pattern::Random => {
            while out.len() < len {
                out.extend_from_slice(&rng.next_u64().to_le_bytes());
            }
        }
    }
    out.truncate(len);
    out
}

/// A disk of `len` bytes as disks are: stretches of text, random bytes, repeated bytes and zeros of
/// very different lengths, beginning and ending at odd places.
pub fn disk(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let pattern = match rng.below(8) {
            0..=2 => Pattern::Zero,
            3..=5 => Pattern::Text,
            6 => Pattern::Random,
            _ => Pattern::Byte((rng.next_u64() | 1) as u8),
        };
        // From one sector to 256 KiB, short ones as likely as long ones; one in four not sector-sized.
        let mut run = (512usize << rng.below(9)) + 512 * rng.below(4);
        if rng.below(4) == 0 {
            run += rng.below(511);
        }
        out.extend_from_slice(&fill(pattern, rng.next_u64(), run.min(len - out.len())));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_reproducible_and_as_long_as_asked() {
        assert_eq!(disk(7, 1_000_001), disk(7, 1_000_001));
        assert_eq!(disk(7, 1_000_001).len(), 1_000_001);
        assert_ne!(disk(7, 4096), disk(8, 4096));
        assert_eq!(fill(Pattern::Text, 1, 777).len(), 777);
    }

    #[test]
    fn a_disk_has_zeros_and_data() {
        let disk = disk(1, 1 << 20);
        let zero = disk.chunks(4096).filter(|c| c.iter().all(|&b| b == 0)).count();
        assert!((16..240).contains(&zero), "{zero} of 256 blocks are zero");
    }
}
