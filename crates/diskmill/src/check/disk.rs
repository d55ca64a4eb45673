use std::cell::RefCell;

use diskmill_io::{Allocation, Storage};

use crate::error::{Error, Kind, Result};
use crate::reader::read_full;

/// Most bytes of tables that are read in all, holes apart: this much, and as often the data of the file. Each table is
/// read a few times at most, so only tables that overlap many times come to more.
const MOST_READ: u64 = 1 << 30;
const MOST_READ_TIMES: u64 = 8;
/// Runs of the file that are looked at to tell how much data it has.
const MOST_RUNS: u64 = 1 << 16;

/// An image's file: reads as zeros past its end, as QEMU has it, and holes are not read.
pub(super) struct Disk<'a> {
    file: &'a dyn Storage,
    len: u64,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// The run that was looked up last: what it is, its start and its end.
    run: Option<(Allocation, u64, u64)>,
    read: u64,
    /// Bytes of data in the file, once that matters.
    data: Option<u64>,
}

impl<'a> Disk<'a> {
    pub(super) fn new(file: &'a dyn Storage) -> Result<Self> {
        let len = file.len().map_err(|error| Error::io("cannot tell the size", error))?;
        Ok(Self { file, len, state: RefCell::default() })
    }

    /// The length in whole sectors, as QEMU has it.
    pub(super) fn len(&self) -> u64 {
        self.len.checked_next_multiple_of(512).unwrap_or(self.len)
    }

    /// Fills `buf` from `at` on. Tells whether there may be something else than zeros.
    pub(super) fn read(&self, buf: &mut [u8], at: u64) -> Result<bool> {
        let state = &mut *self.state.borrow_mut();
        let end = at.saturating_add(buf.len() as u64);
        if self.is_hole(state, at, end)? {
            buf.fill(0);
            return Ok(false);
        }
        state.read = state.read.saturating_add(buf.len() as u64);
        let spent = state.read.saturating_sub(MOST_READ) / MOST_READ_TIMES;
        if spent > 0 {
            let data = match state.data {
                Some(data) => data,
                None => *state.data.insert(self.data()?),
            };
            if spent > data {
                let why = "the image's tables overlap so often that checking it would take hours";
                return Err(Error::new(Kind::Limit, why));
            }
        }
        let got = read_full(self.file, buf, at)?;
        buf.get_mut(got..).unwrap_or_default().fill(0);
        Ok(true)
    }

    /// Bytes of the file that are no holes.
    fn data(&self) -> Result<u64> {
        let (mut at, mut data) = (0, 0u64);
        for _ in 0..MOST_RUNS {
            match self.file.allocation(at).map_err(|error| Error::io("cannot look for holes", error))? {
                Some((kind, end)) if end > at => {
                    data += if kind == Allocation::Hole { 0 } else { end - at };
                    at = end;
                }
                _ => return Ok(data),
            }
        }
        Ok(data.saturating_add(self.len.saturating_sub(at)))
    }

    fn is_hole(&self, state: &mut State, at: u64, end: u64) -> Result<bool> {
        Ok(self.hole_end(state, at)?.is_some_and(|until| end <= until))
    }

    /// Where the hole ends that `at` lies in, if it does. There is no end to that behind the file.
    fn hole_end(&self, state: &mut State, at: u64) -> Result<Option<u64>> {
        if at >= self.len {
            return Ok(Some(u64::MAX));
        }
        if state.run.is_none_or(|(_, start, until)| !(start..until).contains(&at)) {
            let run = self.file.allocation(at).map_err(|error| Error::io("cannot look for holes", error))?;
            state.run = run.map(|(kind, until)| (kind, at, until));
        }
        Ok(match state.run {
            Some((Allocation::Hole, _, until)) if until >= self.len => Some(u64::MAX),
            Some((Allocation::Hole, _, until)) => Some(until),
            _ => None,
        })
    }

    /// The entries that are not 0 of a table of 64-bit entries, with their indexes.
    pub(super) fn table(&self, at: u64, entries: u64) -> Result<Vec<(u64, u64)>> {
        const PIECE: u64 = 64 << 10;
        let mut found = Vec::new();
        let mut piece = vec![0; PIECE.min(entries.saturating_mul(8)) as usize];
        let mut index = 0;
        while index < entries {
            let start = at.saturating_add(index * 8);
            let hole = self.hole_end(&mut self.state.borrow_mut(), start)?;
            if let Some(skip @ 1..) = hole.map(|end| (end - start) / 8) {
                index = index.saturating_add(skip);
                continue;
            }
            let here = (entries - index).min(PIECE / 8);
            let bytes = piece.get_mut(..here as usize * 8).unwrap_or_default();
            if self.read(bytes, start)? {
                let words = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word));
                found.extend((index..).zip(words).filter(|&(_, word)| word != 0));
            }
            index += here;
        }
        Ok(found)
    }

    /// Writes all of `bytes`.
    pub(super) fn write(&self, bytes: &[u8], at: u64) -> Result<()> {
        // What was a hole is none any more.
        self.state.borrow_mut().run = None;
        let written = self.file.write_all_at(bytes, at);
        written.map_err(|error| Error::io(format!("cannot write at offset {at:#x}"), error))
    }

    /// Nothing that is written later is durable before what was written until now.
    pub(super) fn barrier(&self) -> Result<()> {
        self.file.sync().map_err(|error| Error::io("cannot flush", error))
    }
}
