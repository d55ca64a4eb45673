use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use diskmill_codec::Codec;
use diskmill_io::{Buf, Piece, PipeReader, SharedStorage};

use super::buffers::Sizes;
use super::offload::{FileRun, LONGEST, Offload, SHORTEST};
use super::{Assembler, BadList, ConvertOptions, Input};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::{Extent, MapError, Source};
use crate::vmdk::VmdkStream;

/// Guest bytes of a job, unless units are larger. Small enough that a job's bytes stay in the processor's cache from
/// the read to the write, large enough that system calls do not count.
const JOB: u64 = 1 << 20;
/// Extents are joined to a run of zeros up to this many guest bytes, so that there is progress. One extent may be longer.
const ZERO_STEP: u64 = 1 << 30;
/// A zero run inside a job shorter than this is filled in rather than ending the job.
const SHORT_RUN: u64 = 64 << 10;
/// Packed payloads this far apart in their file are still read at once.
const READ_GAP: u64 = 4 << 10;
/// How many of a job's latest reads are looked at for a payload that they may hold already.
const RECENT: usize = 8;

/// Bytes of plans ahead of the workers, which the system is asked to bring into the page cache meanwhile: a few times
/// what a disk has in flight.
const AHEAD: u64 = 8 << 20;
/// Most items in these plans: runs of zeros have no bytes.
const AHEAD_ITEMS: usize = 16;
/// Reads this far apart are asked for as one.
const AHEAD_GAP: u64 = 64 << 10;
/// Most ranges of one job that are asked for: asking is not free where all is in the page cache.
const AHEAD_RANGES: usize = 32;

/// A piece of the guest's disk to be dealt with.
pub(super) struct Item {
    /// Place in guest order, counted from 0.
    pub(super) seq: u64,
    pub(super) guest: Range<u64>,
    pub(super) work: Work,
}

/// A range of a source file that will be read soon.
pub(super) struct Soon {
    file: SharedStorage,
    range: Range<u64>,
}

impl Soon {
    /// Asks the system for it.
    pub(super) fn ask(&self) {
        self.file.will_need(self.range.start, self.range.end - self.range.start);
    }
}

pub(super) enum Work {
    /// Reads as zeros.
    Zero,
    /// The output's backing file has it.
    Skip,
    /// To be read.
    Read(Job),
    /// To be moved without being read.
    Offload(FileRun),
    /// Read already (a pipe); the buffer holds it.
    Loaded,
}

impl Work {
    /// Whether several workers do it sooner than one. Runs of zeros are nothing but an entry in a table, and the kernel
    /// lets one clone at a time into a file: handing those from thread to thread takes longer than some of them.
    pub(super) fn is_shared(&self) -> bool {
        match self {
            Self::Zero | Self::Skip => false,
            Self::Offload(run) => !run.is_cloned(),
            Self::Read(_) | Self::Loaded => true,
        }
    }
}

/// What a worker has to read and unpack.
#[derive(Debug, Default)]
pub(super) struct Job {
    pub(super) pieces: Vec<Piece>,
    /// Which of them read payloads.
    payload_pieces: Vec<usize>,
    /// Which read plain data, straight into the guest area.
    pub(super) raw: Vec<usize>,
    /// Parts that are unpacked from payloads.
    pub(super) packed: Vec<PackedPart>,
    /// Parts of the guest area that are zeros.
    pub(super) fills: Vec<Range<usize>>,
    /// Parts that the worker reads by itself, because the buffer has no room for their payloads.
    pub(super) slow: Vec<(usize, Extent, Range<usize>)>,
    /// Bytes of the buffer in use, guest area and payloads.
    pub(super) buf_len: usize,
}

/// A part of the guest area that is unpacked from a payload in the buffer.
#[derive(Debug, Clone)]
pub(super) struct PackedPart {
    pub(super) piece: usize,
    pub(super) payload: Range<usize>,
    /// Host offset of the payload, for messages.
    pub(super) host: u64,
    pub(super) unit: usize,
    pub(super) skip: usize,
    pub(super) codec: Codec,
    pub(super) dst: Range<usize>,
}

