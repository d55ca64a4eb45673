//! The grain directory and its redundant copy.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use diskmill_format::vmdk::{SECTOR_BYTES, sesparse, sparse};
use diskmill_io::Allocation;

use super::{GrainMap, Kinds};
use crate::error::{Error, Result};
use crate::tables::SLICE;

/// Directory entries that one look-up goes through. A longer run is given in pieces: a walk that is interrupted by the
/// runs of a backing file must not go through all of it each time.
const MAX_TABLES: u64 = 256;

/// What the directory says about a place.
pub(super) enum Found {
    /// The grain table stands at this byte.
    Table(u64),
    /// This many grain tables have no grains.
    Empty(u64),
}

impl GrainMap {
    /// Refuses metadata behind `overhead`, where grains may be: the guest could write to it.
    pub(super) fn check_overhead(&self, overhead: u64) -> Result<()> {
        let within = |at: u64, len: u64| at.saturating_add(len) <= overhead;
        for directory in [Some(self.directory), self.redundant].into_iter().flatten() {
            let mut tables = self.all_tables(directory).flatten();
            // A damaged one is told when it is needed.
            let sound = within(directory, self.directory_len())
                && tables.all(|at| !self.fits(at, self.table_len()) || within(at, self.table_len()));
            if !sound {
                return Err(Error::unsupported("writing to a sparse extent with tables among its grains")
                    .hint("convert the image and work on the copy"));
            }
        }
        Ok(())
    }

    /// Where the grain table of number `table` stands, and its redundant copy, for changing them.
    ///
    /// # Errors
    /// `Corrupt` if one of them is damaged: what is written could not be told from what is not.
    pub(crate) fn both_tables(&self, table: u64) -> Result<(u64, Option<u64>)> {
        let place = || format!("grain directory, entry {table}");
        let sound = |found: Result<Option<u64>>, directory: u64| {
            match found {
                Ok(Some(at)) if self.fits(at, self.table_len()) => Ok(at),
                Ok(Some(at)) => Err(self.past_end("the grain table", at)),
                Ok(None) => Err(Error::unsupported("writing where a grain table was never made")),
                Err(error) => Err(error),
            }
            .map_err(|error| error.within(place(), directory + table * self.entry_bytes()))
        };
        let primary = sound(self.entry(self.directory, table), self.directory)?;
        let redundant = match self.redundant {
            Some(directory) => Some(sound(self.entry(directory, table), directory)?),
            None => None,
        };
        if self.copy_of_zeroed(table, primary).is_some() {
            let why = "it is all zeros and its redundant copy is not: the image is damaged";
            return Err(Error::corrupt(format!("grain table {table}"), Some(primary), why)
                .hint("a conversion reads the copy"));
        }
        Ok((primary, redundant.filter(|&copy| copy != primary)))
    }

    /// Looks at each directory entry once, so that damage is told when the image is opened. Falls back on the
    /// redundant directory as a whole where the primary one cannot be read.
    pub(super) fn check_directory(&mut self) -> Result<()> {
        if !self.fits(self.directory, self.directory_len()) {
            let Some(redundant) = self.redundant.take() else {
                let message = format!(
                    "it lies past the end of the file ({} bytes): the image is truncated",
                    self.len()
                );
                return Err(Error::corrupt("grain directory", Some(self.directory), message));
            };
            self.warn_late(
                "the grain directory lies past the end of the file; the redundant one is used".to_owned(),
            );
            self.directory = redundant;
        }
        let Some(redundant) = self.redundant else { return Ok(()) };
        let both = self.all_tables(self.directory).zip(self.all_tables(redundant));
        let damaged = both.filter(|(primary, other)| self.prefers_redundant(*primary, *other)).count();
        if damaged > 0 {
            self.warn_late(format!(
                "{damaged} grain directory entries are damaged; the redundant directory is used for them"
            ));
        }
        Ok(())
    }

    /// Whether the redundant directory's entry is to be taken: the primary one is impossible, or zero while the other
    /// is sound (writers fill both, so a zero is damage).
    fn prefers_redundant(&self, primary: Option<u64>, redundant: Option<u64>) -> bool {
        let sound = |at: Option<u64>| at.is_some_and(|at| self.fits(at, self.table_len()));
        sound(redundant) && !sound(primary)
    }

    /// The piece of the directory at `directory` that has the entries from `from` on.
    fn directory_piece(&self, directory: u64, from: u64) -> Result<Arc<[u8]>> {
        let at = from * self.entry_bytes();
        self.tables
            .slice(directory.saturating_add(at), SLICE.min(self.directory_len() - at))
            .map_err(|error| error.within("grain directory", directory))
    }

