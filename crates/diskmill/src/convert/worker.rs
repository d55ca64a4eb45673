use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_codec::{Codec, Packer, Unpacker, fingerprint, is_zero};
use diskmill_crypt::SECTOR;
use diskmill_io::{Batch, Buf, Direction, Done, Engine, EnginePlan, Full, Piece};

use super::assembler::{Frame, Unit, WriteWhat};
use super::buffers::{Buffers, Credit};
use super::options::make_packer;
use super::pack::{JobPacker, Pass};
use super::placer::{Filled, FilledKind, Placer, WriteSet};
use super::planner::{Item, Job, PackedPart, Planner, Soon, Work};
use super::{BadList, ConvertOptions, Monitor, SALVAGE_STEP};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::reader::read_exact;

/// What the workers share.
pub(super) struct Shared<'a> {
    pub(super) planner: Mutex<Planner<'a>>,
    pub(super) placer: Placer<'a>,
    pub(super) buffers: Buffers,
    pub(super) sources: &'a [Image],
    /// With the level, if one is named.
    pub(super) packer: Option<(Codec, Option<i32>)>,
    /// Payloads of the source may be passed on as they are.
    pub(super) pass_packed: bool,
    /// And without a look at what is in them.
    pub(super) trust_packed: bool,
    pub(super) frame: Option<Frame>,
    /// The assembler wants a fingerprint of the content.
    pub(super) fingerprint: bool,
    pub(super) subunit: u64,
    pub(super) whole_units: bool,
    pub(super) options: &'a ConvertOptions,
    pub(super) monitor: &'a Monitor,
    pub(super) plan: &'a EnginePlan,
    pub(super) depth: usize,
    pub(super) bad: Mutex<BadList>,
    /// The first failure ends the conversion.
    pub(super) failed: Mutex<Option<Error>>,
}

impl<'a> Shared<'a> {
    /// The placer, the disk's size, and what could not be mapped or read, or the first failure.
    pub(super) fn into_result(self) -> Result<(Placer<'a>, u64, (BadList, BadList))> {
        if let Some(error) = self.failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let (size, unmapped) =
            self.planner.into_inner().unwrap_or_else(PoisonError::into_inner).into_result();
        let unread = self.bad.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((self.placer, size, (unmapped, unread)))
    }

    fn fail(&self, error: Error) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.buffers.stop();
    }
}

enum InFlight {
    Read(u64, Range<u64>, Job),
    /// Guest bytes that are done when it is written.
    Write(u64),
}

/// Works from `threads` threads, of which this is one, until all is done or something fails.
pub(super) fn run(shared: &Shared<'_>, threads: usize) {
    std::thread::scope(|scope| {
        let helpers = move || {
            for index in 1..threads {
                let spawned = std::thread::Builder::new()
                    .name(format!("worker-{index}"))
                    .spawn_scoped(scope, move || Worker::new(shared).run());
                // With fewer threads than planned the work gets done all the same.
                if spawned.is_err() {
                    break;
                }
            }
        };
        let mut first = Worker::new(shared);
        first.helpers = Some(Box::new(helpers));
        first.run();
    });
}

/// Reads, unpacks, looks for zeros, packs and leaves what it has with the placer, until nothing is left.
struct Worker<'s, 'a> {
    shared: &'s Shared<'a>,
    engine: Box<dyn Engine>,
    unpacker: Unpacker,
    packer: Option<(Codec, Packer)>,
    /// What units are packed into; takes the place of the buffer that goes to the placer.
    scratch: Option<Buf>,
    /// A unit of which the job needs only a part, and which it is: piece and position of its payload.
    partial: (Option<(usize, usize)>, Vec<u8>),
    in_flight: HashMap<u64, InFlight>,
    /// What is to be asked of the system before it is read.
    soon: Vec<Soon>,
    /// Starts the other workers. Called at the first work that several can share: see [`Work::is_shared`].
    helpers: Option<Box<dyn FnOnce() + 's>>,
    next_tag: u64,
    exhausted: bool,
}

impl Drop for Worker<'_, '_> {
    /// A worker that panics must not leave the others waiting for its buffers.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.shared.buffers.stop();
        }
    }
}

