/// The width of a refcount: 1, 2, 4, … 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RefcountWidth {
    order: u32,
}

impl RefcountWidth {
    /// From the header's `refcount_order` (log2 of the bits), 0 to 6.
    #[must_use]
    pub const fn from_order(order: u32) -> Option<Self> {
        if order <= 6 { Some(Self { order }) } else { None }
    }

    /// From the number of bits: 1, 2, 4, 8, 16, 32 or 64.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits.is_power_of_two() && bits <= 64 { Some(Self { order: bits.trailing_zeros() }) } else { None }
    }

    /// log2 of the bits.
    #[must_use]
    pub const fn order(self) -> u32 {
        self.order
    }

    /// Bits in a refcount.
    #[must_use]
    pub const fn bits(self) -> u32 {
        1 << self.order
    }

    /// The largest refcount.
    #[must_use]
    pub const fn max(self) -> u64 {
        u64::MAX >> (64 - self.bits())
    }

    /// Refcounts in a refcount block of `cluster_size` bytes.
    #[must_use]
    pub const fn entries(self, cluster_size: u64) -> u64 {
        (cluster_size * 8) >> self.order
    }

    /// Refcount `index` of `block`, or `None` outside of it.
    ///
    /// Widths under 8 bits start at the least significant bit of each byte; wider ones are
    /// big-endian (specification, "Host cluster management").
    #[must_use]
    pub fn get(self, block: &[u8], index: usize) -> Option<u64> {
        if self.order < 3 {
            let per_byte = 8 >> self.order;
            let byte = *block.get(index / per_byte)?;
            return Some(u64::from(byte) >> self.shift(index % per_byte) & self.max());
        }
        let bytes = 1usize << (self.order - 3);
        let slot = block.get(index.checked_mul(bytes)?..)?.get(..bytes)?;
        Some(slot.iter().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// Sets refcount `index` of `block`. Returns whether the block has that entry and `count` fits it.
    pub fn set(self, block: &mut [u8], index: usize, count: u64) -> bool {
        if count > self.max() {
            return false;
        }
        if self.order < 3 {
            let per_byte = 8 >> self.order;
            let shift = self.shift(index % per_byte);
            let Some(byte) = block.get_mut(index / per_byte) else { return false };
            // `count` and the mask are under 2^4 here.
            *byte = *byte & !((self.max() as u8) << shift) | (count as u8) << shift;
            return true;
        }
        let bytes = 1usize << (self.order - 3);
        let start = index.saturating_mul(bytes);
        let Some(slot) = block.get_mut(start..).and_then(|rest| rest.get_mut(..bytes)) else { return false };
        slot.copy_from_slice(&count.to_be_bytes()[8 - bytes..]);
        true
    }

    const fn shift(self, position: usize) -> u32 {
        position as u32 * self.bits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_of_each_width() {
        let encode = |bits, counts: &[u64]| {
            let mut block = [0u8; 16];
            let width = RefcountWidth::from_bits(bits).unwrap();
            for (index, &count) in counts.iter().enumerate() {
                assert!(width.set(&mut block, index, count));
                assert_eq!(width.get(&block, index), Some(count));
            }
            block
        };
        assert_eq!(encode(1, &[1, 0, 1, 1, 0, 0, 0, 0, 1])[..2], [0b1101, 1]);
        assert_eq!(encode(4, &[1, 2, 3])[..2], [0x21, 0x03]);
        assert_eq!(encode(16, &[1, 0x203])[..4], [0, 1, 2, 3]);
        assert_eq!(encode(64, &[9])[..8], [0, 0, 0, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn bounds() {
        for bits in [1, 2, 4, 8, 16, 32, 64] {
            let width = RefcountWidth::from_bits(bits).unwrap();
            let entries = width.entries(512) as usize;
            let mut block = [0u8; 512];
            assert!(width.set(&mut block, entries - 1, width.max()));
            assert_eq!(width.get(&block, entries - 1), Some(width.max()));
            assert!(!width.set(&mut block, entries, 0) && width.get(&block, entries).is_none());
            assert!(bits == 64 || !width.set(&mut block, 0, width.max() + 1));
        }
        assert!(RefcountWidth::from_bits(3).is_none() && RefcountWidth::from_bits(128).is_none());
    }
}
