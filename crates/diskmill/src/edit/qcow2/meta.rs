//! What an open qcow2 image knows of itself, and how changes reach the file.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use diskmill_format::qcow2::{Geometry, Header, HeaderArea, L2Codec, RefcountWidth, feature};
use diskmill_format::{HostOffset, Limits};

use super::cache::{Cache, Class};
use crate::edit::disk::Disk;
use crate::error::{Error, Kind, Result};
use crate::reader::{read_exact, read_full};
use crate::tables::SLICE;

/// References to be given up that are held back until the next commit, at most about.
const MOST_LOWERS: usize = 1 << 16;
/// The part of the header that [`Header::patch`](diskmill_format::qcow2::Header::patch) may change.
pub(super) const SECTOR: usize = 512;

/// Metadata of an image that is open for writing.
///
/// Changes are made in memory and reach the file in [`commit`](Self::commit), in this order:
///
/// 1. new tables and refcount blocks, which nothing points to yet, and raised refcounts; barrier (it covers the guest's
///    data too);
/// 2. the refcount table, if there are new blocks; barrier;
/// 3. the L1 and L2 entries that point to all that; barrier;
/// 4. lowered refcounts. Only now may the clusters that nobody uses any more be allocated anew.
///
/// A crash at any point of this leaves clusters that are counted and not used, and nothing worse: each step only relies
/// on what a barrier has made durable, and L1 and L2 entries lie within sectors.
pub(crate) struct Meta {
    pub(super) disk: Arc<Disk>,
    /// The external data file.
    pub(super) data: Option<Arc<Disk>>,
    pub(super) area: HeaderArea,
    pub(super) limits: Limits,
    pub(super) geometry: Geometry,
    pub(super) entries: L2Codec,
    pub(super) width: RefcountWidth,
    pub(super) cache: Cache,
    /// The refcount table: host offset of each block, 0 for none.
    pub(super) blocks: Vec<u64>,
    /// Blocks that the table in the file does not have yet, by index.
    pub(super) new_blocks: Vec<usize>,
    /// Metadata clusters that nothing in the file points to yet.
    pub(super) fresh: HashSet<u64>,
    /// References to be given up once the entries that held them are gone from the file: cluster number and how many.
    pub(super) lowers: BTreeMap<u64, u64>,
    /// Host offset behind the last packed payload, if its cluster has room for more.
    pub(super) packed_tail: Option<u64>,
    /// No cluster before this one is free.
    pub(super) hint: u64,
    /// Clusters from here on were never used: the file has zeros there, or ends before.
    pub(super) virgin: u64,
    /// The file was grown beyond what is used.
    pub(super) grown: bool,
    /// Clusters that become free are punched out of the file.
    pub(super) punch: bool,
    /// A change of several tables that the header makes visible all at once.
    pub(super) switch: Option<Switch>,
}

/// See [`Meta::switch`].
pub(super) struct Switch {
    /// The first cluster that was free to the end of the file when it began: all that is written lies behind it.
    pub(super) base: u64,
    /// The next cluster to hand out.
    pub(super) next: u64,
    /// The refcount blocks in the file are not to be touched.
    pub(super) relocate: bool,
}

impl Meta {
    pub(crate) fn open(
        disk: Arc<Disk>,
        data: Option<Arc<Disk>>,
        area: HeaderArea,
        limits: Limits,
    ) -> Result<Self> {
        let header = &area.header;
        let geometry = header.geometry;
        let virgin = match disk.storage().is_block_device() {
            // What stands behind the image on a device is anything.
            true => u64::MAX,
            false => disk.len().div_ceil(geometry.cluster_size()),
        };
        let mut meta = Self {
            entries: L2Codec::new(geometry, header.version, header.has(feature::DATA_FILE)),
            geometry,
            width: header.refcount_width,
            cache: Cache::default(),
            blocks: Vec::new(),
            new_blocks: Vec::new(),
            fresh: HashSet::new(),
            lowers: BTreeMap::new(),
            packed_tail: None,
            hint: 0,
            virgin,
            grown: false,
            punch: false,
            switch: None,
            disk,
            data,
            area,
            limits,
        };
        meta.read_blocks()?;
        Ok(meta)
    }