impl PackedPart {
    /// Its payload, which ends at the latest where the next one begins: the source tells lengths in sectors only.
    pub(super) fn payload_before(&self, next: Option<&Self>) -> Range<usize> {
        let next = next.filter(|next| next.piece == self.piece).map(|next| next.payload.start);
        let end = next.filter(|start| self.payload.contains(start) && *start > self.payload.start);
        self.payload.start..end.unwrap_or(self.payload.end)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Zero,
    Skip,
    Data,
}

/// Cuts the source into [`Item`]s.
pub(super) struct Planner<'a> {
    source: SourceWalk<'a>,
    next_seq: u64,
    /// What was planned before a worker asked for it.
    ahead: VecDeque<(Range<u64>, Work)>,
    /// The bytes it reads.
    ahead_bytes: u64,
    sizes: Sizes,
    /// Zeros are data too (`-S 0`).
    allocate_all: bool,
}

enum SourceWalk<'a> {
    Images(Box<ImageWalk<'a>>),
    Stream { pipe: PipeReader, at: u64, ended: bool },
    Vmdk { stream: Box<VmdkStream>, at: u64 },
}

struct ImageWalk<'a> {
    /// Each image and the guest offset at which it starts.
    images: Vec<(u64, &'a Image)>,
    at: u64,
    total: u64,
    backed: bool,
    salvage: bool,
    offload: Offload,
    /// The output places whole units, rather than each byte at its own offset.
    whole_units: bool,
    /// The longest run that the output takes at once, of zeros and of what its backing file has.
    longest_zero: u64,
    longest_skip: u64,
    /// The extent that was looked up last.
    last: Option<(usize, Extent)>,
    bad: BadList,
    /// Up to where bad ranges were told: the walk looks ahead and comes back.
    bad_end: u64,
}

impl<'a> Planner<'a> {
    pub(super) fn new(
        input: Input<'a>,
        assembler: &dyn Assembler,
        options: &ConvertOptions,
        offload: Offload,
    ) -> Result<Self> {
        // An existing target's backing file (-n) need not have anything to do with the source's.
        let backed = options.create && options.format.has_backing_file();
        let packed_unit = match &input {
            Input::Images(images) => images.iter().map(Image::packed_unit).max().unwrap_or(0),
            Input::Stream(_) => 0,
            Input::VmdkStream(stream) => stream.grain_bytes(),
        };
        let unit = assembler.unit();
        // What comes from a pipe cannot be read later.
        let least = match &input {
            Input::VmdkStream(stream) => GrainStep::new(stream, unit).room,
            _ => 0,
        };
        // Jobs begin at multiples of this, which must be ones of the unit.
        let job = JOB.max(unit).max(packed_unit.next_power_of_two());
        let source = match input {
            Input::Stream(pipe) => SourceWalk::Stream { pipe, at: 0, ended: false },
            Input::VmdkStream(stream) => SourceWalk::Vmdk { stream, at: 0 },
            Input::Images(images) => {
                let mut total = 0u64;
                let mut placed = Vec::with_capacity(images.len());
                for image in images {
                    placed.push((total, image));
                    total = total
                        .checked_add(image.size())
                        .ok_or_else(|| Error::invalid("the sources are too large"))?;
                }
                let salvage = options.salvage;
                SourceWalk::Images(Box::new(ImageWalk {
                    images: placed,
                    at: 0,
                    total,
                    backed,
                    salvage,
                    offload,
                    whole_units: assembler.whole_units(),
                    longest_zero: assembler.longest_zero(),
                    longest_skip: assembler.longest_skip(),
                    last: None,
                    bad: BadList::default(),
                    bad_end: 0,
                }))
            }
        };
        // Payloads may be up to twice their unit, and the first and last may stand for a part of it only.
        let packed = if packed_unit == 0 { 0 } else { 2 * job + 4 * packed_unit };
        // What is packed goes into a buffer of the same size, and frames may be larger than their units.
        let framed = assembler.frame().map_or(0, |frame| job / unit * frame.room(unit as usize) as u64);
        let least = least.max(framed.saturating_sub(job));
        // As many buffers as one worker needs must fit; payloads without room are read by themselves.
        let packs = options.compress.is_some() || assembler.frame().is_some();
        let room = (options.memory / Sizes::per_worker(packs)).checked_sub(job).filter(|&room| room >= least);
        let Some(room) = room else {
            let need = (job + least) * Sizes::per_worker(packs);
            return Err(Error::new(
                Kind::Limit,
                format!("{} bytes of memory do not suffice for this conversion", options.memory),
            )
            .hint(format!("its units need --memory {need}")));
        };
        let packed = packed.max(least).min(room);
        let sizes = Sizes { unit, job, packed };
        Ok(Self {
            source,
            next_seq: 0,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            sizes,
            allocate_all: options.granule() == 0,
        })
    }

