//! The guest's writes.

use std::borrow::Cow;
use std::ops::Range;

use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Cluster, CryptMethod, SUBCLUSTERS};

use super::meta::Meta;
use super::tables::Entry;
use super::{Qcow2Writer, moved};
use crate::edit::ZeroHow;
use crate::error::{Error, Kind, Result};
use crate::image::Image;

/// Guest bytes that are written at once, but at least a cluster.
const CHUNK: u64 = 4 << 20;
/// What encryption takes at once, in bytes.
const SECTOR: u64 = 512;
/// Entries that are changed at once.
const ENTRIES: u64 = 4096;

/// Where a part of a write goes.
struct Target {
    /// The guest cluster.
    guest: u64,
    /// Its host cluster.
    host: HostOffset,
    /// The guest bytes that have to be in place before the entry may say so. Those that are not written come from what
    /// the guest sees now.
    fill: Range<u64>,
    /// The new entry, and the old one with whether its host cluster is given up. `None` if the entry stays.
    link: Option<Link>,
    /// The host cluster was allocated for this write.
    allocated: bool,
    /// The file has zeros there.
    zeroed: bool,
}

#[derive(Clone, Copy)]
struct Link {
    new: Entry,
    old: Entry,
}

impl Qcow2Writer {
    pub(super) fn write_guest(&self, image: &Image, buf: &[u8], at: u64) -> Result<()> {
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            // Up to a border of chunks, so that all but the first and the last cluster are whole.
            let chunk = CHUNK.max(self.meta().cluster_size());
            let len = (chunk - at % chunk).min(rest.len() as u64);
            let (part, after) = rest.split_at(len as usize);
            self.write_chunk(image, part, at)?;
            at = at.saturating_add(len);
            rest = after;
        }
        Ok(())
    }

    fn write_chunk(&self, image: &Image, buf: &[u8], at: u64) -> Result<()> {
        let range = at..at.saturating_add(buf.len() as u64);
        // Most writes go where data already is: they need not keep each other out.
        {
            let torn = self.encrypted && !(at.is_multiple_of(SECTOR) && range.end.is_multiple_of(SECTOR));
            let sectors = range.start / SECTOR * SECTOR..range.end.next_multiple_of(SECTOR);
            let _guard = self.ranges.lock(if torn { sectors } else { range.clone() }, torn);
            let in_place = self.meta().in_place(range.clone())?;
            if let Some(mut runs) = in_place {
                let (range, bytes) = self.whole_sectors(image, buf, range)?;
                if bytes.len() > buf.len() {
                    // The sectors lie in the same clusters.
                    runs = self.meta().in_place(range.clone())?.unwrap_or_default();
                }
                let (mut rest, mut guest) = (&*bytes, range.start);
                for (host, len) in runs {
                    let (part, after) = rest.split_at_checked(len as usize).unwrap_or((rest, &[]));
                    self.put(part, guest, host)?;
                    rest = after;
                    guest += len;
                }
                return Ok(());
            }
        }
        let size = self.meta().cluster_size();
        let clusters = range.start / size * size..range.end.next_multiple_of(size);
        let _exclusive = self.ranges.lock(clusters, true);
        let (range, buf) = self.whole_sectors(image, buf, range)?;
        let targets = {
            let mut meta = self.meta();
            meta.relieve()?;
            meta.plan(range.clone())?
        };
        let written = self.write_targets(image, &buf, &range, &targets);
        let mut meta = self.meta();
        match written {
            Ok(()) => meta.link(&targets),
            Err(error) => {
                meta.give_back(&targets);
                Err(error)
            }
        }
    }

    /// With legacy AES encryption, the whole sectors around `buf`: what else they hold is read. Otherwise `buf` itself,
    /// around which the storage sees to that.
    fn whole_sectors<'b>(
        &self,
        image: &Image,
        buf: &'b [u8],
        range: Range<u64>,
    ) -> Result<(Range<u64>, Cow<'b, [u8]>)> {
        let (start, end) = (range.start / SECTOR * SECTOR, range.end.next_multiple_of(SECTOR));
        if self.aes.is_none() || (start..end) == range {
            return Ok((range, Cow::Borrowed(buf)));
        }
        let mut sectors = vec![0; (end - start) as usize];
        let skip = (range.start - start) as usize;
        let (head, rest) = sectors.split_at_mut(skip);
        let (middle, tail) = rest.split_at_mut(buf.len());
        image.read_unlocked(head, start)?;
        middle.copy_from_slice(buf);
        image.read_unlocked(tail, range.end)?;
        Ok((start..end, Cow::Owned(sectors)))
    }

    /// Writes guest bytes that belong at `guest` to their place `host`.
    fn put(&self, bytes: &[u8], guest: u64, host: u64) -> Result<()> {
        self.data.write(&self.encrypted(bytes, guest), host)
    }

    /// The bytes as they stand in the file, but for what the storage does. They are whole sectors if they are encrypted here.
    fn encrypted<'b>(&self, bytes: &'b [u8], guest: u64) -> Cow<'b, [u8]> {
        let mut bytes = Cow::Borrowed(bytes);
        if let Some(aes) = &self.aes {
            aes.cipher().encrypt(bytes.to_mut(), guest / SECTOR);
        }
        bytes
    }

    /// Writes `buf`, and around it what the first and the last cluster need.
    fn write_targets(&self, image: &Image, buf: &[u8], range: &Range<u64>, targets: &[Target]) -> Result<()> {
        let (Some(first), Some(last)) = (targets.first(), targets.last()) else { return Ok(()) };
        let head = self.fill(image, first.fill.start..range.start, first.zeroed)?;
        let tail = self.fill(image, range.end..last.fill.end, last.zeroed)?;
        let host_of = |target: &Target, guest: u64| moved(target.host, guest.saturating_sub(target.guest));
        if targets.len() == 1 && (head.is_some() || tail.is_some()) {
            // One write is cheaper than three.
            let (head, tail) = (head.unwrap_or_default(), tail.unwrap_or_default());
            let start = range.start - head.len() as u64;
            return self.put(&[&head, buf, &tail].concat(), start, host_of(first, start));
        }
        if let Some(head) = head {
            self.put(&head, first.fill.start, host_of(first, first.fill.start))?;
        }
        if let Some(tail) = tail {
            self.put(&tail, range.end, host_of(last, range.end))?;
        }
        let size = self.meta().cluster_size();
        let mut rest = buf;
        let mut targets = targets.iter().peekable();
        while let Some(target) = targets.next() {
            let start = target.guest.max(range.start);
            let mut end = (target.guest + size).min(range.end);
            while let Some(next) = targets.next_if(|next| host_of(target, next.guest) == next.host.get()) {
                end = (next.guest + size).min(range.end);
            }
            let (part, after) = rest.split_at_checked((end - start) as usize).unwrap_or((rest, &[]));
            self.data.write_fresh(&self.encrypted(part, start), host_of(target, start))?;
            rest = after;
        }
        Ok(())
    }

    /// The guest bytes of `range` as they are now; `None` if there is nothing to write.
    fn fill(&self, image: &Image, range: Range<u64>, zeroed: bool) -> Result<Option<Vec<u8>>> {
        if range.is_empty() || (zeroed && image.reads_as_zeros(range.clone())?) {
            return Ok(None);
        }
        // At most a cluster.
        let mut bytes = vec![0; (range.end - range.start) as usize];
        image.read_unlocked(&mut bytes, range.start)?;
        Ok(Some(bytes))
    }

    pub(super) fn zero_guest(&self, image: &Image, range: Range<u64>, how: ZeroHow) -> Result<()> {
        let sub = self.meta().geometry.subcluster_size();
        // The last subcluster of the disk may be cut by its end.
        let end = match range.end == image.size() {
            true => range.end,
            false => range.end / sub * sub,
        };
        let start = range.start.next_multiple_of(sub);
        if start >= end {
            return self.zero_plainly(image, range);
        }
        self.zero_plainly(image, range.start..start)?;
        self.change_entries(
            start..end,
            |meta, guest, part| meta.zeroed_entry(guest, part, how, self.backed),
            image,
        )?;
        self.zero_plainly(image, end..range.end)
    }

    /// Writes zeros, but where the guest sees zeros already.
    fn zero_plainly(&self, image: &Image, range: Range<u64>) -> Result<()> {
        /// Zeros that are written at once.
        const ZEROS: u64 = 1 << 20;
        let mut at = range.start;
        while at < range.end {
            let extent = image.map(at, range.end - at).map_err(|error| error.error)?;
            let end = extent.guest.end;
            if extent.source != crate::Source::Zero {
                let zeros = vec![0; (end - at).min(ZEROS) as usize];
                while at < end {
                    let len = (end - at).min(ZEROS);
                    self.write_guest(image, zeros.get(..len as usize).unwrap_or(&zeros), at)?;
                    at += len;
                }
            }
            at = end;
        }
        Ok(())
    }

    pub(super) fn discard_guest(&self, image: &Image, range: Range<u64>) -> Result<()> {
        let size = self.meta().cluster_size();
        let end = match range.end == image.size() {
            true => range.end,
            false => range.end / size * size,
        };
        let start = range.start.next_multiple_of(size);
        if start >= end {
            return Ok(());
        }
        // A guest that discards wants the space to go back to the host: QEMU's discard=unmap.
        self.meta().punch = true;
        self.change_entries(start..end, |meta, guest, _| meta.discarded_entry(guest, self.backed), image)
    }

    /// Replaces the entries of the clusters that `range` touches by what `change` says: a new entry, or that the part
    /// of the cluster must be zeroed by writing.
    fn change_entries(
        &self,
        range: Range<u64>,
        change: impl Fn(&mut Meta, u64, Range<u64>) -> Result<Change>,
        image: &Image,
    ) -> Result<()> {
        let (size, span) = {
            let meta = self.meta();
            (meta.cluster_size(), meta.geometry.l2_span())
        };
        let mut at = range.start;
        while at < range.end {
            let cluster = at / size * size;
            let end = range.end.min(cluster.saturating_add(ENTRIES.saturating_mul(size)));
            let mut plainly = Vec::new();
            {
                let _exclusive = self.ranges.lock(cluster..end.next_multiple_of(size), true);
                let mut meta = self.meta();
                meta.relieve()?;
                let mut guest = cluster;
                while guest < end {
                    if !self.backed && meta.has_no_table(guest)? {
                        // Nothing there: on to the next L2 table.
                        guest = (guest / span + 1).saturating_mul(span);
                        continue;
                    }
                    let part = guest.max(at)..(guest + size).min(end);
                    match change(&mut meta, guest, part.clone())? {
                        Change::Nothing => {}
                        Change::Entry(new) => meta.exchange(guest, new)?,
                        Change::WriteZeros => plainly.push(part.clone()),
                    }
                    guest += size;
                }
                drop(meta);
                if self.raw_data {
                    let len = end.min(image.size()) - at;
                    self.data.zero(at, len, false)?;
                }
            }
            plainly.into_iter().try_for_each(|part| self.zero_plainly(image, part))?;
            at = end;
        }
        Ok(())
    }
}