    /// Reads the refcount table, which [`Limits`] bound.
    fn read_blocks(&mut self) -> Result<()> {
        let header = &self.area.header;
        let cluster_size = self.geometry.cluster_size();
        let at = header.refcount_table_offset.get();
        let len = u64::from(header.refcount_table_clusters).saturating_mul(cluster_size);
        if len > self.limits.qcow2_refcount_table_bytes || len == 0 {
            return Err(Error::corrupt("refcount table", Some(at), format!("it is {len} bytes long")));
        }
        let mut bytes = vec![0; len as usize];
        read_exact(&**self.disk.storage(), &mut bytes, at)
            .map_err(|error| error.within("refcount table", at))?;
        let (entries, _) = bytes.as_chunks::<8>();
        self.blocks = entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        let last = self.blocks.iter().rposition(|&block| block != 0).map_or(0, |index| index + 1);
        self.blocks.truncate(last);
        let wrong = self.blocks.iter().position(|&block| block % cluster_size != 0 || block >> 56 != 0);
        if let Some(index) = wrong {
            let why = "it is not a multiple of the cluster size below 2^56";
            return Err(Error::corrupt(format!("refcount table, entry {index}"), Some(at), why));
        }
        if self.blocks.first().is_none_or(|&block| block == 0) {
            return Err(Error::corrupt("refcount table", Some(at), "it does not count the header"));
        }
        Ok(())
    }

    pub(super) const fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Bytes in a slice of a table that takes a cluster.
    pub(super) fn slice_size(&self) -> u64 {
        SLICE.min(self.cluster_size())
    }

    pub(super) fn is_fresh(&self, at: u64) -> bool {
        let host = at & !(self.cluster_size() - 1);
        match &self.switch {
            Some(switch) => host >> self.geometry.cluster_bits() >= switch.base,
            None => self.fresh.contains(&host),
        }
    }

    /// Puts a new table of one cluster in memory, which nothing in the file points to. The file has room for it then.
    pub(super) fn put_fresh(&mut self, host: u64, bytes: &[u8], class: Class) -> Result<()> {
        self.disk.make_room(bytes, host)?;
        self.fresh.insert(host);
        let size = self.slice_size();
        for (at, slice) in (host..).step_by(size as usize).zip(bytes.chunks(size as usize)) {
            self.cache.put(at, slice.into(), class);
        }
        Ok(())
    }

    /// All bytes of a table of one cluster.
    pub(super) fn whole(&mut self, host: u64, class: Class) -> Result<Vec<u8>> {
        let (size, cluster) = (self.slice_size(), self.cluster_size());
        let mut bytes = Vec::with_capacity(cluster as usize);
        for at in (host..host.saturating_add(cluster)).step_by(size as usize) {
            bytes.extend_from_slice(&self.cache.get(&self.disk, at, size, class)?);
        }
        Ok(bytes)
    }

    /// Commits if much has gathered. To be called between operations.
    pub(super) fn relieve(&mut self) -> Result<()> {
        if self.cache.is_full() || self.lowers.len() > MOST_LOWERS { self.commit() } else { Ok(()) }
    }

