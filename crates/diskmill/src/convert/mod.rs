//! The mover: brings guest bytes from one or several images into a fresh one.
//!
//! The planner walks the source's map and cuts it into jobs in guest order; zero runs never become jobs. Workers, one
//! per CPU, read a job's bytes, unpack, look for zeros, pack. The placer decides in guest order where units go, so the
//! output is the same for any number of threads. Tables and, last of all, the header follow; then the output gets
//! its name.

mod assembler;
mod bad;
mod bitmaps;
mod buffers;
mod existing;
mod fill;
mod monitor;
mod needed;
mod offload;
mod options;
mod pack;
mod placer;
mod planner;
mod raw;
mod target;
mod worker;

use std::path::{Path, PathBuf};
use std::time::Instant;

use diskmill_codec::Codec;
use diskmill_io::{EnginePlan, PipeReader, PipeWriter};

pub(crate) use assembler::{Assembler, Finish, Frame, RUN, TargetFile, Unit, WriteOp};
pub use bad::{BadRange, BadRanges};
pub use bitmaps::CarryBitmaps;
pub use monitor::Monitor;
pub use options::{Compression, ConvertOptions, RawOptions, Reflink, TargetFormat};

use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{Extent, Source};
use crate::vmdk::VmdkStream;
use bad::BadList;
use bitmaps::Carried;
use buffers::Buffers;
use existing::Existing;
use needed::Needed;
use placer::Placer;
use planner::Planner;
use target::Target;
use worker::Shared;

/// Extents of each source that are looked at for a packed one.
const LOOKED_AT: usize = 1024;
/// Extents that are looked at to find that there is no data.
const QUICK_LOOK: usize = 4;
/// What is given up for one unreadable spot of plain data, in bytes: a page, which is what the system reads at least.
const SALVAGE_STEP: usize = 4096;

/// Where the bytes come from.
pub enum Input<'a> {
    /// Images, one behind the other.
    Images(&'a [Image]),
    /// Raw bytes up to the end of a pipe.
    Stream(PipeReader),
    /// A streamOptimized VMDK from a pipe.
    VmdkStream(Box<VmdkStream>),
}

impl Input<'_> {
    /// Refuses images that may change meanwhile: what is read is looked up long before, and without the image's locks.
    fn refuse_writable(&self) -> Result<()> {
        let Self::Images(images) = self else { return Ok(()) };
        images.iter().filter(|image| image.writer().is_some()).try_for_each(|image| {
            let error = Error::unsupported("converting an image that is open for writing");
            image.named(Err(error.hint("close it and open it for reading")))
        })
    }
}

impl<'a, T: AsRef<[Image]> + ?Sized> From<&'a T> for Input<'a> {
    fn from(images: &'a T) -> Self {
        Self::Images(images.as_ref())
    }
}

/// Where the image goes.
pub enum Output {
    /// A file or block device.
    Path(PathBuf),
    /// A pipe; raw, and VMDK of subformat streamOptimized.
    Stream(PipeWriter),
}

impl<P: Into<PathBuf>> From<P> for Output {
    fn from(path: P) -> Self {
        Self::Path(path.into())
    }
}

/// What a conversion did.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Summary {
    /// Size of the guest's disk in bytes.
    pub virtual_size: u64,
    /// Bytes read from the source's files, without metadata.
    pub bytes_read: u64,
    /// Bytes written to the output's files, metadata included, without what was cloned or copied in the kernel.
    pub bytes_written: u64,
    /// Guest bytes that are zeros and were not written.
    pub bytes_zero: u64,
    /// Guest bytes whose packed form was taken over from the source, checked (unless
    /// [`ConvertOptions::trust_packed`]) but not packed anew.
    pub bytes_passed: u64,
    /// Guest bytes that were packed anew.
    pub bytes_packed: u64,
    /// Bytes whose blocks the output shares with the source: neither read nor written.
    pub bytes_cloned: u64,
    /// Bytes that were copied inside the kernel.
    pub bytes_copied: u64,
    /// The I/O engine that ran: `io_uring` or `sync`.
    pub engine: &'static str,
    /// Why that one.
    pub engine_reason: String,
    /// Worker threads.
    pub threads: usize,
    /// Seconds of wall clock.
    pub seconds: f64,
    /// What could not be read. Empty unless salvaging.
    pub bad_ranges: BadRanges,
    /// Names of the source's bitmaps that were left out because they were not saved.
    pub skipped_bitmaps: Vec<String>,
}

/// Converts `input` into a fresh image at `output`.
///
/// Unless the output is a device, a pipe or an existing file that is to be filled ([`ConvertOptions::create`]), it is
/// written beside its final name and renamed when whole: after an error the old file is still there, or none.
///
/// # Errors
/// Any [`Kind`](crate::Kind). `Corrupt` for damage of the source, unless salvaging; `Cancelled` if `monitor` was cancelled;
/// `Unsupported` for a source that is open for writing: its clusters might move while they are read.
pub fn convert<'a>(
    input: impl Into<Input<'a>>,
    output: Output,
    options: &ConvertOptions,
    monitor: &Monitor,
) -> Result<Summary> {
    let started = Instant::now();
    let input = input.into();
    input.refuse_writable()?;
    let (summary, target) = run(input, output, options, monitor, started, Naming::AtOnce)?;
    target.map_or(Ok(()), |target| target.publish(options.sync))?;
    monitor.finish();
    Ok(Summary { seconds: started.elapsed().as_secs_f64(), ..summary })
}