impl<'s, 'a> Worker<'s, 'a> {
    fn new(shared: &'s Shared<'a>) -> Self {
        Self {
            engine: shared.plan.engine(shared.depth),
            shared,
            unpacker: Unpacker::new(),
            packer: None,
            scratch: None,
            partial: (None, Vec::new()),
            in_flight: HashMap::new(),
            soon: Vec::new(),
            helpers: None,
            next_tag: 0,
            exhausted: false,
        }
    }

    fn run(mut self) {
        if let Err(error) = self.work() {
            self.shared.fail(error);
        }
    }

    fn work(&mut self) -> Result<()> {
        if let Some((codec, level)) = self.shared.packer {
            self.packer = Some((codec, make_packer(codec, level)?));
            self.scratch = Some(self.buffer()?);
        }
        let mut done = Vec::new();
        loop {
            self.issue()?;
            if self.engine.in_flight() == 0 {
                if self.exhausted {
                    return Ok(());
                }
                continue;
            }
            self.reap(&mut done)?;
        }
    }

    fn buffer(&mut self) -> Result<Buf> {
        let capacity = self.shared.buffers.capacity();
        self.engine.buffer(capacity).map_err(|error| Error::io("no memory for a buffer", error))
    }

    /// Starts reads as long as there are credits and room in the queue.
    fn issue(&mut self) -> Result<()> {
        // Half of the queue is left to writes.
        let reads = self.engine.depth().div_ceil(2);
        while !self.exhausted && self.engine.in_flight() < reads {
            if self.shared.monitor.is_cancelled() {
                return Err(Error::cancelled());
            }
            let mut buf = match self.shared.buffers.take(self.engine.in_flight() == 0) {
                Some(Credit::Used(buf)) => buf,
                Some(Credit::Fresh) => self.buffer()?,
                None => {
                    // Either the conversion ends, or there is something in flight to wait for.
                    self.exhausted = self.engine.in_flight() == 0;
                    return Ok(());
                }
            };
            let next = {
                let mut planner = self.shared.planner.lock().unwrap_or_else(PoisonError::into_inner);
                planner.next(&mut buf, &mut self.soon)?
            };
            self.soon.drain(..).for_each(|soon| soon.ask());
            let Some(Item { seq, guest, work }) = next else {
                self.exhausted = true;
                self.shared.buffers.give_back(buf);
                return Ok(());
            };
            if work.is_shared()
                && let Some(start) = self.helpers.take()
            {
                start();
            }
            match work {
                Work::Zero => {
                    self.shared.buffers.give_back(buf);
                    self.deposit(seq, Filled { guest, kind: FilledKind::Zero })?;
                }
                Work::Skip => {
                    self.shared.buffers.give_back(buf);
                    self.deposit(seq, Filled { guest, kind: FilledKind::Skip })?;
                }
                Work::Offload(run) => {
                    let units = (guest.end - guest.start).div_ceil(self.shared.buffers.sizes().unit);
                    let units = vec![Unit::Data { zero: 0 }; units as usize];
                    let content = if self.shared.fingerprint { run.fingerprint(&guest) } else { 0 };
                    let kind = FilledKind::Units { units, buf, run: Some(run), content };
                    self.deposit(seq, Filled { guest, kind })?;
                }
                Work::Loaded => {
                    if self.shared.whole_units {
                        let len = (guest.end - guest.start) as usize;
                        zero(&mut buf, len..len.next_multiple_of(self.shared.buffers.sizes().unit as usize));
                    }
                    self.shared.monitor.add_read(guest.end - guest.start);
                    self.pass_on(seq, guest, buf, &[])?;
                }
                Work::Read(mut job) => {
                    buf.set_len(job.buf_len);
                    let batch = Batch { direction: Direction::Read, pieces: std::mem::take(&mut job.pieces) };
                    self.submit(batch, buf, InFlight::Read(seq, guest, job))?;
                }
            }
        }
        Ok(())
    }

    fn submit(&mut self, mut batch: Batch, mut buf: Buf, what: InFlight) -> Result<()> {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.in_flight.insert(tag, what);
        while let Err(Full(unsent, back)) = self.engine.submit(batch, buf, tag) {
            (batch, buf) = (unsent, back);
            self.reap(&mut Vec::new())?;
        }
        Ok(())
    }

    fn reap(&mut self, done: &mut Vec<Done>) -> Result<()> {
        self.engine.reap(1, done).map_err(|error| Error::io("the I/O engine failed", error))?;
        for done in done.drain(..) {
            match self.in_flight.remove(&done.tag) {
                Some(InFlight::Read(seq, guest, job)) => self.read_done(seq, guest, job, done)?,
                Some(InFlight::Write(guest)) => self.write_done(guest, done)?,
                None => return Err(Error::invalid("the I/O engine finished something that was not begun")),
            }
        }
        Ok(())
    }

