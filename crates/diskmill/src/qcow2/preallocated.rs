//! Whether an image was made with preallocated metadata, as QEMU tells it.

use diskmill_format::HostOffset;
use diskmill_io::Storage;

use super::Qcow2Info;
use crate::error::{Error, Result};
use crate::reader::read_full;

/// Most bytes of refcount blocks that are read: enough for 32 TiB of data in an ordinary image.
const MOST: u64 = 1 << 30;

/// Whether clusters that the image counts as allocated have no blocks on its disk: then `qemu-img map` tells holes
/// apart from data. `file` is the image's file, and `allocated` the bytes that it takes (`st_blocks`).
///
/// The rule is QEMU's (`qcow2_detect_metadata_preallocation`): at least 10/9 as many clusters have a refcount as would
/// fit into the blocks, and at least two more. Refcounts are read only until that many are
/// found, and at most 1 GiB of them.
///
/// # Errors
/// [`Kind::Io`](crate::Kind::Io); refcount blocks past the end of the file count as empty.
pub fn is_metadata_preallocated(info: &Qcow2Info, file: &dyn Storage, allocated: u64) -> Result<bool> {
    let header = &info.area.header;
    let (cluster_size, width) = (header.geometry.cluster_size(), header.refcount_width);
    let len = file.len().map_err(|error| Error::io("cannot tell the size", error))?;
    let real = allocated / cluster_size;
    let threshold = real.saturating_mul(10) / 9;
    let threshold = threshold.max(real.saturating_add(2));
    let mut left = len.div_ceil(cluster_size);
    let mut counted = 0u64;
    let mut blocks = MOST / cluster_size;
    // The header's check bounds the table.
    let mut table = vec![0; (u64::from(header.refcount_table_clusters) * cluster_size) as usize];
    let got = read_full(file, &mut table, header.refcount_table_offset.get())?;
    table.truncate(got);
    let mut block = vec![0; cluster_size as usize];
    for entry in table.as_chunks::<8>().0 {
        let offset = HostOffset(u64::from_be_bytes(*entry));
        let entries = width.entries(cluster_size).min(left);
        if offset.get() != 0 {
            blocks -= 1;
            let got = read_full(file, &mut block, offset.get())?;
            let block = block.get(..got).unwrap_or_default();
            let used = |index: &u64| width.get(block, *index as usize).is_some_and(|count| count != 0);
            counted += (0..entries).filter(used).count() as u64;
        }
        left -= entries;
        if counted >= threshold || left == 0 || blocks == 0 {
            break;
        }
    }
    Ok(counted >= threshold)
}