    pub(super) const fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The next item; `None` at the end. A pipe's bytes are read into `buf`. What the workers will read soon is added
    /// to `soon`.
    pub(super) fn next(&mut self, buf: &mut Buf, soon: &mut Vec<Soon>) -> Result<Option<Item>> {
        let found = match &mut self.source {
            SourceWalk::Images(walk) => {
                while self.ahead_bytes < AHEAD && self.ahead.len() < AHEAD_ITEMS {
                    let Some((guest, work)) = walk.next(&self.sizes, self.allocate_all)? else { break };
                    if let Work::Read(job) = &work {
                        job.announce(soon);
                        self.ahead_bytes += job.bytes();
                    }
                    self.ahead.push_back((guest, work));
                }
                let first = self.ahead.pop_front();
                if let Some((_, Work::Read(job))) = &first {
                    self.ahead_bytes -= job.bytes();
                }
                first
            }
            SourceWalk::Stream { pipe, at, ended } => Self::load(pipe, at, ended, buf, self.sizes.job)?,
            SourceWalk::Vmdk { stream, at } => load_grains(stream, at, buf, &self.sizes, self.allocate_all)?,
        };
        Ok(found.map(|(guest, work)| {
            let seq = self.next_seq;
            self.next_seq += 1;
            Item { seq, guest, work }
        }))
    }

    fn load(
        pipe: &mut PipeReader,
        at: &mut u64,
        ended: &mut bool,
        buf: &mut Buf,
        job: u64,
    ) -> Result<Option<(Range<u64>, Work)>> {
        if *ended {
            return Ok(None);
        }
        buf.set_len(job as usize);
        let got = pipe.fill(buf).map_err(|error| Error::io("cannot read from the pipe", error))?;
        *ended = got < buf.len();
        if got == 0 {
            return Ok(None);
        }
        // Disks consist of 512-byte sectors.
        let len = got.next_multiple_of(512);
        if let Some(pad) = buf.get_mut(got..len) {
            pad.fill(0);
        }
        let start = *at;
        *at = start
            .checked_add(len as u64)
            .ok_or_else(|| Error::invalid("the pipe's data is larger than a disk can be"))?;
        Ok(Some((start..*at, Work::Loaded)))
    }

    /// Size of the disk, known when the last item has been handed out, and what could not be mapped.
    pub(super) fn into_result(self) -> (u64, BadList) {
        match self.source {
            SourceWalk::Images(walk) => (walk.total, walk.bad),
            SourceWalk::Stream { at, .. } => (at, BadList::default()),
            SourceWalk::Vmdk { stream, .. } => (stream.size(), BadList::default()),
        }
    }
}

