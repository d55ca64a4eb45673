use std::ops::Range;

use diskmill_codec::Codec;
use diskmill_format::qcow2::{
    CompressionType, CryptMethod, Extensions, Geometry, Header, HeaderArea, L1Entry, L2Codec, RefcountWidth,
    feature,
};
use diskmill_format::{HostOffset, Limits};

use super::EncryptionFormat;
use super::options::{Compat, Preallocation, Qcow2Options};
use super::refcounts::Refcounts;
use crate::convert::{Assembler, Finish, RUN, TargetFile, Unit, WriteOp};
use crate::error::{Error, Kind, Result};

/// Lays out a fresh qcow2 image from front to back, in guest order.
///
/// Data, L2 tables and refcount blocks are placed as they come, so memory does not grow with the image but for the L1
/// table and the refcount table. These two and the header, which alone makes it an image, come last.
pub(crate) struct Qcow2Assembler {
    options: Qcow2Options,
    geometry: Geometry,
    entries: L2Codec,
    width: RefcountWidth,
    refcounts: Refcounts,
    l1: Vec<u64>,
    /// The L2 table that is being filled: its L1 index and its bytes.
    l2: Option<(u64, Vec<u8>)>,
    /// Where the next packed payload goes, if it can follow the last one.
    packed_at: Option<u64>,
    /// The file that takes the output may hold old bytes, so what must read as zeros has to be written.
    dirty_target: bool,
    /// LUKS header and key material, and where they go.
    luks: Option<(HostOffset, Vec<u8>)>,
}

impl Qcow2Assembler {
    /// For an image with these (checked) options. `dirty_target`: the output may hold old bytes (a device).
    /// `luks`: the header of the cipher that [`TargetFile::Encrypted`] stands for.
    pub(crate) fn new(options: Qcow2Options, dirty_target: bool, luks: Option<Vec<u8>>) -> Result<Self> {
        let geometry = options.geometry()?;
        let width = options.refcount_width()?;
        let version = if options.compat == Compat::V2 { 2 } else { 3 };
        let mut refcounts = Refcounts::new(geometry, width);
        let place = |bytes: Vec<u8>| -> Result<_> {
            Ok((refcounts.take((bytes.len() as u64).div_ceil(geometry.cluster_size()))?, bytes))
        };
        Ok(Self {
            luks: luks.map(place).transpose()?,
            entries: L2Codec::new(geometry, version, options.data_file.is_some()),
            refcounts,
            geometry,
            width,
            l1: Vec::new(),
            l2: None,
            packed_at: None,
            dirty_target,
            options,
        })
    }

