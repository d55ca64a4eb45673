//! Filling an image that holds data already (`-n`), by guest writes into it.

use std::sync::{Mutex, PoisonError};

use diskmill_codec::runs;

use super::{BadList, ConvertOptions, Monitor, SALVAGE_STEP};
use crate::edit::{BitmapCopy, ZeroHow};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{MapError, Source};
use crate::parallel::{fitting, in_parallel};

/// Guest bytes that are read and written at once.
const STEP: u64 = 2 << 20;
/// Zeros that are written at once: between two of them the conversion can be cancelled.
const ZERO_STEP: u64 = 1 << 30;

/// How many threads fill `target`: no more than the memory suffices for.
pub(super) fn threads(sources: &[Image], target: &Image, options: &ConvertOptions) -> usize {
    let source = sources.iter().map(Image::packed_unit).max().unwrap_or(0);
    // What is read may be encrypted into a copy.
    let most = fitting(options.memory, STEP, [source, target.packed_unit()]);
    options.threads.unwrap_or_else(diskmill_io::cpus).min(most).max(1)
}

/// Writes the bytes of `sources`, one behind the other, into `target`. What lies behind them stays as it is. Returns what
/// could not be read. Where fresh clusters come to lie depends on which thread is first.
///
/// # Errors
/// Any [`Kind`](crate::Kind); then a part of the target has been overwritten.
pub(super) fn fill(
    sources: &[Image],
    mut target: Image,
    bitmaps: &[BitmapCopy],
    options: &ConvertOptions,
    threads: usize,
    monitor: &Monitor,
) -> Result<BadList> {
    let bad = Mutex::default();
    let done = pour(&Pour { target: &target, options, monitor, bad: &bad }, sources, threads);
    let done = done.and_then(|()| target.copy_bitmaps(bitmaps));
    // After a failure, too, the image is closed in good order.
    let closed = target.close();
    done.and(closed)?;
    Ok(bad.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn pour(pour: &Pour<'_>, sources: &[Image], threads: usize) -> Result<()> {
    let mut walk = Walk { sources, index: 0, at: 0, base: 0 };
    in_parallel(
        threads,
        || walk.next(pour),
        Vec::new,
        |step, buf| {
            pour.step(&step, buf)?;
            pour.monitor.add_done(step.len);
            Ok(())
        },
    )
}

struct Pour<'a> {
    target: &'a Image,
    options: &'a ConvertOptions,
    monitor: &'a Monitor,
    bad: &'a Mutex<BadList>,
}

/// How far the sources are handed out.
struct Walk<'a> {
    sources: &'a [Image],
    /// The current source, the offset in it, and the offset in the target at which it starts.
    index: usize,
    at: u64,
    base: u64,
}

struct Step<'a> {
    source: &'a Image,
    /// First byte in the source.
    at: u64,
    len: u64,
    /// First byte in the target.
    to: u64,
    zero: bool,
}

impl<'a> Walk<'a> {
    fn next(&mut self, pour: &Pour<'_>) -> Result<Option<Step<'a>>> {
        if pour.monitor.is_cancelled() {
            return Err(Error::cancelled());
        }
        let options = pour.options;
        let source = loop {
            let Some(source) = self.sources.get(self.index) else { return Ok(None) };
            if self.at < source.size() {
                break source;
            }
            self.index += 1;
            self.base = self.base.saturating_add(source.size());
            self.at = 0;
        };
        let (at, to) = (self.at, self.base.saturating_add(self.at));
        let (end, zero) = match source.map(at, source.size() - at) {
            Ok(extent) => (extent.guest.end, extent.source == Source::Zero && options.granule() != 0),
            Err(MapError { error, len }) if options.salvage => {
                // As long as the step, so that the next one does not tell of it again.
                let len = len.min(source.size() - at).min(ZERO_STEP);
                pour.bad(to, len, &error);
                (at + len, true)
            }
            Err(MapError { error, .. }) => return Err(error),
        };
        // Steps end where those of the target would, so that few of its clusters are written in two parts.
        let most = if zero { ZERO_STEP } else { STEP - to % STEP };
        let len = (end - at).min(most);
        self.at += len;
        Ok(Some(Step { source, at, len, to, zero }))
    }
}

impl Pour<'_> {
    fn bad(&self, start: u64, len: u64, error: &Error) {
        let mut bad = self.bad.lock().unwrap_or_else(PoisonError::into_inner);
        bad.add(start, len, || error.to_string());
    }

    fn step(&self, step: &Step<'_>, buf: &mut Vec<u8>) -> Result<()> {
        if step.zero {
            return self.zero(step.to, step.len);
        }
        // At most `STEP`.
        buf.resize(step.len as usize, 0);
        self.read(step, buf)?;
        for run in runs(buf, self.options.granule() as usize) {
            let to = step.to + run.start as u64;
            if run.zero {
                self.zero(to, run.len as u64)?;
                continue;
            }
            let bytes = buf.get(run.start..run.start + run.len).unwrap_or_default();
            self.target.write_at(bytes, to)?;
            self.monitor.add_written(run.len as u64);
        }
        Ok(())
    }

    fn zero(&self, to: u64, len: u64) -> Result<()> {
        self.monitor.add_zero(len);
        if self.options.target_is_zero {
            return Ok(());
        }
        self.target.write_zeroes(to, len, ZeroHow::MayUnmap)
    }

    fn read(&self, step: &Step<'_>, buf: &mut [u8]) -> Result<()> {
        self.monitor.add_read(step.len);
        let mut reader = step.source.reader();
        let read = reader.read_at(buf, step.at);
        if read.is_ok() || !self.options.salvage {
            return read;
        }
        // Once more in small parts, so that only what is really lost is given up.
        for (index, part) in buf.chunks_mut(SALVAGE_STEP).enumerate() {
            let skip = (index * SALVAGE_STEP) as u64;
            if let Err(error) = reader.read_at(part, step.at + skip) {
                part.fill(0);
                self.bad(step.to + skip, part.len() as u64, &error);
            }
        }
        Ok(())
    }
}
