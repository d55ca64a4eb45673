//! libdeflate. Packing goes through the safe crate; unpacking by the one entry point that also tells where a stream
//! ends, which that crate does not wrap.
#![allow(unsafe_code)]

use std::ops::RangeInclusive;
use std::ptr::NonNull;

use libdeflate_sys::{
    libdeflate_alloc_decompressor, libdeflate_decompressor, libdeflate_deflate_decompress_ex,
    libdeflate_free_decompressor, libdeflate_result_LIBDEFLATE_SUCCESS as SUCCESS,
    libdeflate_zlib_decompress_ex,
};
pub(crate) use libdeflater::adler32;
use libdeflater::{CompressionLvl, Compressor};

/// Name and version.
pub(crate) const ENGINE: &str = "libdeflate 1.26";
/// The levels it takes.
pub(crate) const LEVELS: RangeInclusive<i32> = 1..=12;
/// The fastest level whose output is about as large as that of zlib's level 6 with a window of 4 KiB: at most 0.2 % larger
/// on file systems full of real files.
pub(crate) const LEVEL: i32 = 1;
/// The same with the full window of 32 KiB.
pub(crate) const LEVEL_WRAPPED: i32 = 6;
/// One unit in so many is packed at the level after [`LEVEL`] where no level is asked for, which makes up for what that is
/// larger: the next level takes a fifth longer, and packs 2 to 3 % smaller.
const FINER: u64 = 8;

/// A compressor's context.
pub(crate) struct Deflate {
    compressor: Compressor,
    /// For one unit in [`FINER`].
    finer: Option<Compressor>,
    wrapped: bool,
}

impl Deflate {
    /// A context for `level`, one of [`LEVELS`]; `None` for any other.
    pub(crate) fn new(level: i32, wrapped: bool) -> Option<Self> {
        let compressor = Compressor::new(CompressionLvl::new(level).ok()?);
        Some(Self { compressor, finer: None, wrapped })
    }

    /// A context for where no level is asked for.
    pub(crate) fn by_default(wrapped: bool) -> Option<Self> {
        if wrapped {
            return Self::new(LEVEL_WRAPPED, true);
        }
        let finer = Some(Compressor::new(CompressionLvl::new(LEVEL + 1).ok()?));
        Some(Self { finer, ..Self::new(LEVEL, false)? })
    }

    /// Packs `unit` into `out`; `None` if it does not fit.
    pub(crate) fn run(&mut self, unit: &[u8], out: &mut [u8]) -> Option<usize> {
        let compressor = match &mut self.finer {
            Some(finer) if is_chosen(unit) => finer,
            _ => &mut self.compressor,
        };
        // Want of space is libdeflate's only error.
        if self.wrapped {
            compressor.zlib_compress(unit, out).ok()
        } else {
            compressor.deflate_compress(unit, out).ok()
        }
    }
}

/// Chooses about one unit in [`FINER`], by its content alone, so that the output is the same for any number of threads.
fn is_chosen(unit: &[u8]) -> bool {
    let word = unit.get(unit.len() / 2..).and_then(|rest| rest.first_chunk::<8>());
    let hash = word.map_or(0, |word| u64::from_le_bytes(*word).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32);
    // Not the 0 of zeros, of which there are many.
    hash % FINER == 1
}

/// A decompressor's context.
pub(crate) struct Inflate(NonNull<libdeflate_decompressor>);

// SAFETY: the context is plain memory that only this value points to; libdeflate ties it to no thread.
unsafe impl Send for Inflate {}

impl Inflate {
    /// A context, or `None` for want of memory.
    pub(crate) fn new() -> Option<Self> {
        // SAFETY: takes nothing; a null answer is handled.
        NonNull::new(unsafe { libdeflate_alloc_decompressor() }).map(Self)
    }

    /// Unpacks the stream at the start of `packed` into `unit`. Tells the stream's length and that of what came out;
    /// `None` if the stream is damaged or does not fit.
    pub(crate) fn run(&mut self, wrapped: bool, packed: &[u8], unit: &mut [u8]) -> Option<(usize, usize)> {
        let entry = if wrapped { libdeflate_zlib_decompress_ex } else { libdeflate_deflate_decompress_ex };
        let (mut used, mut got) = (0, 0);
        // SAFETY: the context is live and borrowed mutably; both slices are passed with their own lengths, and
        // libdeflate reads and writes within them only; the two results are valid places for a `usize`.
        let result = unsafe {
            entry(
                self.0.as_ptr(),
                packed.as_ptr().cast(),
                packed.len(),
                unit.as_mut_ptr().cast(),
                unit.len(),
                &raw mut used,
                &raw mut got,
            )
        };
        (result == SUCCESS && used <= packed.len() && got <= unit.len()).then_some((used, got))
    }
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: allocated in `new`, freed only here.
        unsafe { libdeflate_free_decompressor(self.0.as_ptr()) }
    }
}