    fn cluster(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// The entry of the cluster at `guest`, in its L2 table. Tables that are left are written.
    fn set_entry(&mut self, guest: u64, word: u64, bitmap: u64, out: &mut Vec<WriteOp>) -> Result<()> {
        let index = self.geometry.l1_index(guest);
        if self.l2.as_ref().is_none_or(|(current, _)| *current != index) {
            self.flush_l2(out)?;
            self.l2 = Some((index, vec![0; self.cluster() as usize]));
        }
        let Some((_, table)) = &mut self.l2 else { return Ok(()) };
        let size = self.geometry.l2_entry_size();
        let at = self.geometry.l2_index(guest) as usize * size;
        let Some(slot) = table.get_mut(at..).and_then(|rest| rest.get_mut(..size)) else {
            return Err(Error::invalid("an L2 index outside its table"));
        };
        let (first, second) = slot.split_at_mut(8);
        first.copy_from_slice(&word.to_be_bytes());
        if !second.is_empty() {
            second.copy_from_slice(&bitmap.to_be_bytes());
        }
        Ok(())
    }

    fn flush_l2(&mut self, out: &mut Vec<WriteOp>) -> Result<()> {
        let Some((index, table)) = self.l2.take() else { return Ok(()) };
        let at = self.refcounts.take(1)?;
        self.refcounts.settle(out)?;
        out.push(WriteOp::bytes(at.get(), table));
        let index = index as usize;
        if self.l1.len() <= index {
            self.l1.resize(index + 1, 0);
        }
        if let Some(slot) = self.l1.get_mut(index) {
            *slot = L1Entry::encode_owned(at);
        }
        Ok(())
    }

    fn is_aes(&self) -> bool {
        self.options.encryption.as_ref().is_some_and(|options| options.format == EncryptionFormat::Aes)
    }

    fn external(&self) -> bool {
        self.options.data_file.is_some()
    }

    /// A host cluster for the guest cluster at `guest`: with an external data file, the same offset there.
    fn data_cluster(&mut self, guest: u64) -> Result<HostOffset> {
        if self.external() { Ok(HostOffset(guest)) } else { self.refcounts.take(1) }
    }

    /// Whether zeros need nothing at all.
    fn leaves_zeros_out(&self) -> bool {
        self.options.preallocation == Preallocation::Off && self.options.backing_file.is_none()
    }

    const fn data_file(&self) -> TargetFile {
        match (&self.luks, &self.options.data_file) {
            (Some(_), _) => TargetFile::Encrypted,
            (None, Some(_)) => TargetFile::Data,
            (None, None) => TargetFile::Main,
        }
    }

    fn place_data(&mut self, guest: u64, zero: u32, buf_at: usize, out: &mut Vec<WriteOp>) -> Result<()> {
        let host = self.data_cluster(guest)?;
        let file = self.data_file();
        let cluster = self.cluster();
        if self.geometry.extended_l2() && zero != 0 {
            // Zero subclusters: unallocated reads as zeros unless there is a backing file.
            let marked = if self.options.backing_file.is_some() { zero } else { 0 };
            let sub = self.geometry.subcluster_size();
            for index in (0..32u32).filter(|index| zero >> index & 1 == 0) {
                let skip = u64::from(index) * sub;
                WriteOp::push_buf(out, file, host.get() + skip, buf_at + skip as usize, sub as usize);
            }
            if self.options.preallocation != Preallocation::Off || self.external() {
                for index in (0..32u32).filter(|index| zero >> index & 1 == 1) {
                    self.reserve(host.get() + u64::from(index) * sub, sub, out);
                }
            }
            return self.set_entry(
                guest,
                L2Codec::encode_standard(host),
                L2Codec::encode_bitmap(!zero, marked),
                out,
            );
        }
        WriteOp::push_buf(out, file, host.get(), buf_at, cluster as usize);
        self.set_entry(guest, L2Codec::encode_standard(host), L2Codec::encode_bitmap(u32::MAX, 0), out)
    }

    /// What a preallocated cluster needs besides its place in the tables.
    fn reserve(&self, host: u64, len: u64, out: &mut Vec<WriteOp>) {
        let file = self.data_file();
        match self.options.preallocation {
            Preallocation::Full => WriteOp::push_zeroes(out, file, host, len, true),
            // A device has nothing to reserve, and its old bytes must not show.
            _ if self.dirty_target => WriteOp::push_zeroes(out, file, host, len, false),
            Preallocation::Falloc => WriteOp::push_reserve(out, file, host, len),
            _ => {}
        }
    }

    fn place_zero(&mut self, guest: u64, out: &mut Vec<WriteOp>) -> Result<()> {
        let backed = self.options.backing_file.is_some();
        let preallocate = self.options.preallocation != Preallocation::Off;
        if !preallocate {
            if !backed {
                return Ok(());
            }
            if self.geometry.extended_l2() {
                return self.set_entry(guest, 0, L2Codec::encode_bitmap(0, u32::MAX), out);
            }
            if self.options.compat == Compat::V3 {
                return self.set_entry(guest, L2Codec::encode_zero(None), 0, out);
            }
        }
        // Preallocated, or zeros over a backing file in version 2, which knows no zero clusters.
        let host = self.data_cluster(guest)?;
        let cluster = self.cluster();
        if preallocate && self.options.encryption.is_some() {
            // What the file has there decrypts to noise: the cluster reads as zeros and keeps its place.
            self.reserve(host.get(), cluster, out);
            let (word, bitmap) = match self.geometry.extended_l2() {
                true => (L2Codec::encode_standard(host), L2Codec::encode_bitmap(0, u32::MAX)),
                false => (L2Codec::encode_zero(Some(host)), 0),
            };
            return self.set_entry(guest, word, bitmap, out);
        }
        if preallocate {
            self.reserve(host.get(), cluster, out);
        } else if self.is_aes() {
            // The mover encrypts what it reads, and this was not read.
            return Err(Error::unsupported(
                "zeros over a backing file in version 2 with legacy AES encryption",
            ));
        } else if self.dirty_target || self.luks.is_some() {
            out.push(WriteOp::zeroes(self.data_file(), host.get(), cluster, false));
        }
        let bitmap =
            if backed { L2Codec::encode_bitmap(0, u32::MAX) } else { L2Codec::encode_bitmap(u32::MAX, 0) };
        self.set_entry(guest, L2Codec::encode_standard(host), bitmap, out)
    }

    fn place_skipped(&mut self, guest: u64, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.options.preallocation == Preallocation::Off {
            return Ok(());
        }
        // Allocated, but every subcluster still the backing file's (only with extended L2).
        let host = self.data_cluster(guest)?;
        self.reserve(host.get(), self.cluster(), out);
        self.set_entry(guest, L2Codec::encode_standard(host), 0, out)
    }

    fn place_packed(&mut self, guest: u64, buf_at: usize, len: usize, out: &mut Vec<WriteOp>) -> Result<()> {
        let host = self.packed_place(len as u64)?;
        WriteOp::push_buf(out, TargetFile::Main, host, buf_at, len);
        let entry = self.entries.encode_compressed(HostOffset(host), len as u32).ok_or_else(|| {
            Error::new(Kind::Limit, "a compressed cluster lies where its entry cannot point")
        })?;
        self.set_entry(guest, entry, 0, out)
    }

    /// Room for `len` bytes: behind the last payload if possible, else in a new cluster. Each cluster that the
    /// payload touches counts one reference for it.
    fn packed_place(&mut self, len: u64) -> Result<u64> {
        let cluster = self.cluster();
        if let Some(at) = self.packed_at {
            let room = at.next_multiple_of(cluster) - at;
            let open = at - at % cluster;
            // An open cluster whose count is written or at its maximum takes no more.
            let shareable =
                room > 0 && self.refcounts.get(open).is_some_and(|count| count < self.refcounts.max());
            // What does not fit goes on in the next cluster, if that is the next free one.
            let goes_on = at.next_multiple_of(cluster) == self.refcounts.end();
            if shareable && (len <= room || goes_on) {
                if len > room {
                    self.refcounts.take((len - room).div_ceil(cluster))?;
                }
                if open >= self.refcounts.open_from() {
                    self.refcounts.raise(open)?;
                    self.packed_at = Some(at + len);
                    return Ok(at);
                }
                // Taking clusters closed the block that counts the open one: the payload starts in the new ones.
                let fresh = at.next_multiple_of(cluster);
                let missing = len.div_ceil(cluster) - (len - room).div_ceil(cluster);
                self.refcounts.take(missing)?;
                self.packed_at = Some(fresh + len);
                return Ok(fresh);
            }
        }
        let at = self.refcounts.take(len.div_ceil(cluster))?.get();
        self.packed_at = Some(at + len);
        Ok(at)
    }

    fn header(&self, size: u64, l1: HostOffset, table: HostOffset, table_clusters: u64) -> Result<Vec<u8>> {
        let options = &self.options;
        let bits = [
            (feature::DATA_FILE, options.data_file.is_some()),
            (feature::COMPRESSION_TYPE, options.compression == CompressionType::Zstd),
            (feature::EXTENDED_L2, options.extended_l2),
        ];
        let area = HeaderArea {
            header: Header {
                version: if options.compat == Compat::V2 { 2 } else { 3 },
                backing_name: None,
                geometry: self.geometry,
                size,
                crypt: match options.encryption.as_ref().map(|encryption| encryption.format) {
                    None => CryptMethod::None,
                    Some(EncryptionFormat::Luks) => CryptMethod::Luks,
                    Some(EncryptionFormat::Aes) => CryptMethod::Aes,
                },
                l1_size: self.geometry.l1_entries(size) as u32,
                l1_offset: l1,
                refcount_table_offset: table,
                refcount_table_clusters: table_clusters as u32,
                snapshots: 0,
                snapshots_offset: HostOffset(0),
                incompatible: bits.into_iter().filter(|(_, on)| *on).map(|(bit, _)| bit).sum(),
                compatible: if options.lazy_refcounts { feature::LAZY_REFCOUNTS } else { 0 },
                autoclear: if options.data_file_raw { feature::RAW_DATA_FILE } else { 0 },
                refcount_width: self.width,
                header_length: 0,
                compression: options.compression,
            },
            extensions: Extensions {
                backing_format: options.backing_format.as_ref().map(|name| name.clone().into_bytes()),
                data_file: options.data_file.as_ref().map(|name| name.clone().into_bytes()),
                luks_header: self.luks.as_ref().map(|(at, bytes)| (at.get(), bytes.len() as u64)),
                ..Extensions::default()
            },
            backing_name: options.backing_file.as_ref().map(|name| name.clone().into_bytes()),
        };
        Ok(area.encode()?)
    }
}

impl Assembler for Qcow2Assembler {
    fn unit(&self) -> u64 {
        self.cluster()
    }