/// What becomes of a cluster.
pub(super) enum Change {
    Nothing,
    Entry(Entry),
    /// The part has to be zeroed by writing zeros.
    WriteZeros,
}

impl Entry {
    /// The plain host cluster that the entry refers to; compressed payloads are none.
    pub(super) fn cluster_host(&self) -> Option<HostOffset> {
        match self.cluster {
            Cluster::Standard(host)
            | Cluster::Zero(Some(host))
            | Cluster::Subclusters { host: Some(host), .. } => Some(host),
            _ => None,
        }
    }

    /// The subclusters that are in the host cluster, and those that read as zeros.
    const fn masks(&self) -> (u32, u32) {
        match self.cluster {
            Cluster::Unallocated => (0, 0),
            Cluster::Zero(_) => (0, u32::MAX),
            Cluster::Standard(_) | Cluster::Compressed(_) => (u32::MAX, 0),
            Cluster::Subclusters { allocated, zero, .. } => (allocated, zero),
        }
    }
}

impl Meta {
    /// Whether the L1 table has no L2 table for `guest`.
    pub(super) fn has_no_table(&mut self, guest: u64) -> Result<bool> {
        Ok(self.l1_entry(self.active(), self.geometry.l1_index(guest))?.is_none())
    }

    /// The subclusters that `part` of the cluster at `guest` touches. Without extended L2 entries a cluster is one
    /// subcluster, and all bits stand for it.
    fn touched(&self, guest: u64, part: &Range<u64>) -> u32 {
        if !self.geometry.extended_l2() {
            return u32::MAX;
        }
        let sub = self.geometry.subcluster_size();
        let first = part.start.saturating_sub(guest) / sub;
        let end = part.end.saturating_sub(guest).div_ceil(sub).min(SUBCLUSTERS.into());
        let bits = (1u64 << end) - (1u64 << first.min(end));
        // `end` is at most 32.
        bits as u32
    }

