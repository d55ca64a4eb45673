//! zlib-rs, by way of flate2.

use std::ops::RangeInclusive;

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Name and version.
pub(crate) const ENGINE: &str = "zlib-rs 0.6";
/// The levels it takes.
pub(crate) const LEVELS: RangeInclusive<i32> = 1..=9;
/// The fastest level whose output is not larger than that of zlib's level 6 with a window of 4 KiB.
pub(crate) const LEVEL: i32 = 3;
/// The last one: with the full window of 32 KiB, zlib-rs's level 6 is larger than zlib's.
pub(crate) const LEVEL_WRAPPED: i32 = 9;

/// A compressor's context.
pub(crate) struct Deflate(Compress);

impl Deflate {
    /// A context for `level`, one of [`LEVELS`]; `None` for any other.
    pub(crate) fn new(level: i32, wrapped: bool) -> Option<Self> {
        let level = u32::try_from(level).ok().filter(|_| LEVELS.contains(&level))?;
        Some(Self(Compress::new(Compression::new(level), wrapped)))
    }

    /// A context for where no level is asked for.
    pub(crate) fn by_default(wrapped: bool) -> Option<Self> {
        Self::new(if wrapped { LEVEL_WRAPPED } else { LEVEL }, wrapped)
    }

    /// Packs `unit` into `out`; `None` if it does not fit.
    pub(crate) fn run(&mut self, unit: &[u8], out: &mut [u8]) -> Option<usize> {
        self.0.reset();
        let done = self.0.compress(unit, out, FlushCompress::Finish);
        matches!(done, Ok(Status::StreamEnd)).then(|| self.0.total_out() as usize)
    }
}

/// A decompressor's context.
pub(crate) struct Inflate(Decompress);

impl Inflate {
    /// A context; never `None`, which stands for want of memory.
    pub(crate) fn new() -> Option<Self> {
        Some(Self(Decompress::new(false)))
    }

    /// Unpacks the stream at the start of `packed` into `unit`. Tells the stream's length and that of what came out;
    /// `None` if the stream is damaged or does not fit.
    pub(crate) fn run(&mut self, wrapped: bool, packed: &[u8], unit: &mut [u8]) -> Option<(usize, usize)> {
        self.0.reset(wrapped);
        let done = self.0.decompress(packed, unit, FlushDecompress::Finish);
        matches!(done, Ok(Status::StreamEnd))
            .then(|| (self.0.total_in() as usize, self.0.total_out() as usize))
    }
}

/// The Adler-32 of `bytes` (RFC 1950).
pub(crate) fn adler32(bytes: &[u8]) -> u32 {
    simd_adler32::adler32(&bytes)
}