    fn subunit(&self) -> u64 {
        self.geometry.subcluster_size()
    }

    fn codec(&self) -> Option<Codec> {
        Some(self.options.codec())
    }

    fn whole_units(&self) -> bool {
        true
    }

    fn ordered(&self) -> bool {
        true
    }

    fn place(&mut self, guest: Range<u64>, units: &[Unit], out: &mut Vec<WriteOp>) -> Result<()> {
        let mut at = guest.start;
        let mut buf_at = 0usize;
        for unit in units {
            match *unit {
                Unit::Zero => self.place_zero(at, out)?,
                Unit::Data { zero } => self.place_data(at, zero, buf_at, out)?,
                Unit::Packed { at: buf_at, len } => self.place_packed(at, buf_at, len as usize, out)?,
                Unit::Stored { at: buf_at } => self.place_data(at, 0, buf_at, out)?,
            }
            at += self.cluster();
            buf_at += self.cluster() as usize;
        }
        self.refcounts.settle(out)
    }

    fn longest_zero(&self) -> u64 {
        if self.leaves_zeros_out() { u64::MAX } else { RUN }
    }

    fn longest_skip(&self) -> u64 {
        if self.options.preallocation == Preallocation::Off { u64::MAX } else { RUN }
    }

    fn zero(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.leaves_zeros_out() {
            return Ok(());
        }
        for guest in run.step_by(self.cluster() as usize) {
            self.place_zero(guest, out)?;
        }
        self.refcounts.settle(out)
    }

