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
/// The fastest level whose output is not larger than that of zlib's level 6 with a window of 4 KiB.
pub(crate) const LEVEL: i32 = 1;
/// The same with the full window of 32 KiB.
pub(crate) const LEVEL_WRAPPED: i32 = 6;

/// A compressor's context.
pub(crate) struct Deflate {
    compressor: Compressor,
    wrapped: bool,
}

impl Deflate {
    /// A context for `level`, one of [`LEVELS`]; `None` for any other.
    pub(crate) fn new(level: i32, wrapped: bool) -> Option<Self> {
        let compressor = Compressor::new(CompressionLvl::new(level).ok()?);
        Some(Self { compressor, wrapped })
    }

    /// Packs `unit` into `out`; `None` if it does not fit.
    pub(crate) fn run(&mut self, unit: &[u8], out: &mut [u8]) -> Option<usize> {
        // Want of space is libdeflate's only error.
        if self.wrapped {
            self.compressor.zlib_compress(unit, out).ok()
        } else {
            self.compressor.deflate_compress(unit, out).ok()
        }
    }
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