    fn write_done(&mut self, guest: u64, done: Done) -> Result<()> {
        if let Some((piece, error)) = done.failed.into_iter().next() {
            let at = done.batch.pieces.get(piece).map_or(0, |piece| piece.at);
            return Err(self.shared.placer.target().write_error(at, error));
        }
        let written = done.batch.pieces.iter().map(|piece| piece.len as u64).sum();
        self.shared.monitor.add_written(written);
        self.shared.monitor.add_done(guest);
        self.shared.buffers.give_back(done.buf);
        Ok(())
    }

    fn read_done(&mut self, seq: u64, guest: Range<u64>, job: Job, done: Done) -> Result<()> {
        let Done { batch, mut buf, failed, .. } = done;
        self.shared.monitor.add_read(batch.pieces.iter().map(|piece| piece.len as u64).sum());
        let mut bad_pieces = Vec::new();
        for (index, error) in failed {
            let Some(piece) = batch.pieces.get(index) else { continue };
            if !self.shared.options.salvage {
                return Err(self.read_error(piece, error));
            }
            bad_pieces.push(index);
        }
        let job_len = self.shared.buffers.sizes().job as usize;
        let len = (guest.end - guest.start) as usize;
        {
            let (area, _) = buf
                .split_at_mut_checked(job_len)
                .ok_or_else(|| Error::invalid("a buffer too small for its job"))?;
            for fill in &job.fills {
                zero(area, fill.clone());
            }
            for piece in bad_pieces.iter().filter(|index| job.raw.contains(index)) {
                if let Some(piece) = batch.pieces.get(*piece) {
                    self.salvage(&guest, piece, area);
                }
            }
        }
        self.reread_payloads(&batch, &job, &bad_pieces, &mut buf);
        let passes = self.unpack(&guest, &batch, &job, &mut buf)?;
        for (image, extent, dst) in &job.slow {
            let Some(source) = self.shared.sources.get(*image) else { continue };
            let Some(part) = buf.get_mut(dst.clone()) else { continue };
            if let Err(error) = source.reader().read_extent(extent, part) {
                part.fill(0);
                self.bad(&guest, dst, error)?;
            }
        }
        if self.shared.whole_units {
            let whole = len.next_multiple_of(self.shared.buffers.sizes().unit as usize);
            zero(&mut buf, len..whole);
        }
        self.pass_on(seq, guest, buf, &passes)
    }

    fn read_error(&self, piece: &Piece, error: std::io::Error) -> Error {
        let error = if error.kind() == std::io::ErrorKind::UnexpectedEof {
            Error::corrupt(
                "guest data",
                Some(piece.at),
                "the file ends here: it is truncated, or shrank while it was read",
            )
        } else {
            Error::io(format!("cannot read {} bytes at offset {:#x}", piece.len, piece.at), error)
        };
        self.named(error, piece)
    }

    /// The error with the path of the piece's file.
    fn named(&self, error: Error, piece: &Piece) -> Error {
        let mut files = self.shared.sources.iter().flat_map(Image::files);
        match files.find(|file| Arc::ptr_eq(&file.storage, &piece.file)) {
            Some(file) => error.of(&file.path),
            None => error,
        }
    }

    /// Damage at `dst` of the guest area: ends the conversion, or is noted when salvaging.
    fn bad(&self, guest: &Range<u64>, dst: &Range<usize>, error: Error) -> Result<()> {
        if !self.shared.options.salvage {
            return Err(error);
        }
        self.report(guest, dst, &error);
        Ok(())
    }

    fn report(&self, guest: &Range<u64>, dst: &Range<usize>, error: &Error) {
        let mut bad = self.shared.bad.lock().unwrap_or_else(PoisonError::into_inner);
        bad.add(guest.start + dst.start as u64, dst.len() as u64, || error.to_string());
    }