impl ImageWalk<'_> {
    fn next(&mut self, sizes: &Sizes, allocate_all: bool) -> Result<Option<(Range<u64>, Work)>> {
        if self.at >= self.total {
            return Ok(None);
        }
        let start = self.at;
        let class = self.class_at(start, allocate_all)?;
        if class != Class::Data {
            let longest = if class == Class::Skip { self.longest_skip } else { self.longest_zero };
            let end = self.run_end(start, class, start.saturating_add(ZERO_STEP), allocate_all)?;
            let end = end.min(start.saturating_add(longest));
            let end = if end == self.total { end } else { end - end % sizes.unit };
            if end > start {
                self.at = end;
                let work = if class == Class::Zero { Work::Zero } else { Work::Skip };
                return Ok(Some((start..end, work)));
            }
        }
        if class == Class::Data
            && let Some((end, run)) = self.offload_at(start, sizes)?
        {
            self.at = end;
            return Ok(Some((start..end, Work::Offload(run))));
        }
        let job = self.job(start, sizes, allocate_all)?;
        Ok(Some((start..self.at, Work::Read(job))))
    }

    fn class_at(&mut self, at: u64, allocate_all: bool) -> Result<Class> {
        let backed = self.backed;
        let (_, extent) = self.extent(at)?;
        Ok(match extent.source {
            // The output's own backing file stands for the source's backing chain.
            _ if backed && extent.depth > 0 => Class::Skip,
            Source::Zero if !allocate_all => Class::Zero,
            _ => Class::Data,
        })
    }

    /// What can be moved from `at` on without being read, and up to where.
    fn offload_at(&mut self, at: u64, sizes: &Sizes) -> Result<Option<(u64, FileRun)>> {
        let (index, extent) = self.extent(at)?;
        let Source::Raw { file, at: host } = extent.source.advanced(at - extent.guest.start) else {
            return Ok(None);
        };
        let (host, end) = (host.get(), extent.guest.end);
        let Some(from) = self.offload.file(index, file) else { return Ok(None) };
        let Some(step) = from.step(host, sizes.unit, self.whole_units) else { return Ok(None) };
        let end = end.min(at.saturating_add(LONGEST.max(step)));
        let end = end - end % step;
        let fits = at.is_multiple_of(step) && end.saturating_sub(at) >= SHORTEST.max(step);
        Ok(fits.then(|| (end, FileRun { from: from.clone(), at: host })))
    }

    /// Where the run of `class` from `at` on ends; where it reaches `enough`, the end of the extent that does.
    fn run_end(&mut self, at: u64, class: Class, enough: u64, allocate_all: bool) -> Result<u64> {
        let enough = enough.min(self.total);
        let mut end = at;
        while end < enough && self.class_at(end, allocate_all)? == class {
            end = self.extent(end)?.1.guest.end;
        }
        Ok(end)
    }

    /// The extent that holds guest offset `at` (of all sources together, as its range is).
    fn extent(&mut self, at: u64) -> Result<(usize, &Extent)> {
        if !self.last.as_ref().is_some_and(|(_, extent)| extent.guest.contains(&at)) {
            self.last = Some(self.look_up(at)?);
        }
        match &self.last {
            Some((index, extent)) => Ok((*index, extent)),
            None => Err(Error::invalid("an offset past all sources")),
        }
    }

    fn look_up(&mut self, at: u64) -> Result<(usize, Extent)> {
        let index = self.images.partition_point(|(start, _)| *start <= at).saturating_sub(1);
        // Empty images share their start with the next one, which the search prefers.
        let Some(&(base, image)) = self.images.get(index) else { return Err(Error::invalid("no source")) };
        match image.map(at - base, u64::MAX) {
            Ok(extent) => {
                let guest = extent.guest.start + base..extent.guest.end + base;
                Ok((index, Extent { guest, ..extent }))
            }
            Err(MapError { error, len }) if self.salvage => {
                let end = at.saturating_add(len).min(base + image.size());
                let start = at.max(self.bad_end);
                if start < end {
                    self.bad.add(start, end - start, || error.to_string());
                    self.bad_end = end;
                }
                let extent =
                    Extent { guest: at..end, source: Source::Zero, depth: 0, present: true, zero_host: None };
                Ok((index, extent))
            }
            Err(MapError { error, .. }) => Err(error),
        }
    }

    fn job(&mut self, start: u64, sizes: &Sizes, allocate_all: bool) -> Result<Job> {
        let limit = (start - start % sizes.job).saturating_add(sizes.job).min(self.total);
        let mut job = Job::default();
        let mut packed_end = sizes.job as usize;
        let capacity = (sizes.job + sizes.packed) as usize;
        while self.at < limit {
            let at = self.at;
            let aligned = at.is_multiple_of(sizes.unit);
            if at > start && aligned && self.class_at(at, allocate_all)? != Class::Data {
                // A long run ends the job; a short one is cheaper filled in than sent around.
                let class = self.class_at(at, allocate_all)?;
                let enough = at.saturating_add(sizes.unit.max(SHORT_RUN));
                if self.run_end(at, class, enough, allocate_all)? >= enough.min(self.total) {
                    break;
                }
            }
            if at > start && aligned && self.offload_at(at, sizes)?.is_some() {
                break;
            }
            let (index, extent) = self.extent(at)?;
            let end = extent.guest.end.min(limit);
            let dst = (at - start) as usize..(end - start) as usize;
            let source = extent.source.advanced(at - extent.guest.start);
            let extent = Extent { guest: at..end, source, ..extent.clone() };
            let Some(&(base, image)) = self.images.get(index) else { break };
            match source {
                Source::Zero => job.fills.push(dst),
                Source::Raw { file, at } => {
                    let file = image.file(file)?.storage.clone();
                    job.raw.push(job.pieces.len());
                    job.pieces.push(Piece { file, at: at.get(), buf_at: dst.start, len: dst.len() });
                }
                Source::Packed { file, at: host, len, unit, skip, codec } => {
                    let file = image.file(file)?.storage.clone();
                    let wanted = Wanted { file, at: host.get(), len: len as usize };
                    match job.add_payload(wanted, &mut packed_end, capacity) {
                        Some((piece, payload)) => job.packed.push(PackedPart {
                            piece,
                            payload,
                            host: host.get(),
                            unit: unit as usize,
                            skip: skip as usize,
                            codec,
                            dst,
                        }),
                        None => {
                            let guest = extent.guest.start - base..extent.guest.end - base;
                            job.slow.push((index, Extent { guest, ..extent }, dst));
                        }
                    }
                }
            }
            self.at = end;
        }
        job.buf_len = if packed_end > sizes.job as usize { packed_end } else { sizes.job as usize };
        Ok(job)
    }
}