    /// Brings all changes to the file, in the order that the type tells. May be called again after an error.
    ///
    /// # Errors
    /// [`Kind::Io`]; [`Kind::Limit`] if the refcount table cannot grow any more.
    pub(crate) fn commit(&mut self) -> Result<()> {
        let moved = self.place_block_table()?;
        let Self { cache, disk, fresh, geometry, .. } = self;
        let within = !(geometry.cluster_size() - 1);
        cache.write(disk, |at, class| class == Class::Refcounts || fresh.contains(&(at & within)))?;
        if let Some((at, clusters)) = moved {
            self.write_block_table(at, clusters)?;
        }
        self.sync()?;
        if let Some((at, clusters)) = moved {
            let header = &self.area.header;
            let old = header.refcount_table_offset.get() >> self.geometry.cluster_bits();
            let old = old..old + u64::from(header.refcount_table_clusters);
            self.put_header(|header| {
                header.refcount_table_offset = at;
                header.refcount_table_clusters = clusters;
            })?;
            old.for_each(|cluster| *self.lowers.entry(cluster).or_default() += 1);
        } else if !self.new_blocks.is_empty() {
            for &index in &self.new_blocks {
                let block = self.blocks.get(index).copied().unwrap_or_default();
                let at = self.area.header.refcount_table_offset.get() + index as u64 * 8;
                self.disk.write(&block.to_be_bytes(), at)?;
            }
            self.disk.sync()?;
        }
        self.new_blocks.clear();
        self.fresh.clear();
        if self.cache.is_dirty() {
            self.cache.write(&self.disk, |_, _| true)?;
            self.disk.sync()?;
        }
        if !self.lowers.is_empty() {
            self.apply_lowers()?;
            self.cache.write(&self.disk, |_, _| true)?;
        }
        Ok(())
    }

    /// Makes what was written to all files durable.
    pub(super) fn sync(&self) -> Result<()> {
        if let Some(data) = &self.data {
            data.sync()?;
        }
        self.disk.sync()
    }

    /// Changes fixed fields of the header, in the file first; a barrier follows.
    pub(super) fn put_header(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        let before = self.area.header.clone();
        change(&mut self.area.header);
        let done = self.write_header().and_then(|()| self.disk.sync());
        if done.is_err() {
            self.area.header = before;
        }
        done
    }

    /// Writes the fixed fields of the header, which lie in one sector.
    fn write_header(&self) -> Result<()> {
        let mut sector = [0; SECTOR];
        read_exact(&**self.disk.storage(), &mut sector, 0)?;
        if !self.area.header.patch(&mut sector) {
            return Err(Error::corrupt("qcow2 header", Some(0), "it is longer than a sector"));
        }
        self.disk.write(&sector, 0)
    }

    /// Makes a change of several tables that becomes visible all at once, when the header is written: `change` puts
    /// all that it writes into clusters that were free, copies of the refcount blocks included, and sets the fields of
    /// the header. If it fails, the image is as it was.
    pub(super) fn switch<T>(&mut self, change: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.commit()?;
        let before = self.disk.len();
        let result = self.try_switch(change);
        if result.is_err() {
            // A header that was to be written may have reached the disk, whatever the system says.
            let unseen = self.switch.take().is_some();
            self.reload()?;
            if unseen && !self.disk.storage().is_block_device() {
                // Only space is lost if this fails.
                let _ = self.disk.set_len(before);
                self.virgin = before.div_ceil(self.cluster_size());
            }
        }
        result
    }

    fn try_switch<T>(&mut self, change: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.begin_behind_all(true)?;
        let value = change(self)?;
        // The place of the table itself is counted in blocks that may need more room in the table.
        let old = (
            self.area.header.refcount_table_offset.get() >> self.geometry.cluster_bits(),
            u64::from(self.area.header.refcount_table_clusters),
        );
        for index in 0..old.1 {
            self.change_count(old.0 + index, -1)?;
        }
        let (at, clusters) = self.take_block_table()?;
        self.area.header.refcount_table_offset = at;
        self.area.header.refcount_table_clusters = clusters;
        self.spill_all()?;
        self.write_block_table(at, clusters)?;
        self.sync()?;
        self.switch = None;
        self.write_header()?;
        self.disk.sync()?;
        self.new_blocks.clear();
        self.fresh.clear();
        self.hint = 0;
        Ok(value)
    }

