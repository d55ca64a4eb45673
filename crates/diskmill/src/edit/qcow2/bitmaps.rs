//! Persistent bitmaps: changes of their directory.
//!
//! What changes is written beside the old: bits, tables and a directory in new clusters; barrier; then the header names
//! the new directory; barrier; then the old clusters are given up. A crash leaves the bitmaps as they were or as they
//! are to be, but for the cases that [`Meta::link_bitmaps`] tells.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;

use diskmill_format::qcow2::{BITMAP_FLAGS_AT, Bitmap, BitmapCluster, HeaderArea};
use diskmill_format::{HostOffset, Limits};
use diskmill_io::SharedStorage;

use super::Qcow2Writer;
use super::meta::Meta;
use crate::edit::bitmap::check_sum;
use crate::edit::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::qcow2::{BitSource, Bits, lossy, read_directory, read_table};
use crate::reader::read_exact;

/// A change of the directory that is being prepared.
pub(super) struct Draft {
    /// The directory as it is to be.
    pub(super) bitmaps: Vec<Bitmap>,
    /// Clusters that were taken for it.
    taken: Vec<u64>,
    /// Clusters that are given up once it is there.
    freed: BTreeSet<u64>,
}

impl Qcow2Writer {
    /// The bits of the bitmap called `name` as of now.
    pub(crate) fn dirty_bits(&self, name: &[u8]) -> Result<Bits> {
        let mut meta = self.meta();
        self.recorder.save(&mut meta)?;
        let bitmap = find(&meta.bitmaps()?, name)?.clone();
        meta.read_bits(&bitmap)
    }

    /// Brings what was recorded until now to the file.
    pub(crate) fn save_bitmaps(&self) -> Result<()> {
        self.recorder.save(&mut self.meta())
    }

    /// Adds bitmaps with these bits. Their tables are made here.
    pub(crate) fn add_bitmaps<B: BitSource>(
        &self,
        new: impl Iterator<Item = Result<(Bitmap, B)>>,
    ) -> Result<()> {
        self.change_bitmaps(|meta, draft| meta.draft_bitmaps(draft, new))
    }

    pub(crate) fn remove_bitmap(&self, name: &str) -> Result<()> {
        self.change_bitmaps(|meta, draft| {
            let index = position(&draft.bitmaps, name.as_bytes())?;
            let bitmap = draft.bitmaps.remove(index);
            meta.free_bits(draft, &bitmap);
            Ok(())
        })
    }

    pub(crate) fn enable_bitmap(&self, name: &str, enable: bool) -> Result<()> {
        self.change_bitmaps(|_, draft| {
            usable(draft, name)?.auto = enable;
            Ok(())
        })
    }

    /// Replaces the bits of a bitmap by what `change` makes of them.
    pub(crate) fn change_bits(&self, name: &str, change: impl FnOnce(&Bitmap, Bits) -> Bits) -> Result<()> {
        self.change_bitmaps(|meta, draft| {
            let bitmap = usable(draft, name)?.clone();
            let old = meta.read_bits(&bitmap)?;
            let new = change(&bitmap, old.clone());
            if new != old {
                meta.free_bits(draft, &bitmap);
                let bitmap = meta.store_bits(draft, bitmap, &new)?;
                *usable(draft, name)? = bitmap;
            }
            Ok(())
        })
    }

    /// Changes the size of the disk in the header, and with it the bitmaps: those of a longer disk have no bits for its
    /// new area. They are marked as in use while the two do not fit each other.
    pub(super) fn put_size(&self, meta: &mut Meta, size: u64) -> Result<()> {
        if meta.area.bitmap_directory().is_none() {
            return meta.put_header(|header| header.size = size);
        }
        self.recorder.save(meta)?;
        let done = meta.change_bitmaps(|meta, draft| meta.resize_bitmaps(draft, size)).and_then(|()| {
            meta.put_header(|header| header.size = size)?;
            meta.unmark_bitmaps()
        });
        self.recorder.load(meta).and(done)
    }

    fn change_bitmaps<T>(&self, change: impl FnOnce(&mut Meta, &mut Draft) -> Result<T>) -> Result<T> {
        let mut meta = self.meta();
        self.recorder.save(&mut meta)?;
        let result = meta.change_bitmaps(change);
        // The bitmaps that are enabled may be others now, and stand elsewhere.
        self.recorder.load(&meta).and(result)
    }
}