struct Wanted {
    file: SharedStorage,
    at: u64,
    len: usize,
}

impl Job {
    /// Bytes that its pieces read.
    fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.len as u64).sum()
    }

    /// Adds the ranges of its reads to `soon`, near ones as one.
    fn announce(&self, soon: &mut Vec<Soon>) {
        let most = soon.len() + AHEAD_RANGES;
        for piece in &self.pieces {
            let range = piece.at..piece.at.saturating_add(piece.len as u64);
            let last = soon.last_mut().filter(|last| Arc::ptr_eq(&last.file, &piece.file));
            if let Some(last) = last
                && (last.range.end..=last.range.end.saturating_add(AHEAD_GAP)).contains(&range.start)
            {
                last.range.end = range.end;
            } else if soon.len() < most {
                soon.push(Soon { file: piece.file.clone(), range });
            }
        }
    }

    /// Room in the buffer for a payload: in a piece that reads it already, at the end of the last piece if the
    /// payload follows it in the file, or in a piece of its own. `None` if the buffer is full.
    fn add_payload(
        &mut self,
        wanted: Wanted,
        end: &mut usize,
        capacity: usize,
    ) -> Option<(usize, Range<usize>)> {
        let Wanted { file, at, len } = wanted;
        for &index in self.payload_pieces.iter().rev().take(RECENT) {
            let piece = self.pieces.get_mut(index)?;
            let piece_end = piece.at + piece.len as u64;
            if !Arc::ptr_eq(&piece.file, &file) || at < piece.at {
                continue;
            }
            let from = piece.buf_at + (at - piece.at) as usize;
            let payload = from..from + len;
            if at + len as u64 <= piece_end {
                return Some((index, payload));
            }
            let last_in_buffer = piece.buf_at + piece.len == *end;
            if last_in_buffer && at <= piece_end + READ_GAP && payload.end <= capacity {
                piece.len = payload.end - piece.buf_at;
                *end = payload.end;
                return Some((index, payload));
            }
        }
        if *end + len > capacity {
            return None;
        }
        let from = *end;
        *end += len;
        self.payload_pieces.push(self.pieces.len());
        self.pieces.push(Piece { file, at, buf_at: from, len });
        Some((self.pieces.len() - 1, from..from + len))
    }
}

