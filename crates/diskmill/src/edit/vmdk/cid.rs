//! The CID, which tells a delta whether its parent has changed.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use diskmill_format::Limits;
use diskmill_format::vmdk::SparseHeader;
use diskmill_format::vmdk::descriptor::replace_value;

use crate::edit::disk::Disk;
use crate::error::Result;
use crate::reader::read_full;

/// The first of the values that mean something else than a CID (no parent; a parent without one).
const RESERVED: u32 = 0xffff_fffe;

/// The descriptor of a VMDK that is being written to.
pub(super) struct DescriptorPlace {
    disk: Arc<Disk>,
    at: u64,
    /// Bytes that the text may take.
    room: u64,
}

impl DescriptorPlace {
    /// Where the descriptor stands in the file that the user named: embedded in a sparse extent, or all of the file.
    pub(super) fn find(disk: Arc<Disk>, limits: &Limits) -> Result<Option<Self>> {
        let mut start = [0; 512];
        let got = read_full(&**disk.storage(), &mut start, 0)?;
        let (at, room) = match SparseHeader::parse(start.get(..got).unwrap_or_default()) {
            Ok(header) => match header.descriptor(limits)? {
                Some(place) => place,
                None => return Ok(None),
            },
            Err(_) => (0, limits.vmdk_descriptor_bytes),
        };
        Ok(Some(Self { disk, at, room }))
    }

    /// Gives the disk a new CID, so that deltas made for the old content notice (as QEMU and VMware do when a disk is
    /// written to for the first time after it was opened). A descriptor without a CID stays as it is.
    pub(super) fn renew(&self) -> Result<()> {
        let mut text = vec![0; self.room.min(self.disk.len().saturating_sub(self.at)) as usize];
        let got = read_full(&**self.disk.storage(), &mut text, self.at)?;
        text.truncate(got);
        let text = text.split(|&byte| byte == 0).next().unwrap_or_default();
        // Random, as far as it matters: seeded anew for each value by the standard library.
        let cid = RandomState::new().build_hasher().finish() as u32 % RESERVED;
        let Some(mut new) = replace_value(text, "CID", format!("{cid:08x}").as_bytes()) else {
            return Ok(());
        };
        if new.len() < text.len() {
            new.resize(text.len(), b'\n');
        }
        let same = new.iter().zip(text).take_while(|(new, old)| new == old).count();
        let end = match new.len() == text.len() {
            true => new.len() - new.iter().rev().zip(text.iter().rev()).take_while(|(n, o)| n == o).count(),
            false => new.len(),
        };
        if new.len() as u64 > self.room {
            return Ok(());
        }
        match new.get(same..end) {
            Some(changed) if !changed.is_empty() => {
                self.disk.write(changed, self.at + same as u64)?;
                // Before the first guest byte: else a delta might not notice after a power failure.
                self.disk.sync()
            }
            _ => Ok(()),
        }
    }
}