/// As [`convert`] to a new file at `path`, which the caller goes on working on before it gets its name.
///
/// # Errors
/// As [`convert`]; [`Kind::Unsupported`](crate::Kind::Unsupported) if `path` is a device or the output takes several files;
/// [`Kind::Invalid`](crate::Kind::Invalid) without [`ConvertOptions::create`].
pub fn convert_unnamed<'a>(
    input: impl Into<Input<'a>>,
    path: impl Into<PathBuf>,
    options: &ConvertOptions,
    monitor: &Monitor,
) -> Result<(Summary, Unnamed)> {
    let (input, path) = (input.into(), path.into());
    input.refuse_writable()?;
    if !options.create {
        return Err(Error::invalid("an existing image has its name already").of(&path));
    }
    // Nothing of a device is touched.
    if std::fs::metadata(&path).is_ok_and(|meta| !meta.is_file()) {
        return Err(Error::unsupported("an output that exists and is not a regular file").of(&path));
    }
    let output = Output::Path(path);
    let (summary, target) = run(input, output, options, monitor, Instant::now(), Naming::Later)?;
    let target = target.ok_or_else(|| Error::invalid("an output without a file of its own"))?;
    monitor.finish();
    Ok((summary, Unnamed(target)))
}

/// A whole image under a temporary name, beside the one that [`publish`](Self::publish) gives it. Dropped before that, it is
/// removed.
pub struct Unnamed(Target);

impl Unnamed {
    /// The temporary name. The file may be changed, but not replaced.
    pub fn path(&self) -> &Path {
        self.0.temporary_path().unwrap_or(Path::new(""))
    }

    /// Gives the image its name, replacing what had it. With `sync`, content and name are durable when this returns.
    ///
    /// # Errors
    /// [`Kind::Io`](crate::Kind::Io); the old file is still there then, or none.
    pub fn publish(self, sync: bool) -> Result<()> {
        self.0.publish(sync)
    }
}

/// When the output gets its name.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Naming {
    AtOnce,
    Later,
}

/// Converts up to the output's name. Nothing is left to be named where an existing image was filled.
fn run(
    input: Input<'_>,
    output: Output,
    options: &ConvertOptions,
    monitor: &Monitor,
    started: Instant,
    naming: Naming,
) -> Result<(Summary, Option<Target>)> {
    let (sources, size): (&[Image], _) = match &input {
        Input::Images(images) => (images, Some(total_size(images)?)),
        Input::Stream(_) => (&[], None),
        Input::VmdkStream(stream) => (&[], Some(stream.size())),
    };
    let mut options = settled(options, &input, &output)?;
    let carried = Carried::collect(sources, &options)?;
    let adopted = match &output {
        Output::Path(path) if !options.create && options.format.has_tables() => {
            let found =
                Needed::new(sources).refuse(path).and_then(|()| existing::open(path, &mut options, size));
            match found.map_err(|error| error.of(path))? {
                Existing::Empty(size) => Some(size),
                Existing::Holding(image) => {
                    let filled = fill_holding(input, (*image, path), carried, &options, monitor, started)?;
                    return Ok((filled, None));
                }
            }
        }
        _ => None,
    };
    let target = Target::open(output, &mut options, sources, size, adopted)?;
    if naming == Naming::Later && target.temporary_path().is_none() {
        return Err(Error::unsupported("working on an output of several files before they have their names"));
    }
    let assembler = target.assembler(&options, size)?;
    if let Some(size) = size {
        assembler.check_size(size)?;
    }
    target.lengthen(&assembler.other_lens())?;
    monitor.start(size.unwrap_or(0));

    let wants_uring = options.direct || target.is_device() || sources.iter().any(is_on_device);
    let plan = EnginePlan::probe(options.engine, wants_uring);
    let packer = options.packer(&*assembler)?;
    // Tables go through the page cache, which may read the rest of a page and write it back later: no direct write of
    // data in the same page may be under way meanwhile.
    let shares_pages = options.direct && (packer.is_some() || assembler.unit() < diskmill_io::page_size());
    let overlapping = wants_uring && plan.kind != "sync" && !shares_pages;
    let fingerprint = assembler.wants_fingerprint();
    let (subunit, whole_units, frame) = (assembler.subunit(), assembler.whole_units(), assembler.frame());
    let offload = target.offload(sources, &options, packer.is_some())?;
    let planner = Planner::new(input, &*assembler, &options, offload)?;
    let buffers = Buffers::new(&planner, &options, packer.is_some(), plan.kind != "sync");
    let threads = buffers.workers();

    let shared = Shared {
        depth: buffers.depth(),
        planner: planner.into(),
        placer: Placer::new(assembler, &target, overlapping),
        buffers,
        sources,
        packer,
        pass_packed: !options.recompress
            && options.compress.is_none_or(|compression| compression.level.is_none()),
        trust_packed: options.trust_packed && !options.salvage,
        frame,
        fingerprint,
        subunit,
        whole_units,
        options: &options,
        monitor,
        plan: &plan,
        bad: Default::default(),
        failed: Default::default(),
    };
    worker::run(&shared, threads);
    let (mut placer, size, bad) = shared.into_result()?;
    let size = target.virtual_size(size);
    placer.finish(size, &options, monitor)?;
    drop(placer);
    target.add_bitmaps(&carried.bitmaps)?;

    let summary = Summary {
        virtual_size: size,
        engine: plan.kind,
        engine_reason: plan.reason,
        threads,
        seconds: started.elapsed().as_secs_f64(),
        bad_ranges: merged(bad),
        skipped_bitmaps: carried.skipped,
        ..Summary::of_bytes(monitor)
    };
    Ok((summary, Some(target)))
}

