//! Changing the size of the disk.
//!
//! A longer disk is prepared behind its old end, where nobody looks, and one write of the header shows it. A shorter one
//! is cut by the header first; what lay behind is given up then.

use std::ops::Range;

use diskmill_format::HostOffset;
use diskmill_format::qcow2::Cluster;

use super::Qcow2Writer;
use super::guest::Change;
use super::meta::Meta;
use super::tables::{Entry, L1};
use crate::edit::{Preallocation, ZeroHow};
use crate::error::{Error, Kind, Result};
use crate::image::Image;

/// Entries that are changed before metadata may be written.
const ENTRIES: u64 = 4096;

impl Qcow2Writer {
    /// Sees to it that the L1 table can map a disk of `size` bytes.
    ///
    /// # Errors
    /// [`Kind::Invalid`], [`Kind::Unsupported`] and [`Kind::Limit`] for sizes that the image cannot have.
    pub(crate) fn make_room_for(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let mut meta = self.meta();
        if !size.is_multiple_of(512) {
            return Err(Error::invalid(format!("a disk of {size} bytes: sizes are multiples of 512")));
        }
        if meta.area.header.snapshots != 0 && meta.area.header.version < 3 {
            return Err(Error::unsupported("resizing a version 2 image that has snapshots")
                .hint("they do not know their size; `amend -o compat=1.1` upgrades the image"));
        }
        if self.encrypted && preallocation != Preallocation::Off && meta.area.header.version < 3 {
            return Err(Error::unsupported("preallocation of an encrypted version 2 image"));
        }
        // What cannot be resized is refused before anything changes.
        if meta.area.bitmap_directory().is_some() {
            meta.bitmaps()?.iter().try_for_each(super::check_bitmap)?;
        }
        meta.grow_l1(size)
    }

    /// Changes the size of the disk. [`make_room_for`](Self::make_room_for) comes first.
    pub(crate) fn resize_guest(&self, image: &Image, size: u64, preallocation: Preallocation) -> Result<()> {
        let old = self.meta().area.header.size;
        if size < old {
            return self.shrink(size);
        }
        let done = self.grow(image, old..size, preallocation);
        if done.is_err() {
            // What was prepared only takes space.
            let _ = self.give_up_behind(old);
        }
        done
    }

    fn grow(&self, image: &Image, new: Range<u64>, preallocation: Preallocation) -> Result<()> {
        let size = self.meta().cluster_size();
        let backing = image.chain().nth(1).map_or(0, |(_, info)| info.virtual_size);
        self.clear(image, new.clone(), backing)?;
        if self.external {
            self.grow_data_file(new.clone(), preallocation)?;
        }
        if preallocation != Preallocation::Off {
            self.preallocate(
                new.start.next_multiple_of(size)..new.end.next_multiple_of(size),
                preallocation,
            )?;
        }
        let mut meta = self.meta();
        meta.commit()?;
        meta.sync()?;
        self.put_size(&mut meta, new.end)
    }

    /// Makes the guest bytes of `range`, behind the end of the disk, read as zeros: those of the last cluster, those
    /// that a backing file of `backing` bytes has, and what other programs left in the tables.
    fn clear(&self, image: &Image, range: Range<u64>, backing: u64) -> Result<()> {
        let (size, sub, span, mapped) = {
            let meta = self.meta();
            let span = meta.geometry.l2_span();
            (
                meta.cluster_size(),
                meta.geometry.subcluster_size(),
                span,
                span * u64::from(meta.active().entries),
            )
        };
        let start = range.start.next_multiple_of(sub);
        if range.start < start {
            self.write_zeros(image, range.start..start)?;
        }
        let mut guest = start / size * size;
        let end = range.end.next_multiple_of(size).min(mapped);
        while guest < end {
            let mut plainly = Vec::new();
            let mut meta = self.meta();
            meta.relieve()?;
            let stop = end.min(guest.saturating_add(ENTRIES * size));
            while guest < stop {
                let shown = self.backed && guest < backing;
                if !shown && meta.has_no_table(guest)? {
                    guest = (guest / span + 1).saturating_mul(span);
                    continue;
                }
                let part = guest.max(start)..guest + size;
                match meta.zeroed_entry(guest, part.clone(), ZeroHow::MayUnmap, shown)? {
                    Change::Nothing => {}
                    Change::Entry(new) => meta.exchange(guest, new)?,
                    Change::WriteZeros => plainly.push(part),
                }
                guest += size;
            }
            drop(meta);
            plainly.into_iter().try_for_each(|part| self.write_zeros(image, part))?;
        }
        Ok(())
    }

    /// Writes zeros behind the end of the disk.
    fn write_zeros(&self, image: &Image, range: Range<u64>) -> Result<()> {
        // At most a cluster.
        let zeros = vec![0; (range.end - range.start) as usize];
        self.write_guest(image, &zeros, range.start)
    }

    fn grow_data_file(&self, new: Range<u64>, preallocation: Preallocation) -> Result<()> {
        let len = self.data.len();
        if self.raw_data && len > new.start {
            self.data.zero(new.start, len.min(new.end) - new.start, false)?;
        }
        if len < new.end || (self.raw_data && len > new.end && !self.data.storage().is_block_device()) {
            self.data.set_len(new.end)?;
        }
        self.data.preallocate(new, preallocation)
    }