/// Adds bitmaps to the image in `storage`, which nobody has open, and closes it.
pub(crate) fn add_bitmaps<B: BitSource>(
    storage: &SharedStorage,
    area: HeaderArea,
    limits: Limits,
    new: impl Iterator<Item = Result<(Bitmap, B)>>,
) -> Result<()> {
    let mut meta = Meta::open(Arc::new(Disk::new(Arc::clone(storage))?), None, area, limits)?;
    meta.change_bitmaps(|meta, draft| meta.draft_bitmaps(draft, new))?;
    meta.close()
}

fn empty_disk() -> Error {
    Error::unsupported("a persistent bitmap of an empty disk")
}

fn position(bitmaps: &[Bitmap], name: &[u8]) -> Result<usize> {
    let found = bitmaps.iter().position(|bitmap| bitmap.name == name);
    found.ok_or_else(|| Error::invalid(format!("Dirty bitmap '{}' not found", lossy(name))))
}

/// The bitmap called `name`, if its bits can be trusted.
pub(crate) fn find<'b>(bitmaps: &'b [Bitmap], name: &[u8]) -> Result<&'b Bitmap> {
    let found = bitmaps.get(position(bitmaps, name)?);
    found.map_or_else(|| Err(Error::invalid("no such bitmap")), |bitmap| check(bitmap).map(|()| bitmap))
}

/// As [`find`], to be changed.
fn usable<'d>(draft: &'d mut Draft, name: &str) -> Result<&'d mut Bitmap> {
    let index = position(&draft.bitmaps, name.as_bytes())?;
    let found = draft.bitmaps.get_mut(index).ok_or_else(|| Error::invalid("no such bitmap"))?;
    check(found).map(|()| found)
}

/// Refuses a bitmap that must not be used.
pub(crate) fn check(bitmap: &Bitmap) -> Result<()> {
    let name = lossy(&bitmap.name);
    if bitmap.in_use {
        let why = format!("Bitmap '{name}' is inconsistent and cannot be used");
        return Err(
            Error::new(Kind::Corrupt, why).hint("it was not saved; removing it leaves the disk as it is")
        );
    }
    if !bitmap.extra.is_empty() && !bitmap.extra_compatible {
        return Err(Error::unsupported(format!("bitmap '{name}', which has extra data of an unknown kind,")));
    }
    Ok(())
}