    /// Forgets all changes that the file does not have.
    pub(super) fn reload(&mut self) -> Result<()> {
        self.cache.clear();
        self.new_blocks.clear();
        self.fresh.clear();
        self.lowers.clear();
        self.packed_tail = None;
        self.hint = 0;
        self.read_area()?;
        self.read_blocks()
    }

    /// The first cluster, or as much of it as the file has.
    pub(super) fn first_cluster(&self) -> Result<Vec<u8>> {
        // At most 2 MiB.
        let mut cluster = vec![0; self.cluster_size() as usize];
        let got = read_full(&**self.disk.storage(), &mut cluster, 0)?;
        cluster.truncate(got);
        Ok(cluster)
    }

    /// Takes notice of the header that is in the file.
    pub(super) fn read_area(&mut self) -> Result<()> {
        self.area = HeaderArea::parse(&self.first_cluster()?, &self.limits)?;
        let header = &self.area.header;
        self.width = header.refcount_width;
        self.entries = L2Codec::new(self.geometry, header.version, header.has(feature::DATA_FILE));
        Ok(())
    }

    /// In a switch: writes new tables early, since nothing points to them, if there are many.
    pub(super) fn spill(&mut self) -> Result<()> {
        if self.cache.is_full() { self.spill_all() } else { Ok(()) }
    }

    fn spill_all(&mut self) -> Result<()> {
        let Some(base) = self.switch.as_ref().map(|switch| switch.base) else { return Ok(()) };
        let bits = self.geometry.cluster_bits();
        self.cache.write(&self.disk, |at, _| at >> bits >= base)?;
        if self.cache.is_dirty() {
            return Err(Error::invalid("a table was changed in its place during a switch"));
        }
        Ok(())
    }

    /// Clears what a writer has to clear when it opens an image: autoclear bits that it does not know.
    pub(crate) fn clear_unknown_features(&mut self) -> Result<()> {
        let known = feature::BITMAPS | feature::RAW_DATA_FILE;
        if self.area.header.autoclear & !known == 0 {
            return Ok(());
        }
        self.put_header(|header| header.autoclear &= known)
    }

    /// Commits, and cuts off what the file was grown by and is not used.
    pub(crate) fn close(&mut self) -> Result<()> {
        self.commit()?;
        if self.grown {
            self.disk.set_len(self.virgin.saturating_mul(self.cluster_size()))?;
            self.grown = false;
        }
        self.sync()
    }

    /// Makes the file reach to the end of cluster `end` (exclusive), so that no write changes its length.
    pub(super) fn reach(&mut self, end: u64) -> Result<()> {
        /// Growing step in bytes, which is a system call: a part of the file between these.
        const STEP: (u64, u64) = (1 << 20, 64 << 20);
        let bits = self.geometry.cluster_bits();
        if end >> (56 - bits) != 0 {
            return Err(Error::new(Kind::Limit, "the image would need host offsets of more than 56 bits"));
        }
        let need = end << bits;
        if need <= self.disk.len() {
            return Ok(());
        }
        if self.disk.storage().is_block_device() {
            let len = self.disk.len();
            let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(Error::io(format!("the device is full ({len} bytes)"), full));
        }
        self.grown = true;
        let roomy = need.saturating_add((need / 8).clamp(STEP.0, STEP.1));
        self.disk.set_len(roomy).or_else(|_| self.disk.set_len(need))
    }

    /// Cuts off the file what nobody uses at its end. The refcounts in the file are up to date.
    pub(super) fn cut(&mut self) -> Result<()> {
        if self.disk.storage().is_block_device() {
            return Ok(());
        }
        self.drop_last_blocks()?;
        let end = self.used_end(0)?;
        if end << self.geometry.cluster_bits() < self.disk.len() {
            self.disk.set_len(end << self.geometry.cluster_bits())?;
            self.virgin = end;
            self.grown = false;
        }
        self.sync()
    }

    pub(super) fn corrupt(&self, structure: impl Into<String>, at: HostOffset, why: &str) -> Error {
        Error::corrupt(structure, Some(at.get()), why)
    }
}