    /// Reads a piece of plain data again in small steps, so that only what is really lost is given up.
    fn salvage(&self, guest: &Range<u64>, piece: &Piece, area: &mut [u8]) {
        let mut at = 0;
        while at < piece.len {
            let host = piece.at + at as u64;
            let len = (SALVAGE_STEP - (host % SALVAGE_STEP as u64) as usize).min(piece.len - at);
            let dst = piece.buf_at + at..piece.buf_at + at + len;
            let Some(part) = area.get_mut(dst.clone()) else { return };
            if let Err(error) = read_exact(&*piece.file, part, host) {
                part.fill(0);
                self.report(guest, &dst, &self.named(error, piece));
            }
            at += len;
        }
    }

    /// Reads each payload of a failed piece by itself. What cannot be read will not unpack, and is reported then.
    fn reread_payloads(&self, batch: &Batch, job: &Job, bad_pieces: &[usize], buf: &mut Buf) {
        for part in job.packed.iter().filter(|part| bad_pieces.contains(&part.piece)) {
            let Some(piece) = batch.pieces.get(part.piece) else { continue };
            let Some(payload) = buf.get_mut(part.payload.clone()) else { continue };
            if read_exact(&*piece.file, payload, part.host).is_err() {
                payload.fill(0);
            }
        }
    }

    /// Unpacks the job's payloads into the guest area. Returns those that may be passed on as they are.
    fn unpack(&mut self, guest: &Range<u64>, batch: &Batch, job: &Job, buf: &mut Buf) -> Result<Vec<Pass>> {
        let job_len = self.shared.buffers.sizes().job as usize;
        self.partial.0 = None;
        let unit_size = self.shared.buffers.sizes().unit as usize;
        let mut passes = Vec::new();
        for (index, part) in job.packed.iter().enumerate() {
            let payload = part.payload_before(job.packed.get(index + 1));
            if self.trusts(part, payload.len()) {
                passes.push(Pass { at: part.dst.start, codec: part.codec, payload, unread: true });
                continue;
            }
            let (area, payloads) = buf
                .split_at_mut_checked(job_len)
                .ok_or_else(|| Error::invalid("a buffer too small for its job"))?;
            let payload = part
                .payload
                .start
                .checked_sub(job_len)
                .and_then(|start| payloads.get(start..)?.get(..part.payload.len()));
            let (Some(payload), Some(dst)) = (payload, area.get_mut(part.dst.clone())) else {
                return Err(Error::invalid("a payload outside its buffer"));
            };
            let unpacked = if part.skip == 0 && dst.len() == part.unit {
                self.unpacker.unpack(part.codec, payload, dst).map(|used| {
                    let fits = part.unit == unit_size && part.dst.start.is_multiple_of(unit_size);
                    if let Some(used) = used.filter(|_| fits && self.shared.pass_packed) {
                        let payload = part.payload.start..part.payload.start + used;
                        passes.push(Pass { at: part.dst.start, codec: part.codec, payload, unread: false });
                    }
                })
            } else {
                let (held, unit) = &mut self.partial;
                let key = Some((part.piece, part.payload.start));
                let unpacked = if *held == key {
                    Ok(())
                } else {
                    *held = None;
                    unit.resize(part.unit, 0);
                    self.unpacker.unpack(part.codec, payload, unit).map(|_| ())
                };
                if unpacked.is_ok() {
                    *held = key;
                    match unit.get(part.skip..).and_then(|rest| rest.get(..dst.len())) {
                        Some(bytes) => dst.copy_from_slice(bytes),
                        None => return Err(Error::invalid("a run reaches past its packed unit")),
                    }
                }
                unpacked
            };
            if let Err(error) = unpacked {
                dst.fill(0);
                let error = Error::corrupt("compressed cluster", Some(part.host), error.to_string());
                let error = match batch.pieces.get(part.piece) {
                    Some(piece) => self.named(error, piece),
                    None => error,
                };
                self.bad(guest, &part.dst, error)?;
            }
        }
        Ok(passes)
    }

    /// Whether a payload of `len` bytes is a whole unit of the output, and can be one without having been unpacked.
    fn trusts(&self, part: &PackedPart, len: usize) -> bool {
        let unit = self.shared.buffers.sizes().unit as usize;
        let same_unit = part.skip == 0
            && (part.unit, part.dst.len()) == (unit, unit)
            && part.dst.start.is_multiple_of(unit)
            // What is no smaller than its unit is stored unpacked.
            && len < unit;
        // A frame tells the payload's exact length, and a zlib wrapper needs the unit's checksum.
        let same_stream = self.shared.frame.is_none()
            && self
                .packer
                .as_ref()
                .is_some_and(|(codec, _)| *codec != Codec::Zlib && part.codec.is_kin_of(*codec));
        self.shared.trust_packed && same_unit && same_stream
    }

