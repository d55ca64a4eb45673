//! The guest's writes of packed (compressed) clusters.

use std::borrow::Cow;
use std::sync::atomic::Ordering;

use diskmill_codec::{Codec, Packer};
use diskmill_format::HostOffset;
use diskmill_format::qcow2::{Cluster, CompressedRef};

use super::Qcow2Writer;
use super::meta::Meta;
use super::tables::Entry;
use crate::edit::Payloads;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::qcow2::codec_of;

impl Qcow2Writer {
    /// Refuses an image that cannot have packed clusters.
    pub(crate) fn takes_packed(&self) -> Result<()> {
        let cannot = |what: &str| Err(Error::unsupported(format!("compressed clusters in an image {what}")));
        match (self.external, self.encrypted) {
            (true, _) => cannot("with an external data file"),
            // QEMU would write them without encryption.
            (_, true) => cannot("that is encrypted"),
            _ => Ok(()),
        }
    }

    /// The codec and the size of packed clusters, where there can be any.
    pub(crate) fn packs(&self) -> Option<(Codec, u64)> {
        self.takes_packed().ok()?;
        let meta = self.meta();
        Some((codec_of(meta.area.header.compression), meta.cluster_size()))
    }

    /// Packed payloads that were written until now.
    pub(crate) fn payloads_written(&self) -> u64 {
        self.payloads.load(Ordering::Acquire)
    }

    /// Writes whole clusters, the last of which the end of the disk may cut, packed; plain where that is not smaller.
    /// `payloads` has those that need not be packed anew.
    pub(super) fn write_packed_guest(
        &self,
        image: &Image,
        buf: &[u8],
        at: u64,
        payloads: &Payloads,
    ) -> Result<()> {
        self.takes_packed()?;
        let (size, codec) = {
            let meta = self.meta();
            (meta.cluster_size(), codec_of(meta.area.header.compression))
        };
        let end = at.saturating_add(buf.len() as u64);
        if !at.is_multiple_of(size) || !(end.is_multiple_of(size) || end == image.size()) {
            return Err(Error::invalid(format!(
                "{} bytes at {at} are not whole clusters of {size} bytes, as only those are compressed",
                buf.len()
            )));
        }
        let failed = |error: diskmill_codec::Error| Error::invalid(error.to_string());
        let mut packer = None;
        // At most 2 MiB.
        let cluster = size as usize;
        for (bytes, guest) in buf.chunks(cluster).zip((at..).step_by(cluster)) {
            if let Some(payload) = payloads.get(guest) {
                self.put_packed(guest, payload)?;
                continue;
            }
            let (packer, room) = match &mut packer {
                Some(made) => made,
                none => {
                    let made = Packer::by_default(codec).map_err(failed)?;
                    none.insert((made, vec![0; cluster.saturating_sub(1)]))
                }
            };
            let mut whole = Cow::Borrowed(bytes);
            if bytes.len() < cluster {
                whole.to_mut().resize(cluster, 0);
            }
            match packer.pack(&whole, room).map_err(failed)? {
                Some(len) => self.put_packed(guest, room.get(..len).unwrap_or_default())?,
                None => self.write_guest(image, bytes, guest)?,
            }
        }
        Ok(())
    }

    /// Makes `payload` what the cluster at `guest` has.
    fn put_packed(&self, guest: u64, payload: &[u8]) -> Result<()> {
        let size = self.meta().cluster_size();
        let _exclusive = self.ranges.lock(guest..guest.saturating_add(size), true);
        // Payloads of several threads may share a sector: they are written under the lock.
        let mut meta = self.meta();
        meta.relieve()?;
        let host = meta.place_packed(payload.len() as u64)?;
        // Nobody reads that place now, and what was there is not to be taken for what comes there.
        self.payloads.fetch_add(1, Ordering::AcqRel);
        let cluster = Cluster::Compressed(CompressedRef { host, len: payload.len() as u32 });
        let written = meta.disk.write(payload, host.get());
        let new = Entry { cluster, copied: false };
        let linked = written.and_then(|()| {
            let old = meta.entry(guest)?;
            meta.set_entry(guest, new).map(|()| old)
        });
        match linked {
            Ok(old) => meta.release_replaced(old, new),
            Err(error) => {
                // At worst clusters are leaked.
                let _ = meta.give_up_packed(host, payload.len() as u64);
                Err(error)
            }
        }
    }
}

impl Meta {
    /// Finds a place for a packed payload of `len` bytes, at least one and less than a cluster: behind the last one, if
    /// that leaves room in its cluster or the next one is free, as QEMU does (`qcow2_alloc_bytes`). Each cluster that it
    /// touches has one more reference.
    fn place_packed(&mut self, len: u64) -> Result<HostOffset> {
        let (size, bits) = (self.cluster_size(), self.geometry.cluster_bits());
        let mut tail = self.packed_tail;
        if let Some(at) = tail
            && (self.count_later(at >> bits)? == 0 || self.count(at >> bits)? >= self.width.max())
        {
            tail = None;
        }
        let room = tail.map_or(0, |tail| size - tail % size);
        let mut host = tail.unwrap_or(0);
        if len > room {
            let next = self.allocate(1)?.host;
            if tail.is_none_or(|tail| tail + room != next) {
                host = next;
            }
        }
        if let Some(tail) = tail.filter(|&tail| tail == host) {
            let cluster = tail >> bits;
            let count = self.count(cluster)?;
            self.set_count(cluster, count + 1)?;
        }
        let end = host + len;
        self.packed_tail = Some(end).filter(|end| !end.is_multiple_of(size));
        Ok(HostOffset(host))
    }

    /// Gives up the references of a payload that no entry has.
    fn give_up_packed(&mut self, host: HostOffset, len: u64) -> Result<()> {
        let entry = Cluster::Compressed(CompressedRef { host, len: len as u32 });
        self.release(Entry { cluster: entry, copied: false })
    }
}
