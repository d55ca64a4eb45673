//! The CID, which tells a delta whether its parent has changed.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use diskmill_format::Limits;
use diskmill_format::vmdk::SparseHeader;
use diskmill_format::vmdk::descriptor::{Descriptor, replace_value};
use diskmill_io::SharedStorage;

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
        // Random, as far as it matters: seeded anew for each value by the standard library.
        let cid = RandomState::new().build_hasher().finish() as u32 % RESERVED;
        // Before the first guest byte: else a delta might not notice after a power failure.
        self.set("CID", cid)
    }

    /// The text, up to the first NUL.
    fn text(&self) -> Result<Vec<u8>> {
        let mut text = vec![0; self.room.min(self.disk.len().saturating_sub(self.at)) as usize];
        let got = read_full(&**self.disk.storage(), &mut text, self.at)?;
        text.truncate(text.iter().take(got).position(|&byte| byte == 0).unwrap_or(got));
        Ok(text)
    }

    /// Gives the entry `name` this value, durably, if there is such an entry and room for it.
    fn set(&self, name: &str, value: u32) -> Result<()> {
        let text = self.text()?;
        let Some(mut new) = replace_value(&text, name, format!("{value:08x}").as_bytes()) else {
            return Ok(());
        };
        if new.len() < text.len() {
            new.resize(text.len(), b'\n');
        }
        let same = new.iter().zip(&text).take_while(|(new, old)| new == old).count();
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
                self.disk.sync()
            }
            _ => Ok(()),
        }
    }
}

/// Has the delta in `child` belong to its parent as that is now: what was committed to the parent has changed its CID, and
/// the disk that the delta shows is the same.
///
/// # Errors
/// Damage of a descriptor; `Io`.
pub(crate) fn follow_parent(child: &SharedStorage, parent: &SharedStorage, limits: &Limits) -> Result<()> {
    let place =
        |storage: &SharedStorage| DescriptorPlace::find(Arc::new(Disk::new(Arc::clone(storage))?), limits);
    let (Some(child), Some(parent)) = (place(child)?, place(parent)?) else { return Ok(()) };
    match Descriptor::parse(&parent.text()?, limits)?.cid {
        Some(cid) => child.set("parentCID", cid),
        None => Ok(()),
    }
}