impl Meta {
    /// The directory as the file has it.
    pub(super) fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        read_directory(&self.area, &**self.disk.storage(), &self.limits)
    }

    fn read_bits(&self, bitmap: &Bitmap) -> Result<Bits> {
        Bits::read(&**self.disk.storage(), bitmap, self.geometry, self.area.header.size, &self.limits)
    }

    pub(super) fn bitmap_table(&self, bitmap: &Bitmap) -> Result<Vec<BitmapCluster>> {
        read_table(&**self.disk.storage(), bitmap, self.geometry, self.area.header.size, &self.limits)
    }

    /// Remakes all bitmaps for a disk of `size` bytes, marked as in use.
    fn resize_bitmaps(&mut self, draft: &mut Draft, size: u64) -> Result<()> {
        let old = self.area.header.size;
        let mut bitmaps = std::mem::take(&mut draft.bitmaps);
        for bitmap in &mut bitmaps {
            check(bitmap)?;
            let mut bits = self.read_bits(bitmap)?;
            self.free_bits(draft, bitmap);
            bits.truncate(size.div_ceil(bitmap.granularity()));
            // Tables are as long as the disk asks for.
            self.area.header.size = size;
            let stored = self.store_bits(draft, bitmap.clone(), &bits);
            self.area.header.size = old;
            *bitmap = Bitmap { in_use: true, ..stored? };
        }
        draft.bitmaps = bitmaps;
        Ok(())
    }

    /// Takes the marks away.
    fn unmark_bitmaps(&mut self) -> Result<()> {
        let Some((_, mut at, _)) = self.area.bitmap_directory() else { return Ok(()) };
        for bitmap in self.bitmaps()? {
            let flags = Bitmap { in_use: false, ..bitmap.clone() }.flags();
            self.disk.write(&flags.to_be_bytes(), at.saturating_add(BITMAP_FLAGS_AT))?;
            at = at.saturating_add(bitmap.encoded_len() as u64);
        }
        self.disk.sync()
    }

    fn change_bitmaps<T>(&mut self, change: impl FnOnce(&mut Self, &mut Draft) -> Result<T>) -> Result<T> {
        if self.area.header.version < 3 {
            return Err(Error::unsupported("a persistent bitmap in a version 2 image (compat=0.10)")
                .hint("`qemu-img amend -o compat=1.1` makes it version 3"));
        }
        let mut draft = Draft { bitmaps: self.bitmaps()?, taken: Vec::new(), freed: BTreeSet::new() };
        if let Some((_, at, len)) = self.area.bitmap_directory() {
            draft.freed.extend(self.clusters(at, len));
        }
        let prepared = change(self, &mut draft).and_then(|value| {
            let directory = self.store_directory(&mut draft)?;
            self.commit()?;
            Ok((value, directory))
        });
        let (value, directory) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => {
                for host in draft.taken {
                    // At worst the cluster is leaked.
                    let _ = self.lower(host);
                }
                return Err(error);
            }
        };
        self.link_bitmaps(directory)?;
        draft.freed.into_iter().try_for_each(|host| self.lower(host))?;
        self.commit()?;
        Ok(value)
    }

    fn draft_bitmaps<B: BitSource>(
        &mut self,
        draft: &mut Draft,
        new: impl Iterator<Item = Result<(Bitmap, B)>>,
    ) -> Result<()> {
        let mut names: HashSet<Vec<u8>> = draft.bitmaps.iter().map(|bitmap| bitmap.name.clone()).collect();
        for new in new {
            let (bitmap, bits) = new?;
            if !names.insert(bitmap.name.clone()) {
                return Err(Error::invalid(format!("Bitmap already exists: {}", lossy(&bitmap.name))));
            }
            if draft.bitmaps.len() as u64 >= u64::from(self.limits.qcow2_bitmaps) {
                return Err(Error::new(Kind::Limit, "Too many persistent bitmaps"));
            }
            let bitmap = self.store_bits(draft, bitmap, &bits)?;
            draft.bitmaps.push(bitmap);
            // The other image's clusters may be smaller, and what is little there much here.
            check_sum(self.cluster_size().saturating_mul(draft.taken.len() as u64))?;
        }
        Ok(())
    }

    /// The clusters that `len` bytes at `at` touch, by their offsets.
    fn clusters(&self, at: u64, len: u64) -> impl Iterator<Item = u64> + use<> {
        let bits = self.geometry.cluster_bits();
        (at >> bits..at.saturating_add(len).div_ceil(1 << bits)).map(move |cluster| cluster << bits)
    }

    /// Takes clusters for `len` bytes one behind the other. Returns where they stand.
    fn take(&mut self, draft: &mut Draft, len: u64) -> Result<u64> {
        let run = match len.div_ceil(self.cluster_size()) {
            0 | 1 => self.allocate(1)?,
            clusters => self.allocate_at_end(clusters)?,
        };
        draft.taken.extend(self.clusters(run.host, len));
        Ok(run.host)
    }

    /// Writes `bits` to new clusters, and a table of them. Returns `bitmap` with that table.
    fn store_bits<B: BitSource>(&mut self, draft: &mut Draft, bitmap: Bitmap, bits: &B) -> Result<Bitmap> {
        let size = self.cluster_size();
        let len = bitmap.bits(self.area.header.size);
        let entries = bitmap.table_entries(self.area.header.size, self.geometry);
        if entries == 0 {
            return Err(empty_disk());
        }
        if entries.saturating_mul(size) > self.limits.qcow2_bitmap_bytes {
            let why = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(Error::new(Kind::Limit, why));
        }
        let mut table = vec![0; (entries * 8).next_multiple_of(size) as usize];
        let mut cluster = vec![0; size as usize];
        let mut next = bits.next_from(0).filter(|&bit| bit < len);
        while let Some(bit) = next {
            let index = bit / (size * 8);
            let (first, end) = (index * size * 8, (index + 1) * size * 8);
            next = bits.next_from(end).filter(|&bit| bit < len);
            if bits.is_ones(first..end.min(len)) {
                put_entry(&mut table, index, BitmapCluster::Ones);
                continue;
            }
            cluster.fill(0);
            bits.fill(first, &mut cluster)?;
            if end > len {
                clear_from(&mut cluster, len - first);
            }
            let host = self.take(draft, size)?;
            self.disk.write(&cluster, host)?;
            put_entry(&mut table, index, BitmapCluster::Bits(HostOffset(host)));
        }
        let host = self.take(draft, table.len() as u64)?;
        self.disk.write(&table, host)?;
        // The limit above keeps it small.
        Ok(Bitmap { table_offset: HostOffset(host), table_size: entries as u32, ..bitmap })
    }

    /// Gives up what a bitmap takes. Of a damaged one only what can be told is given up: the rest is leaked.
    fn free_bits(&mut self, draft: &mut Draft, bitmap: &Bitmap) {
        let Ok(table) = self.bitmap_table(bitmap) else { return };
        let bits = table.into_iter().filter_map(|entry| match entry {
            BitmapCluster::Bits(host) => Some(host.get()),
            BitmapCluster::Zeros | BitmapCluster::Ones => None,
        });
        let own = self.clusters(bitmap.table_offset.get(), u64::from(bitmap.table_size) * 8);
        for host in own.chain(bits) {
            if self.guard(HostOffset(host)).is_ok() && matches!(self.count(host / self.cluster_size()), Ok(1))
            {
                draft.freed.insert(host);
            }
        }
    }

    /// Writes the directory to new clusters. Returns how many bitmaps it has, where it stands and its length in bytes;
    /// `None` without bitmaps.
    fn store_directory(&mut self, draft: &mut Draft) -> Result<Option<(u32, u64, u64)>> {
        let mut bytes = Vec::new();
        for bitmap in &draft.bitmaps {
            bytes.extend(bitmap.encode()?);
        }
        let len = bytes.len() as u64;
        if len == 0 {
            return Ok(None);
        }
        if len > self.limits.qcow2_bitmap_directory_bytes {
            return Err(Error::new(Kind::Limit, "Not enough space in the bitmap directory"));
        }
        let host = self.take(draft, len)?;
        bytes.resize(len.next_multiple_of(self.cluster_size()) as usize, 0);
        self.disk.write(&bytes, host)?;
        // The limit keeps it small.
        Ok(Some((draft.bitmaps.len() as u32, host, len)))
    }

    /// Adds bits to a bitmap that is marked as in use, in place. Returns its table as it is to be written, once what it
    /// points to is counted.
    pub(super) fn add_bits(&mut self, bitmap: &Bitmap, bits: &Bits) -> Result<Vec<u8>> {
        let size = self.cluster_size();
        let mut table = self.bitmap_table(bitmap)?;
        let mut cluster = vec![0; size as usize];
        let mut next = bits.next_page(0);
        while let Some(bit) = next {
            let index = bit / (size * 8);
            next = bits.next_page((index + 1) * size * 8);
            let Some(entry) = usize::try_from(index).ok().and_then(|index| table.get_mut(index)) else {
                break;
            };
            let host = match *entry {
                BitmapCluster::Ones => continue,
                BitmapCluster::Zeros => {
                    cluster.fill(0);
                    self.allocate(1)?.host
                }
                BitmapCluster::Bits(host) => {
                    self.guard(host)?;
                    read_exact(&**self.disk.storage(), &mut cluster, host.get())?;
                    host.get()
                }
            };
            bits.merge_into(index * size * 8, &mut cluster);
            self.disk.write(&cluster, host)?;
            *entry = BitmapCluster::Bits(HostOffset(host));
        }
        Ok(table.into_iter().flat_map(|entry| entry.encode().to_be_bytes()).collect())
    }
}

/// Clears the bits of `bytes` from `len` on.
fn clear_from(bytes: &mut [u8], len: u64) {
    let first = usize::try_from(len / 8).unwrap_or(usize::MAX);
    let Some((partial, rest)) = bytes.get_mut(first..).and_then(<[u8]>::split_first_mut) else { return };
    *partial &= !(u8::MAX << (len % 8));
    rest.fill(0);
}

fn put_entry(table: &mut [u8], index: u64, entry: BitmapCluster) {
    let entries = table.as_chunks_mut::<8>().0;
    if let Some(slot) = usize::try_from(index).ok().and_then(|index| entries.get_mut(index)) {
        *slot = entry.encode().to_be_bytes();
    }
}