/// The options with all that follows from what is read and written.
fn settled(options: &ConvertOptions, input: &Input<'_>, output: &Output) -> Result<ConvertOptions> {
    let mut options = options.clone();
    options.settle(output)?;
    if let TargetFormat::Qcow2(qcow2) = &mut options.format
        && options.compress.is_some_and(|compression| compression.level.is_none())
        && options.create
        && !options.recompress
        && let Some(unit) = packed_unit(input, qcow2.codec())
    {
        qcow2.fit_clusters(unit);
    }
    if let Input::Images(images) = input
        && options.threads.is_none()
        && images.iter().all(has_no_data)
    {
        // To ask how many CPUs there are takes a tenth of the time that a conversion of nothing takes.
        options.threads = Some(1);
    }
    Ok(options)
}

/// Writes into an image that holds something (`-n`).
fn fill_holding(
    input: Input<'_>,
    (image, path): (Image, &Path),
    carried: Carried,
    options: &ConvertOptions,
    monitor: &Monitor,
    started: Instant,
) -> Result<Summary> {
    let Input::Images(sources) = input else {
        return Err(
            Error::unsupported("filling (-n) an existing image that holds something from a pipe").of(path)
        );
    };
    let virtual_size = image.size();
    let size = total_size(sources)?;
    target::fits(virtual_size, Some(size)).map_err(|error| error.of(path))?;
    monitor.start(size);
    let threads = fill::threads(sources, &image, options);
    let bad = fill::fill(sources, image, &carried.bitmaps, options, threads, monitor)?;
    monitor.finish();
    Ok(Summary {
        virtual_size,
        engine: "sync",
        engine_reason: "an existing image is written cluster by cluster".to_owned(),
        threads,
        seconds: started.elapsed().as_secs_f64(),
        bad_ranges: bad.into(),
        skipped_bitmaps: carried.skipped,
        ..Summary::of_bytes(monitor)
    })
}

impl Summary {
    /// What was counted.
    fn of_bytes(monitor: &Monitor) -> Self {
        Self {
            bytes_read: monitor.bytes_read(),
            bytes_written: monitor.bytes_written(),
            bytes_zero: monitor.bytes_zero(),
            bytes_passed: monitor.bytes_passed(),
            bytes_packed: monitor.bytes_packed(),
            bytes_cloned: monitor.bytes_cloned(),
            bytes_copied: monitor.bytes_copied(),
            ..Self::default()
        }
    }
}

/// What could not be mapped and what could not be read: no byte is told twice.
fn merged((unmapped, unread): (BadList, BadList)) -> BadRanges {
    unmapped.join(unread).into()
}

/// Whether a quick look shows that an image is empty.
fn has_no_data(image: &Image) -> bool {
    let is_zero = |extent: Result<Extent>| extent.is_ok_and(|extent| matches!(extent.source, Source::Zero));
    let mut extents = image.extents(0..image.size());
    extents.by_ref().take(QUICK_LOOK).all(is_zero) && extents.next().is_none()
}

/// Bytes of the source's first packed unit whose payload can be taken over in `codec`.
fn packed_unit(input: &Input<'_>, codec: Codec) -> Option<u64> {
    let first = match input {
        Input::Images(images) => images
            .iter()
            .flat_map(|image| image.extents(0..image.size()).take(LOOKED_AT))
            .find_map(|extent| match extent.ok()?.source {
                Source::Packed { unit, codec, .. } => Some((u64::from(unit), codec)),
                _ => None,
            }),
        Input::Stream(_) => None,
        Input::VmdkStream(stream) => Some((stream.grain_bytes(), Codec::Zlib)),
    };
    first.filter(|(_, from)| from.is_kin_of(codec)).map(|(unit, _)| unit)
}

fn is_on_device(image: &Image) -> bool {
    image.files().iter().any(|file| file.storage.is_block_device())
}

fn total_size(images: &[Image]) -> Result<u64> {
    if images.is_empty() {
        return Err(Error::invalid("no source"));
    }
    images
        .iter()
        .try_fold(0u64, |sum, image| sum.checked_add(image.size()))
        .filter(|&size| size <= i64::MAX as u64)
        .ok_or_else(|| Error::invalid("the sources together are larger than a disk can be"))
}
