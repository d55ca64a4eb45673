//! Recording the guest's writes in persistent bitmaps.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use diskmill_format::qcow2::{BITMAP_FLAGS_AT, Bitmap};

use super::bitmaps::check;
use super::meta::Meta;
use crate::edit::disk::Disk;
use crate::error::Result;
use crate::qcow2::Bits;

/// The enabled bitmaps of an image, and what was written since they were saved.
///
/// From the first write on they are marked as in use in the file, until they are saved: after a crash nobody relies on
/// them. The lock is taken after that of the metadata.
#[derive(Default)]
pub(super) struct Recorder {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    enabled: Vec<Enabled>,
    /// They are marked in the file.
    marked: bool,
}

struct Enabled {
    bitmap: Bitmap,
    /// Where its flags stand in the file.
    flags_at: u64,
    /// What is to be added to it.
    dirty: Bits,
}

impl Recorder {
    /// Finds the bitmaps that are enabled.
    ///
    /// # Errors
    /// [`Kind::Corrupt`](crate::Kind::Corrupt), [`Kind::Unsupported`](crate::Kind::Unsupported) or
    /// [`Kind::Limit`](crate::Kind::Limit) for one in which nothing can be recorded.
    pub(super) fn load(&self, meta: &Meta) -> Result<()> {
        let mut enabled = Vec::new();
        if let Some((_, mut at, _)) = meta.area.bitmap_directory() {
            for bitmap in meta.bitmaps()? {
                let len = bitmap.encoded_len() as u64;
                // One in use was not saved by somebody else: nothing that is recorded makes it good again.
                if bitmap.auto && !bitmap.in_use {
                    check(&bitmap)?;
                    meta.bitmap_table(&bitmap)?;
                    let flags_at = at.saturating_add(BITMAP_FLAGS_AT);
                    enabled.push(Enabled { bitmap, flags_at, dirty: Bits::default() });
                }
                at = at.saturating_add(len);
            }
        }
        *self.state() = State { enabled, marked: false };
        Ok(())
    }

    /// Notes that the guest bytes of `range` may change. To be called before they do.
    pub(super) fn record(&self, disk: &Disk, range: &Range<u64>) -> Result<()> {
        let mut state = self.state();
        if state.enabled.is_empty() {
            return Ok(());
        }
        if !state.marked {
            for Enabled { bitmap, flags_at, .. } in &state.enabled {
                let flags = Bitmap { in_use: true, ..bitmap.clone() }.flags();
                disk.write(&flags.to_be_bytes(), *flags_at)?;
            }
            disk.sync()?;
            state.marked = true;
        }
        for Enabled { bitmap, dirty, .. } in &mut state.enabled {
            let granularity = bitmap.granularity();
            dirty.set(range.start / granularity..range.end.div_ceil(granularity));
        }
        Ok(())
    }

    /// Brings what was recorded to the file, and takes the marks away.
    pub(super) fn save(&self, meta: &mut Meta) -> Result<()> {
        let mut state = self.state();
        if !state.marked {
            return Ok(());
        }
        let mut tables = Vec::new();
        for Enabled { bitmap, dirty, .. } in &state.enabled {
            tables.push((bitmap.table_offset, meta.add_bits(bitmap, dirty)?));
        }
        meta.commit()?;
        for (at, table) in tables {
            meta.disk.write(&table, at.get())?;
        }
        meta.disk.sync()?;
        for Enabled { bitmap, flags_at, dirty } in &mut state.enabled {
            meta.disk.write(&bitmap.flags().to_be_bytes(), *flags_at)?;
            *dirty = Bits::default();
        }
        meta.disk.sync()?;
        state.marked = false;
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
