use crate::is_zero;

/// A fingerprint of `bytes` at guest offset `at`, taken in granules of `granule` bytes: the wrapping sum over a disk does
/// not depend on the order in which its parts come, nor on how zeros are cut. Tells contents apart that differ by
/// accident, not by intent.
#[must_use]
pub fn fingerprint(at: u64, bytes: &[u8], granule: usize) -> u64 {
    let granules = bytes.chunks(granule.max(1)).zip((at..).step_by(granule.max(1)));
    granules
        .filter(|(bytes, _)| !is_zero(bytes))
        .map(|(bytes, at)| mix(mix(at) ^ u64::from(crc32fast::hash(bytes))))
        .fold(0, u64::wrapping_add)
}

/// The finaliser of SplitMix64: spreads each bit over the whole word.
const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_and_places_count() {
        let mut bytes = vec![0u8; 16_384];
        assert_eq!(fingerprint(0, &bytes, 4096), 0);
        bytes[5000] = 1;
        bytes[9000] = 2;
        let whole = fingerprint(0, &bytes, 4096);
        let parts =
            fingerprint(8192, &bytes[8192..], 4096).wrapping_add(fingerprint(0, &bytes[..8192], 4096));
        assert_eq!(whole, parts);
        bytes.swap(5000, 9000);
        assert_ne!(whole, fingerprint(0, &bytes, 4096));
    }
}