    fn skip(&mut self, run: Range<u64>, out: &mut Vec<WriteOp>) -> Result<()> {
        if self.options.preallocation == Preallocation::Off {
            return Ok(());
        }
        for guest in run.step_by(self.cluster() as usize) {
            self.place_skipped(guest, out)?;
        }
        self.refcounts.settle(out)
    }

    fn check_size(&self, size: u64) -> Result<()> {
        let entries = self.geometry.l1_entries(size);
        if entries.saturating_mul(8) > Limits::default().qcow2_l1_bytes {
            return Err(Error::new(
                Kind::Limit,
                format!("a disk of {size} bytes needs a larger L1 table than QEMU accepts with clusters of {} bytes", self.cluster()),
            )
            .hint("choose a larger cluster_size"));
        }
        Ok(())
    }

    fn finish(&mut self, size: u64, out: &mut Vec<WriteOp>) -> Result<Finish> {
        self.check_size(size)?;
        self.flush_l2(out)?;
        if let Some((at, bytes)) = &self.luks {
            out.push(WriteOp::bytes(at.get(), bytes.clone()));
        }
        let mut l1 = std::mem::take(&mut self.l1);
        l1.resize(self.geometry.l1_entries(size) as usize, 0);
        let mut bytes: Vec<u8> = l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        // An empty disk has no L1 table, and a cluster for it would be a leak.
        let used = bytes.len() as u64;
        let clusters = used.div_ceil(self.cluster());
        bytes.resize((clusters * self.cluster()) as usize, 0);
        let other_lens: Vec<u64> = self.external().then_some(size).into_iter().collect();
        if let Some((table, l1_at)) = self.refcounts.lay_out_empty(clusters, out)? {
            out.push(WriteOp::bytes(l1_at.get(), bytes));
            let header = Some(self.header(size, l1_at, table, 1)?);
            return Ok(Finish {
                file_len: Some(l1_at.get().saturating_add(used)),
                other_lens,
                header,
                ..Finish::default()
            });
        }
        let l1_at = self.refcounts.take(clusters)?;
        out.push(WriteOp::bytes(l1_at.get(), bytes));
        let (table, table_clusters) =
            self.refcounts.finish(out, Limits::default().qcow2_refcount_table_bytes)?;
        let header = self.header(size, l1_at, table, table_clusters)?;
        Ok(Finish {
            file_len: Some(self.refcounts.end()),
            other_lens,
            header: Some(header),
            ..Finish::default()
        })
    }
}
