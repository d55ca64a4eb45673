//! Whether two images show the guest the same bytes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use crate::convert::Monitor;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{Extent, Source};
use crate::parallel::fitting;
use crate::reader::Reader;

/// Bytes that are read of each image at once.
const STEP: u64 = 1 << 20;

/// Bytes that all threads together keep at most.
const MEMORY: u64 = 256 << 20;

/// How to compare.
#[derive(Debug, Clone, Copy, Default)]
pub struct CompareOptions {
    /// Sizes must be equal too, and in each place both images must hold the same: nothing, zeros, plain or compressed
    /// data, with or without a place in a file (as `qemu-img compare -s`).
    pub strict: bool,
    /// Threads; `None`: one for each CPU that this process may use. Fewer are started where packed units are so large
    /// that all of them would take more than 256 MiB.
    pub threads: Option<usize>,
}

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Comparison {
    /// The same bytes.
    Identical {
        /// One image is longer, by zeros.
        sizes_differ: bool,
    },
    /// The sizes differ (strict only).
    SizesDiffer,
    /// One image holds something else than the other, in the sense of [`CompareOptions::strict`].
    StatusDiffers {
        /// The first guest offset.
        at: u64,
    },
    /// The bytes differ.
    ContentDiffers {
        /// The first guest offset, in bytes.
        at: u64,
    },
}

/// Compares two images by their maps: only what at least one of them holds as data is read.
///
/// # Errors
/// Any [`Kind`](crate::Kind) that reading an image may give; `Cancelled` if `monitor` was cancelled.
pub fn compare(a: &Image, b: &Image, options: &CompareOptions, monitor: &Monitor) -> Result<Comparison> {
    if options.strict && a.size() != b.size() {
        return Ok(Comparison::SizesDiffer);
    }
    let total = a.size().max(b.size());
    monitor.start(total);
    let shared = Shared {
        walk: Mutex::new(Walk {
            images: [a, b],
            at: 0,
            total,
            strict: options.strict,
            status: None,
            failed: None,
        }),
        first: AtomicU64::new(u64::MAX),
        monitor,
    };
    let most = fitting(MEMORY, STEP, [a.packed_unit(), b.packed_unit()]);
    std::thread::scope(|scope| {
        let shared = &shared;
        let helpers = move || {
            for _ in 1..options.threads.unwrap_or_else(diskmill_io::cpus).min(most) {
                // With fewer threads than planned the work gets done all the same.
                if std::thread::Builder::new().spawn_scoped(scope, || shared.work(a, b, None)).is_err() {
                    break;
                }
            }
        };
        shared.work(a, b, Some(&helpers));
    });
    let walk = shared.walk.into_inner().unwrap_or_else(PoisonError::into_inner);
    let first = shared.first.into_inner();
    match (walk.status, walk.failed) {
        // An error says nothing of what lies before it; a difference before it does.
        (_, Some((at, error))) if at <= first => Err(error),
        (Some(at), _) if at <= first => Ok(Comparison::StatusDiffers { at }),
        _ if first < u64::MAX => Ok(Comparison::ContentDiffers { at: first }),
        _ => Ok(Comparison::Identical { sizes_differ: a.size() != b.size() }),
    }
}

struct Shared<'a> {
    walk: Mutex<Walk<'a>>,
    /// The smallest offset at which a difference was found.
    first: AtomicU64,
    monitor: &'a Monitor,
}

struct Walk<'a> {
    images: [&'a Image; 2],
    at: u64,
    total: u64,
    strict: bool,
    /// Where the allocation differs.
    status: Option<u64>,
    /// The first failure and where it was.
    failed: Option<(u64, Error)>,
}

/// What a strict comparison takes for the same: what QEMU's block status tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status {
    present: bool,
    zero: bool,
    packed: bool,
    /// There is a place for it in a file.
    placed: bool,
}

impl Status {
    const fn of(extent: &Extent) -> Self {
        let (zero, packed) =
            (matches!(extent.source, Source::Zero), matches!(extent.source, Source::Packed { .. }));
        let placed = extent.zero_host.is_some() || matches!(extent.source, Source::Raw { .. });
        Self { present: extent.present, zero, packed, placed }
    }
}

/// Which images hold data in a range.
struct Step {
    guest: Range<u64>,
    data: [bool; 2],
}

impl Walk<'_> {
    /// The next range that has to be read.
    fn next(&mut self, monitor: &Monitor) -> Result<Option<Step>> {
        while self.at < self.total && self.status.is_none() && self.failed.is_none() {
            if monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            let start = self.at;
            let mut end = self.total;
            let mut data = [false; 2];
            let mut status = [None; 2];
            for ((image, data), status) in self.images.into_iter().zip(&mut data).zip(&mut status) {
                // Past its end an image counts as zeros.
                if start < image.size() {
                    let extent = image.map(start, end - start).map_err(|error| error.error)?;
                    end = extent.guest.end;
                    *data = extent.source != Source::Zero;
                    *status = Some(Status::of(&extent));
                }
            }
            if self.strict && status.first() != status.last() {
                self.status = Some(start);
                break;
            }
            if data == [false; 2] {
                self.at = end;
                monitor.add_done(end - start);
                continue;
            }
            self.at = end.min(start.saturating_add(STEP));
            return Ok(Some(Step { guest: start..self.at, data }));
        }
        Ok(None)
    }
}

impl Shared<'_> {
    /// Compares until nothing is left. `helpers` starts the other threads, when there is something to read.
    fn work(&self, a: &Image, b: &Image, mut helpers: Option<&dyn Fn()>) {
        let mut readers = [a.reader(), b.reader()];
        let mut bufs = [Vec::new(), Vec::new()];
        loop {
            let step = {
                let mut walk = self.walk.lock().unwrap_or_else(PoisonError::into_inner);
                // Nothing behind a difference matters.
                if walk.at > self.first.load(Relaxed) {
                    return;
                }
                match walk.next(self.monitor) {
                    Ok(Some(step)) => step,
                    Ok(None) => return,
                    Err(error) => {
                        let at = walk.at;
                        walk.failed.get_or_insert((at, error));
                        return;
                    }
                }
            };
            if let Some(start) = helpers.take() {
                start();
            }
            match difference(&step, &mut readers, &mut bufs) {
                Ok(None) => {}
                Ok(Some(at)) => {
                    self.first.fetch_min(at, Relaxed);
                }
                Err(error) => {
                    let mut walk = self.walk.lock().unwrap_or_else(PoisonError::into_inner);
                    let earlier = walk.failed.take().filter(|(at, _)| *at <= step.guest.start);
                    walk.failed = Some(earlier.unwrap_or((step.guest.start, error)));
                }
            }
            self.monitor.add_done(step.guest.end - step.guest.start);
        }
    }
}

/// The first offset in `step` at which the images differ.
fn difference(step: &Step, readers: &mut [Reader<'_>; 2], bufs: &mut [Vec<u8>; 2]) -> Result<Option<u64>> {
    let len = (step.guest.end - step.guest.start) as usize;
    for ((reader, buf), data) in readers.iter_mut().zip(bufs.iter_mut()).zip(step.data) {
        buf.resize(len, 0);
        if data {
            reader.read_at(buf, step.guest.start)?;
        } else {
            buf.fill(0);
        }
    }
    let [one, other] = &*bufs;
    if one == other {
        return Ok(None);
    }
    let differs = one.iter().zip(other).position(|(one, other)| one != other);
    Ok(differs.map(|at| step.guest.start + at as u64))
}