    /// Looks for zeros, packs, and leaves the result with the placer.
    fn pass_on(&mut self, seq: u64, guest: Range<u64>, mut buf: Buf, passes: &[Pass]) -> Result<()> {
        let unit = self.shared.buffers.sizes().unit as usize;
        let len = (guest.end - guest.start) as usize;
        let filled = if self.shared.whole_units { len.next_multiple_of(unit) } else { len };
        let area = buf.get(..filled).ok_or_else(|| Error::invalid("a job longer than its buffer"))?;
        let scan = self.shared.options.granule() != 0;
        let mut unread = passes.iter().filter(|pass| pass.unread).map(|pass| pass.at).peekable();
        let mut units: Vec<Unit> = area
            .chunks(unit)
            .zip((0..).step_by(unit))
            .map(|(bytes, at)| self.classify(bytes, scan && unread.next_if_eq(&at).is_none()))
            .collect();
        let content = if self.shared.fingerprint { fingerprint(guest.start, area, unit) } else { 0 };
        if let (Some(cipher), Some(area)) =
            (self.shared.placer.target().guest_cipher(), buf.get_mut(..filled))
        {
            cipher.encrypt(area, guest.start / SECTOR as u64);
        }
        let buf = match (&mut self.packer, self.scratch.take()) {
            (Some((codec, packer)), Some(mut scratch)) => {
                let codec = *codec;
                let mut packer =
                    JobPacker { packer, codec, frame: self.shared.frame, unit, monitor: self.shared.monitor };
                packer.pack(guest.start, &buf, filled, passes, &mut units, &mut scratch)?;
                self.scratch = Some(buf);
                scratch
            }
            _ => buf,
        };
        self.deposit(seq, Filled { guest, kind: FilledKind::Units { units, buf, run: None, content } })
    }

    fn classify(&self, bytes: &[u8], scan: bool) -> Unit {
        if !scan {
            return Unit::Data { zero: 0 };
        }
        let subunit = self.shared.subunit as usize;
        if subunit >= bytes.len() || self.packer.is_some() {
            return if is_zero(bytes) { Unit::Zero } else { Unit::Data { zero: 0 } };
        }
        let zeros = bytes
            .chunks(subunit)
            .map(is_zero)
            .zip(0..32)
            .fold(0u32, |mask, (zero, bit)| mask | u32::from(zero) << bit);
        if zeros == u32::MAX { Unit::Zero } else { Unit::Data { zero: zeros } }
    }

    fn deposit(&mut self, seq: u64, filled: Filled) -> Result<()> {
        let shared = self.shared;
        let mine = shared.placer.deposit(seq, filled, shared.monitor)?;
        for set in mine {
            self.write_through_engine(set)?;
        }
        shared.placer.write_ready(shared.monitor, |buf| {
            if let Some(buf) = buf {
                shared.buffers.give_back(buf);
            }
        })
    }

    /// Starts the writes of a set's buffer; the rest, which is small, is written at once.
    fn write_through_engine(&mut self, set: WriteSet) -> Result<()> {
        let shared = self.shared;
        if set.run.is_some() {
            shared.placer.write(&set, shared.monitor)?;
            set.buf.into_iter().for_each(|buf| shared.buffers.give_back(buf));
            return Ok(());
        }
        let WriteSet { ops, buf, guest, .. } = set;
        let mut pieces = Vec::new();
        for op in &ops {
            match op.what {
                WriteWhat::Buf { at, len } => {
                    pieces.push(Piece {
                        file: shared.placer.target().file(op.file)?,
                        at: op.at,
                        buf_at: at,
                        len,
                    });
                }
                _ => shared.placer.target().write(op, &[], shared.monitor)?,
            }
        }
        match buf {
            Some(buf) if !pieces.is_empty() => {
                let batch = Batch { direction: Direction::Write, pieces };
                self.submit(batch, buf, InFlight::Write(guest))
            }
            buf => {
                shared.monitor.add_done(guest);
                if let Some(buf) = buf {
                    shared.buffers.give_back(buf);
                }
                Ok(())
            }
        }
    }
}

fn zero(bytes: &mut [u8], range: Range<usize>) {
    if let Some(part) = bytes.get_mut(range) {
        part.fill(0);
    }
}