    /// The byte offset of a grain table by entry `index` of a piece of the directory. Zero is a table of zeros.
    fn directory_entry(&self, piece: &[u8], index: u64) -> Result<Option<u64>> {
        let size = self.entry_bytes();
        let raw = piece.get((index * size) as usize..).unwrap_or_default();
        match &self.kind {
            Kinds::Se(header) => {
                let entry = sesparse::table_entries(raw).next().unwrap_or(0);
                Ok(header.table_offset(entry)?)
            }
            _ => {
                let entry = sparse::table_entries(raw).next().unwrap_or(0);
                Ok((entry != 0).then(|| u64::from(entry) * SECTOR_BYTES))
            }
        }
    }

    /// The byte offset of grain table `table` by the directory at `directory`.
    pub(super) fn entry(&self, directory: u64, table: u64) -> Result<Option<u64>> {
        let per_piece = SLICE / self.entry_bytes();
        let piece = self.directory_piece(directory, table / per_piece * per_piece)?;
        self.directory_entry(&piece, table % per_piece)
    }

    /// The byte offsets of all grain tables by the directory at `directory`; `None` also for those that it cannot tell.
    fn all_tables(&self, directory: u64) -> impl Iterator<Item = Option<u64>> {
        let (tables, per_piece) = (self.geometry.tables, SLICE / self.entry_bytes());
        (0..tables).step_by(per_piece as usize).flat_map(move |from| {
            let piece = self.directory_piece(directory, from).ok();
            (0..per_piece.min(tables - from))
                .map(move |index| self.directory_entry(piece.as_deref()?, index).ok().flatten())
        })
    }

    /// Where grain table `table` stands.
    fn table(&self, table: u64) -> Result<Option<u64>> {
        let primary = self.entry(self.directory, table);
        let found = match self.redundant {
            Some(directory) => {
                let redundant = self.entry(directory, table);
                let known = |entry: &Result<Option<u64>>| entry.as_ref().ok().copied().flatten();
                if self.prefers_redundant(known(&primary), known(&redundant)) { redundant } else { primary }
            }
            None => primary,
        };
        match found {
            Ok(Some(at)) if !self.fits(at, self.table_len()) => Err(self.past_end("the grain table", at)),
            found => found,
        }
        .map_err(|error| {
            error.within(
                format!("grain directory, entry {table}"),
                self.directory + table * self.entry_bytes(),
            )
        })
    }

    /// Where grain table `table` stands, or how many tables from it on are empty; those look no further than `range`
    /// guest bytes from the start of the table.
    pub(super) fn look_up(&self, table: u64, range: u64) -> Result<Found> {
        let most = range.div_ceil(self.geometry.table_coverage);
        let most = most.min(self.geometry.tables - table).min(MAX_TABLES);
        let Some(at) = self.table(table)? else {
            let run = (1..most).find(|ahead| !matches!(self.table(table + ahead), Ok(None)));
            return Ok(Found::Empty(run.unwrap_or(most)));
        };
        Ok(match self.tables_in_holes(table, at, most) {
            0 => Found::Table(at),
            tables => Found::Empty(tables),
        })
    }

    /// How many tables from number `table` on, which stands at `at`, lie in holes of the file, with their redundant copies.
    /// A fresh disk is little else.
    fn tables_in_holes(&self, table: u64, at: u64, most: u64) -> u64 {
        let Some(hole) = self.hole(at) else { return 0 };
        let redundant = match self.redundant {
            None => None,
            Some(directory) => match self.entry(directory, table) {
                Ok(Some(copy)) => match self.hole(copy) {
                    Some(hole) => Some((directory, hole)),
                    None => return 0,
                },
                _ => return 0,
            },
        };
        let lies_in = |hole: &Range<u64>, entry: Result<Option<u64>>| matches!(entry, Ok(Some(at)) if hole.contains(&at) && self.table_len() <= hole.end - at);
        let empty = |table: u64| {
            lies_in(&hole, self.entry(self.directory, table))
                && redundant
                    .as_ref()
                    .is_none_or(|(directory, hole)| lies_in(hole, self.entry(*directory, table)))
        };
        (0..most).find(|ahead| !empty(table + ahead)).unwrap_or(most)
    }

    /// The hole of the file from `at` on.
    fn hole(&self, at: u64) -> Option<Range<u64>> {
        // What a writer holds in memory is not in the file yet.
        if self.followed {
            return None;
        }
        let mut data = self.data.lock().unwrap_or_else(PoisonError::into_inner);
        if data.contains(&at) {
            return None;
        }
        match self.file.storage.allocation(at).ok()?? {
            (Allocation::Hole, end) => Some(at..end),
            (_, end) => {
                *data = at..end;
                None
            }
        }
    }
}
