//! Grain tables of an extent that is being written to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use diskmill_format::vmdk::sparse::UNCLEAN_SHUTDOWN_AT;

use crate::edit::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::tables::{TableCache, Tables};
use crate::vmdk::{GrainMap, Growable};

/// Changed bytes of tables at which they are written.
const MOST_DIRTY: usize = 8 << 20;
const SECTOR: u64 = 512;

/// The grain tables of a hosted sparse extent, changed in memory and written back by [`commit`](Self::commit).
///
/// Grains are only ever added, behind all that the file has, and an entry says so no earlier than a barrier has made
/// the grain durable. Entries do not cross sectors. So a crash leaves at worst grains that no entry knows of.
pub(super) struct GrainTables {
    disk: Arc<Disk>,
    state: Mutex<State>,
    /// The first byte behind all grains.
    next: AtomicU64,
    session: Mutex<Session>,
}

/// What the header's `uncleanShutdown` byte says, as VMware keeps it: set while the file is being written to.
#[derive(PartialEq, Eq)]
enum Session {
    /// Not written to yet.
    Closed,
    Open,
    /// Somebody else left it set, and what they did not finish is not known: it stays.
    Unclean,
}

struct State {
    clean: TableCache,
    /// Tables that differ from the file, by their offset.
    dirty: BTreeMap<u64, Arc<[u8]>>,
    dirty_bytes: usize,
}

impl GrainTables {
    /// # Errors
    /// [`Kind::Limit`] for a file that no grain can be added to.
    pub(super) fn new(disk: Arc<Disk>, extent: &Growable, grain_bytes: u64) -> Result<Self> {
        let clean = TableCache::new(Arc::clone(disk.storage()), disk.len());
        let next = disk.len().max(extent.overhead).checked_next_multiple_of(grain_bytes.max(SECTOR));
        let next = next.ok_or_else(|| Error::new(Kind::Limit, "the file of the extent is too long"))?;
        let state = State { clean, dirty: BTreeMap::new(), dirty_bytes: 0 };
        let session = if extent.unclean { Session::Unclean } else { Session::Closed };
        Ok(Self { disk, state: Mutex::new(state), next: AtomicU64::new(next), session: Mutex::new(session) })
    }

    /// What comes before the first write: a durable word in the header that the file is open.
    pub(super) fn begin(&self) -> Result<()> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if *session == Session::Closed {
            self.disk.write(&[1], UNCLEAN_SHUTDOWN_AT)?;
            self.disk.sync()?;
            *session = Session::Open;
        }
        Ok(())
    }

    /// What comes after the last write, when all is durable.
    pub(super) fn end(&self) -> Result<()> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if *session == Session::Open {
            self.disk.write(&[0], UNCLEAN_SHUTDOWN_AT)?;
            self.disk.sync()?;
            *session = Session::Closed;
        }
        Ok(())
    }

    pub(super) fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Room for `bytes` bytes of grains, which follow each other.
    ///
    /// # Errors
    /// [`Kind::Limit`] where entries of 32 bits cannot tell a sector any more: at 2 TiB.
    pub(super) fn allocate(&self, bytes: u64) -> Result<u64> {
        let full = || Error::new(Kind::Limit, "the file of the extent would grow beyond 2 TiB");
        let end = |next: u64| next.checked_add(bytes).filter(|&end| end / SECTOR <= u64::from(u32::MAX));
        self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, end).map_err(|_| full())
    }

    /// Sets the entries of grains that follow each other, from number `grain` on, in both tables of each.
    pub(super) fn set(&self, map: &GrainMap, grain: u64, entries: impl Iterator<Item = u32>) -> Result<()> {
        let per_table = map.geometry().table_entries;
        for (grain, entry) in (grain..).zip(entries) {
            let (primary, redundant) = map.both_tables(grain / per_table)?;
            let byte = (grain % per_table * 4) as usize;
            let mut state = self.state();
            for at in redundant.into_iter().chain([primary]) {
                let table = state.table(at, map.table_len())?;
                if let Some(slot) = table.get_mut(byte..byte + 4) {
                    slot.copy_from_slice(&entry.to_le_bytes());
                }
            }
        }
        Ok(())
    }

    /// Commits if much has gathered.
    pub(super) fn relieve(&self) -> Result<()> {
        if self.state().dirty_bytes > MOST_DIRTY { self.commit() } else { Ok(()) }
    }

    /// Writes changed tables, after a barrier for the grains that they tell of.
    pub(super) fn commit(&self) -> Result<()> {
        let mut state = self.state();
        if state.dirty.is_empty() {
            return Ok(());
        }
        self.disk.sync()?;
        for (at, table) in &state.dirty {
            self.disk.write(table, *at)?;
        }
        *state = State {
            clean: TableCache::new(Arc::clone(self.disk.storage()), self.disk.len()),
            dirty: BTreeMap::new(),
            dirty_bytes: 0,
        };
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The table at `at`, to be changed.
    fn table(&mut self, at: u64, len: u64) -> Result<&mut [u8]> {
        if !self.dirty.contains_key(&at) {
            let bytes = self.clean.slice(at, len)?;
            self.dirty_bytes += bytes.len();
            self.dirty.insert(at, bytes);
        }
        let table = self.dirty.get_mut(&at).ok_or_else(|| Error::invalid("a table vanished"))?;
        Ok(Arc::make_mut(table))
    }
}

impl Tables for GrainTables {
    fn slice(&self, at: u64, len: u64) -> Result<Arc<[u8]>> {
        let state = self.state();
        match state.dirty.get(&at) {
            Some(table) if table.len() as u64 >= len => Ok(Arc::clone(table)),
            _ => state.clean.slice(at, len),
        }
    }
}