    /// Where the bytes of `range` stand, if all of them may be written where they are.
    fn in_place(&mut self, range: Range<u64>) -> Result<Option<Vec<(u64, u64)>>> {
        let size = self.cluster_size();
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let guest = at / size * size;
            let end = (guest + size).min(range.end);
            let entry = self.entry(guest)?;
            let touched = self.touched(guest, &(at..end));
            let Some(host) = self.writable_host(entry, guest)?.filter(|_| touched & !entry.masks().0 == 0)
            else {
                return Ok(None);
            };
            let (host, len) = (moved(host, at - guest), end - at);
            match runs.last_mut() {
                Some((start, run)) if start.checked_add(*run) == Some(host) => *run += len,
                _ => runs.push((host, len)),
            }
            at = end;
        }
        Ok(Some(runs))
    }

    /// The host cluster of an entry, if it may be written to.
    fn writable_host(&self, entry: Entry, guest: u64) -> Result<Option<HostOffset>> {
        let Some(host) = entry.cluster_host() else { return Ok(None) };
        if self.data.is_some() {
            if host.get() != guest {
                let why =
                    format!("guest offset {guest:#x} is not at the same offset of the external data file");
                return Err(Error::new(Kind::Corrupt, why).within("L2 table", host.get()));
            }
            return Ok(Some(host));
        }
        if !entry.copied {
            return Ok(None);
        }
        self.guard(host)?;
        Ok(Some(host))
    }

    /// Refuses to let the guest write where the image has metadata of a fixed place.
    pub(super) fn guard(&self, host: HostOffset) -> Result<()> {
        let header = &self.area.header;
        let size = self.cluster_size();
        let hits = |start: u64, len: u64| host.get() < start.saturating_add(len) && start < moved(host, size);
        let l1 = (header.l1_offset.get(), u64::from(header.l1_size) * 8);
        let table = (header.refcount_table_offset.get(), u64::from(header.refcount_table_clusters) * size);
        let luks = self.area.extensions.luks_header.unwrap_or_default();
        if hits(0, size) || hits(l1.0, l1.1) || hits(table.0, table.1) || hits(luks.0, luks.1) {
            return Err(self.corrupt("L2 table", host, "an entry points into the image's own metadata"));
        }
        Ok(())
    }

    /// Finds a place for each cluster of `range`.
    fn plan(&mut self, range: Range<u64>) -> Result<Vec<Target>> {
        let mut targets = Vec::new();
        let done = self.plan_into(range, &mut targets);
        if done.is_err() {
            self.give_back(&targets);
        }
        done.map(|()| targets)
    }

    fn plan_into(&mut self, range: Range<u64>, targets: &mut Vec<Target>) -> Result<()> {
        let (size, sub) = (self.cluster_size(), self.geometry.subcluster_size());
        // Zeros in the file are not zeros to the guest then.
        let encrypted = self.area.header.crypt != CryptMethod::None;
        let mut spare = super::refcounts::Run { host: 0, clusters: 0, zeroed: false };
        let first = range.start / size * size;
        let mut guest = first;
        while guest < range.end {
            let part = range.start.max(guest)..range.end.min(guest + size);
            let old = self.entry(guest)?;
            let touched = self.touched(guest, &part);
            let (mut allocated, mut zero) = old.masks();
            let own = self.writable_host(old, guest)?;
            let host = match own {
                Some(host) => host,
                None if self.data.is_some() => HostOffset(guest),
                None => {
                    if spare.clusters == 0 {
                        let want = (range.end - guest).div_ceil(size);
                        spare = self.allocate(want)?;
                    }
                    let host = HostOffset(spare.host);
                    spare.host += size;
                    spare.clusters -= 1;
                    host
                }
            };
            // What another cluster holds has to come along.
            let whole = own.is_none() && allocated != 0;
            let fill = if whole || !self.geometry.extended_l2() {
                let fill = if own.is_some() && allocated != 0 { part.clone() } else { guest..guest + size };
                (allocated, zero) = (u32::MAX, 0);
                fill
            } else {
                let has = |at: u64| allocated >> ((at - guest) / sub).min(31) & 1 != 0;
                let start = if has(part.start) { part.start } else { part.start / sub * sub };
                let end = if has(part.end - 1) { part.end } else { part.end.next_multiple_of(sub) };
                (allocated, zero) = (allocated | touched, zero & !touched);
                start..end
            };
            let cluster = match (allocated, zero) {
                (u32::MAX, _) => Cluster::Standard(host),
                _ => Cluster::Subclusters { host: Some(host), allocated, zero },
            };
            let new = Entry { cluster, copied: true };
            targets.push(Target {
                guest,
                host,
                fill,
                link: (new != old).then_some(Link { new, old }),
                allocated: own.is_none() && self.data.is_none(),
                zeroed: own.is_none() && self.data.is_none() && !encrypted && spare.zeroed,
            });
            guest += size;
        }
        // What the allocator gave too much cannot be: a run never has more clusters than were asked for, but some of
        // those that followed may have turned out to have a place of their own.
        for index in 0..spare.clusters {
            self.lower(spare.host + index * size)?;
        }
        Ok(())
    }

    /// Makes the entries point to what was written.
    fn link(&mut self, targets: &[Target]) -> Result<()> {
        for (index, target) in targets.iter().enumerate() {
            let Some(Link { new, old }) = target.link else { continue };
            if let Err(error) = self.set_entry(target.guest, new) {
                // The disk may have no room for a table.
                self.give_back(targets.get(index..).unwrap_or_default());
                return Err(error);
            }
            self.release_replaced(old, new)?;
        }
        Ok(())
    }

    /// Gives back what was allocated for a write that failed.
    fn give_back(&mut self, targets: &[Target]) {
        for target in targets.iter().filter(|target| target.allocated) {
            // At worst the cluster is leaked.
            let _ = self.lower(target.host.get());
        }
    }

    /// What `write_zeroes` makes of the cluster at `guest`, for `part` of it, which begins and ends at subclusters.
    /// QEMU's `zero_in_l2_slice` does the same.
    pub(super) fn zeroed_entry(
        &mut self,
        guest: u64,
        part: Range<u64>,
        how: ZeroHow,
        backed: bool,
    ) -> Result<Change> {
        let old = self.entry(guest)?;
        let whole = self.touched(guest, &part) == u32::MAX;
        let unmap = how == ZeroHow::MayUnmap;
        if self.area.header.version < 3 {
            return Ok(match old.cluster {
                Cluster::Unallocated if !backed => Change::Nothing,
                _ if unmap && !backed => Change::Entry(Entry::NONE),
                _ => Change::WriteZeros,
            });
        }
        let zero = |host| Change::Entry(Entry { cluster: Cluster::Zero(host), copied: old.copied });
        Ok(match old.cluster {
            Cluster::Unallocated if !backed => Change::Nothing,
            Cluster::Zero(None) => Change::Nothing,
            Cluster::Zero(Some(_)) if !unmap || !whole => Change::Nothing,
            Cluster::Compressed(_) if !whole => Change::WriteZeros,
            Cluster::Standard(host) | Cluster::Subclusters { host: Some(host), .. }
                if whole && !unmap && (old.copied || self.data.is_some()) =>
            {
                zero(Some(host))
            }
            _ if whole => Change::Entry(Entry { cluster: Cluster::Zero(None), copied: false }),
            _ => {
                let touched = self.touched(guest, &part);
                let (allocated, zero) = old.masks();
                let (allocated, zero) = (allocated & !touched, zero | touched);
                let cluster = Cluster::Subclusters { host: old.cluster_host(), allocated, zero };
                Change::Entry(Entry { cluster, copied: old.copied })
            }
        })
    }

    /// What a discard makes of the cluster at `guest`: it reads as zeros in version 3, as in QEMU. Version 2 cannot say
    /// that over a backing file and keeps the data.
    fn discarded_entry(&mut self, guest: u64, backed: bool) -> Result<Change> {
        let old = self.entry(guest)?;
        let v2 = self.area.header.version < 3;
        Ok(match old.cluster {
            Cluster::Unallocated if !backed => Change::Nothing,
            Cluster::Zero(None) => Change::Nothing,
            _ if v2 && backed => Change::Nothing,
            _ if v2 => Change::Entry(Entry::NONE),
            _ => Change::Entry(Entry { cluster: Cluster::Zero(None), copied: false }),
        })
    }
}
