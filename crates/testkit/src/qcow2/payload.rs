//! Compressed payloads made by hand: raw deflate (RFC 1951) and zstd frames (RFC 8878), so that no
//! compression library decides what a reader gets to see.

/// Bits into bytes, least significant first (RFC 1951, 3.1.1).
#[derive(Default)]
struct Bits {
    out: Vec<u8>,
    used: u32,
}

impl Bits {
    fn lsb(&mut self, value: u32, count: u32) {
        for i in 0..count {
            if self.used == 0 {
                self.out.push(0);
            }
            let last = self.out.last_mut().expect("pushed above");
            *last |= ((value >> i & 1) as u8) << self.used;
            self.used = (self.used + 1) % 8;
        }
    }

    /// Huffman codes go in most significant bit first.
    fn code(&mut self, code: u32, count: u32) {
        self.lsb(code.reverse_bits() >> (32 - count), count);
    }

    /// A literal in the fixed Huffman code (RFC 1951, 3.2.6).
    fn literal(&mut self, byte: u8) {
        match byte {
            0..=143 => self.code(0x30 + u32::from(byte), 8),
            _ => self.code(0x190 + u32::from(byte) - 144, 9),
        }
    }
}

/// Deflate: `data` in stored blocks, so longer than `data`.
pub fn deflate_stored(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let blocks = data.chunks(0xffff);
    let last = blocks.len().saturating_sub(1);
    for (i, block) in blocks.enumerate() {
        // A chunk is at most 0xffff bytes.
        let len = block.len() as u16;
        out.push(u8::from(i == last));
        out.extend_from_slice(&len.to_le_bytes());
        out.extend_from_slice(&(!len).to_le_bytes());
        out.extend_from_slice(block);
    }
    out
}

/// Deflate: `len` times the same byte, in one fixed-code block.
pub fn deflate_run(byte: u8, len: usize) -> Vec<u8> {
    let mut bits = Bits::default();
    bits.lsb(0b011, 3);
    let mut left = len;
    if left > 0 {
        bits.literal(byte);
        left -= 1;
    }
    // Length 258 is code 285 (0xc0 + 5 in 8 bits); distance 1 is code 0.
    for _ in 0..left / 258 {
        bits.code(0xc5, 8);
        bits.code(0, 5);
    }
    (0..left % 258).for_each(|_| bits.literal(byte));
    bits.code(0, 7);
    bits.out
}

/// Deflate: `head` (32 KiB) once, and then matches at the greatest distance there is, 32 KiB, until
/// the output is `len` bytes. Readers that allow only the 4 KiB window QEMU writes with fail here.
pub fn deflate_far(head: &[u8; 1 << 15], len: usize) -> Vec<u8> {
    let mut bits = Bits { out: deflate_stored(head), used: 0 };
    bits.out[0] = 0;
    bits.lsb(0b011, 3);
    let tail = len - head.len();
    for _ in 0..tail / 258 {
        // Distance 32768: code 29, base 24577, 13 extra bits.
        bits.code(0xc5, 8);
        bits.code(29, 5);
        bits.lsb(8191, 13);
    }
    for i in 0..tail % 258 {
        bits.literal(head[(tail / 258 * 258 + i) % head.len()]);
    }
    bits.code(0, 7);
    bits.out
}

const RAW: u32 = 0;
const RLE: u32 = 1;

/// One frame: single segment, 4-byte content size, blocks of at most 128 KiB.
fn zstd_frame(len: usize, kind: u32, block: impl Fn(usize, usize) -> Vec<u8>) -> Vec<u8> {
    const BLOCK: usize = 128 << 10;
    let mut out = 0xfd2f_b528_u32.to_le_bytes().to_vec();
    out.push(0xa0);
    out.extend_from_slice(&u32::try_from(len).expect("a cluster").to_le_bytes());
    let mut at = 0;
    loop {
        let size = (len - at).min(BLOCK);
        let last = at + size == len;
        let header = u32::from(last) | kind << 1 | (size as u32) << 3;
        out.extend_from_slice(&header.to_le_bytes()[..3]);
        out.extend(block(at, size));
        at += size;
        if last {
            return out;
        }
    }
}

/// Zstd: `data` in raw blocks.
pub fn zstd_stored(data: &[u8]) -> Vec<u8> {
    zstd_frame(data.len(), RAW, |at, size| data[at..at + size].to_vec())
}

/// Zstd: `len` times the same byte.
pub fn zstd_run(byte: u8, len: usize) -> Vec<u8> {
    zstd_frame(len, RLE, |_, _| vec![byte])
}