/// The least part of a job of grains: one of them, or all those of a unit.
struct GrainStep {
    /// Guest bytes.
    len: u64,
    /// Room in the buffer that its payloads may need.
    room: u64,
}

impl GrainStep {
    fn new(stream: &VmdkStream, unit: u64) -> Self {
        let len = unit.max(stream.grain_bytes());
        Self { len, room: (len / stream.grain_bytes()).saturating_mul(stream.most_for_grain()) }
    }
}

/// The next job of a stream: the payloads of its grains are read into the buffer here, and unpacked by the worker.
fn load_grains(
    stream: &mut VmdkStream,
    at: &mut u64,
    buf: &mut Buf,
    sizes: &Sizes,
    allocate_all: bool,
) -> Result<Option<(Range<u64>, Work)>> {
    let (start, total) = (*at, stream.size());
    if start >= total {
        return Ok(None);
    }
    let next = stream.next_guest().unwrap_or(total);
    let gap = next - next % sizes.job;
    if !allocate_all && (next >= total || gap > start) {
        *at = if next >= total { total } else { gap }.min(start.saturating_add(ZERO_STEP));
        return Ok(Some((start..*at, Work::Zero)));
    }
    let mut end = (start - start % sizes.job).saturating_add(sizes.job).min(total);
    let step = GrainStep::new(stream, sizes.unit);
    buf.set_len(buf.capacity());
    let mut job = Job::default();
    let (mut filled, mut room) = (start, sizes.job as usize);
    while let Some(guest) = stream.next_guest().filter(|&guest| guest < end) {
        let border = guest - guest % step.len;
        let rest = buf.len().saturating_sub(room) as u64;
        if rest < step.room && filled <= border && !job.packed.is_empty() {
            // The next job has room for this one, and for all that belong to the same unit.
            end = border;
            break;
        }
        let rest = buf.get_mut(room..).unwrap_or_default();
        let Some(payload) = stream.take(rest)? else {
            return Err(Error::invalid("a grain that is larger than grains may be"));
        };
        let dst = (payload.guest - start) as usize..(payload.guest - start) as usize + payload.used;
        if payload.guest > filled {
            job.fills.push((filled - start) as usize..dst.start);
        }
        filled = payload.guest + payload.used as u64;
        job.packed.push(PackedPart {
            piece: 0,
            payload: room..room + payload.len,
            host: payload.host,
            unit: payload.unit,
            skip: 0,
            codec: Codec::Zlib,
            dst,
        });
        room += payload.len;
    }
    if filled < end {
        job.fills.push((filled - start) as usize..(end - start) as usize);
    }
    job.buf_len = room;
    *at = end;
    Ok(Some((start..end, Work::Read(job))))
}
