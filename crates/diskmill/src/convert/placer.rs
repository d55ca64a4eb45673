use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use diskmill_io::Buf;

use super::assembler::{Assembler, Unit, WriteOp};
use super::offload::FileRun;
use super::target::Target;
use super::{ConvertOptions, Monitor};
use crate::error::{Error, Result};

/// An item whose units are known.
pub(super) struct Filled {
    pub(super) guest: Range<u64>,
    pub(super) kind: FilledKind,
}

pub(super) enum FilledKind {
    Zero,
    Skip,
    Units {
        units: Vec<Unit>,
        buf: Buf,
        /// Where the units' bytes are, if not in the buffer.
        run: Option<FileRun>,
        /// A fingerprint of the bytes.
        content: u64,
    },
}

/// Writes that have their places, and the buffer they come from.
pub(super) struct WriteSet {
    pub(super) ops: Vec<WriteOp>,
    pub(super) buf: Option<Buf>,
    /// Where the bytes come from instead, if they were not read. The buffer is its credit all the same.
    pub(super) run: Option<FileRun>,
    /// Guest bytes that are dealt with when these are written.
    pub(super) guest: u64,
}

/// Gives units their places in guest order, and lets one thread at a time write.
///
/// Who finishes an item leaves it here. If it is the next in order, it and all that waited for it are placed.
/// Buffered writes to one file exclude each other in the kernel, so whoever finds nobody writing writes what is there,
/// and the others go back to reading.
pub(super) struct Placer<'a> {
    state: Mutex<State>,
    target: &'a Target,
    /// Writes may overlap: each worker writes what it placed through its own engine.
    overlapping: bool,
}

struct State {
    assembler: Box<dyn Assembler>,
    ordered: bool,
    next: u64,
    waiting: BTreeMap<u64, Filled>,
    ready: VecDeque<WriteSet>,
    writing: bool,
}

impl<'a> Placer<'a> {
    pub(super) fn new(assembler: Box<dyn Assembler>, target: &'a Target, overlapping: bool) -> Self {
        let state = State {
            ordered: assembler.ordered(),
            assembler,
            next: 0,
            waiting: BTreeMap::new(),
            ready: VecDeque::new(),
            writing: false,
        };
        Self { state: state.into(), target, overlapping: overlapping && !target.is_stream() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves a finished item. Returns the writes that the caller is to do with its own engine.
    pub(super) fn deposit(&self, seq: u64, filled: Filled, monitor: &Monitor) -> Result<Vec<WriteSet>> {
        let mut state = self.lock();
        if state.ordered {
            state.waiting.insert(seq, filled);
            while let Some(filled) = {
                let next = state.next;
                state.waiting.remove(&next)
            } {
                state.next += 1;
                state.place(filled, monitor)?;
            }
        } else {
            state.place(filled, monitor)?;
        }
        Ok(if self.overlapping { state.ready.drain(..).collect() } else { Vec::new() })
    }

    /// Writes what is ready unless another thread is at it, and passes each buffer on when it is free again.
    pub(super) fn write_ready(&self, monitor: &Monitor, mut free: impl FnMut(Option<Buf>)) -> Result<()> {
        let mut state = self.lock();
        if state.writing {
            return Ok(());
        }
        state.writing = true;
        while let Some(set) = state.ready.pop_front() {
            drop(state);
            let done = self.write(&set, monitor);
            free(set.buf);
            state = self.lock();
            if done.is_err() {
                state.writing = false;
                return done;
            }
        }
        state.writing = false;
        Ok(())
    }

    /// Writes a set with plain calls.
    pub(super) fn write(&self, set: &WriteSet, monitor: &Monitor) -> Result<()> {
        let bytes = set.buf.as_deref().unwrap_or_default();
        for op in &set.ops {
            match &set.run {
                Some(run) => self.target.transfer(op, run, monitor)?,
                None => self.target.write(op, bytes, monitor)?,
            }
        }
        monitor.add_done(set.guest);
        Ok(())
    }

    pub(super) const fn target(&self) -> &'a Target {
        self.target
    }

    /// Writes the tables and, when they are safe, the header.
    pub(super) fn finish(&mut self, size: u64, options: &ConvertOptions, monitor: &Monitor) -> Result<()> {
        let mut state = self.lock();
        if !state.waiting.is_empty() || !state.ready.is_empty() {
            return Err(Error::invalid("a conversion that is not finished"));
        }
        let mut ops = Vec::new();
        let finish = state.assembler.finish(size, &mut ops)?;
        for op in &ops {
            self.target.write(op, &[], monitor)?;
        }
        self.target.complete(finish, options, monitor)
    }
}

impl State {
    fn place(&mut self, filled: Filled, monitor: &Monitor) -> Result<()> {
        let Filled { guest, kind } = filled;
        let len = guest.end - guest.start;
        let mut ops = Vec::new();
        let (buf, run) = match kind {
            FilledKind::Zero => {
                self.assembler.zero(guest, &mut ops)?;
                monitor.add_zero(len);
                (None, None)
            }
            FilledKind::Skip => {
                self.assembler.skip(guest, &mut ops)?;
                (None, None)
            }
            FilledKind::Units { units, buf, run, content } => {
                self.assembler.fingerprint(content);
                let zeros = units.iter().filter(|unit| **unit == Unit::Zero).count() as u64;
                monitor.add_zero((zeros * self.assembler.unit()).min(len));
                self.assembler.place(guest, &units, &mut ops)?;
                (Some(buf), run)
            }
        };
        self.ready.push_back(WriteSet { ops, buf, run, guest: len });
        Ok(())
    }
}