    /// Gives each cluster of `range` a place that reads as zeros.
    fn preallocate(&self, range: Range<u64>, preallocation: Preallocation) -> Result<()> {
        let mut guest = range.start;
        while guest < range.end {
            let mut meta = self.meta();
            meta.relieve()?;
            let size = meta.cluster_size();
            let clusters = ((range.end - guest) / size).min(ENTRIES);
            let mut host = match self.external {
                true => guest,
                false => {
                    let run = meta.allocate_at_end(clusters)?;
                    let len = clusters * size;
                    // Zeros in the file are none to the guest of an encrypted image.
                    let how = if self.encrypted { Preallocation::Full } else { preallocation };
                    if !run.zeroed && how != Preallocation::Full {
                        self.disk.zero(run.host, len, true)?;
                    }
                    self.data.preallocate(run.host..run.host + len, how)?;
                    run.host
                }
            };
            for _ in 0..clusters {
                let place = HostOffset(host);
                let cluster = match self.encrypted {
                    // Zeros in the file are no zeros to the guest.
                    true => Cluster::Zero(Some(place)),
                    false => Cluster::Standard(place),
                };
                meta.exchange(guest, Entry { cluster, copied: true })?;
                (guest, host) = (guest + size, host + size);
            }
        }
        Ok(())
    }

    fn shrink(&self, size: u64) -> Result<()> {
        {
            let mut meta = self.meta();
            meta.commit()?;
            meta.sync()?;
            self.put_size(&mut meta, size)?;
        }
        self.give_up_behind(size)?;
        if self.external && !self.data.storage().is_block_device() {
            self.data.set_len(size)?;
            self.data.sync()?;
        }
        Ok(())
    }

    /// Makes the image have nothing of its own: the guest sees its backing file. Snapshots stay. Durable when it returns.
    pub(crate) fn make_empty(&self) -> Result<()> {
        self.give_up_behind(0)
    }

    /// Gives up all clusters behind the end of the disk at `end`, and cuts the file if it is free at its end.
    fn give_up_behind(&self, end: u64) -> Result<()> {
        let mut meta = self.meta();
        let (size, span) = (meta.cluster_size(), meta.geometry.l2_span());
        let mapped = span * u64::from(meta.active().entries);
        let punched = std::mem::replace(&mut meta.punch, true);
        let mut guest = end.next_multiple_of(size);
        while guest < mapped {
            meta.relieve()?;
            let table_end = (guest / span + 1).saturating_mul(span);
            if guest % span == 0 {
                meta.drop_table(guest)?;
            } else if !meta.has_no_table(guest)? {
                for guest in (guest..table_end).step_by(size as usize) {
                    if meta.entry(guest)? != Entry::NONE {
                        meta.exchange(guest, Entry::NONE)?;
                    }
                }
            }
            guest = table_end;
        }
        let done = meta.commit();
        meta.punch = punched;
        done?;
        meta.cut()
    }
}

impl Meta {
    /// Gives the active L1 table the entries that a disk of `size` bytes needs.
    fn grow_l1(&mut self, size: u64) -> Result<()> {
        let old = self.active();
        let need = self.geometry.l1_entries(size);
        if need <= u64::from(old.entries) {
            return Ok(());
        }
        if need.saturating_mul(8) > self.limits.qcow2_l1_bytes {
            return Err(Error::new(
                Kind::Limit,
                format!("the L1 table of a disk of {size} bytes is too large"),
            )
            .hint("an image with a larger cluster_size can have it"));
        }
        self.commit()?;
        self.begin_behind_all(false)?;
        // The limit is far below 2^32 entries.
        let copied = self.copy_l1(old, need as u32);
        self.switch = None;
        let new = copied?;
        self.commit()?;
        self.put_header(|header| {
            header.l1_offset = HostOffset(new.offset);
            header.l1_size = new.entries;
        })?;
        self.lower_l1(old)
    }

    /// Gives up the clusters of an L1 table that the header does not refer to any more.
    fn lower_l1(&mut self, l1: L1) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        self.l1_clusters(l1).try_for_each(|cluster| self.lower(cluster << bits))
    }

    /// Gives up the L2 table that maps `guest`, and all that it refers to.
    fn drop_table(&mut self, guest: u64) -> Result<()> {
        let index = self.geometry.l1_index(guest);
        let Some(table) = self.l1_entry(self.active(), index)? else { return Ok(()) };
        for entry in 0..self.geometry.l2_entries() {
            let entry = self.l2_entry(table.host, entry)?;
            self.release(entry)?;
        }
        self.set_l1_entry(self.active(), index, None)?;
        self.lower(table.host)
    }

    /// Clusters behind all others, with refcount 1: as many as asked for, without a gap.
    pub(super) fn allocate_at_end(&mut self, clusters: u64) -> Result<super::refcounts::Run> {
        self.begin_behind_all(false)?;
        let run = self.take_behind_all(clusters);
        self.switch = None;
        run
    }
}
