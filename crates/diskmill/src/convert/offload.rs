//! Plain data that is not read: blocks shared with the source, or copied inside the kernel.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use diskmill_codec::fingerprint;
use diskmill_io::{Allocation, Buf, SharedStorage, Storage};

use super::{ConvertOptions, Monitor, Reflink};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::FileId;

/// Shorter runs are read and written: that takes no longer than asking the kernel.
pub(super) const SHORTEST: u64 = 64 << 10;
/// Most guest bytes that are moved at once, so that progress is seen and a cancelled conversion ends soon.
pub(super) const LONGEST: u64 = 64 << 20;
/// Bytes that are copied at once where the kernel does not do it after all.
const STEP: usize = 1 << 20;

/// How the bytes of a source file get into the output without being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// Blocks of this size are shared.
    Clone { block: u64 },
    /// The kernel copies.
    Copy,
}

/// A source file whose bytes need not be read.
#[derive(Debug, Clone)]
pub(super) struct OffloadFile {
    pub(super) storage: SharedStorage,
    pub(super) way: Way,
    /// When it was last changed: stands for its content, which nobody looks at.
    changed: (i64, i64),
    /// A clone that fails ends the conversion.
    must_clone: bool,
}

/// A run of a source file that is moved without being read.
#[derive(Debug, Clone)]
pub(super) struct FileRun {
    pub(super) from: OffloadFile,
    /// Host offset of the first byte.
    pub(super) at: u64,
}

/// The source files whose bytes need not be read, by image and file.
#[derive(Debug, Default)]
pub(super) struct Offload(Vec<Vec<Option<OffloadFile>>>);

impl Offload {
    /// Tries for each source file what can be done between it and `target`, a fresh file that is left as it was.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::Kind::Unsupported) if no blocks can be shared and [`Reflink::Always`] asks for it.
    pub(super) fn probe(sources: &[Image], target: &SharedStorage, options: &ConvertOptions) -> Result<Self> {
        let mut found = Vec::with_capacity(sources.len());
        let mut refused = None;
        for image in sources {
            let mut ways = Vec::with_capacity(image.files().len());
            for file in image.files() {
                let mut way = match try_clone(&**target, &*file.storage, options.reflink) {
                    Ok(way) => way,
                    Err(error) => {
                        let error = Error::io("cannot share blocks with the source", error).of(&file.path);
                        refused.get_or_insert(error);
                        None
                    }
                };
                if way.is_none() && options.copy_offload {
                    way = try_copy(&**target, &*file.storage).ok();
                }
                ways.push(way.and_then(|way| {
                    let changed = changed(&*file.storage)?;
                    let must_clone = options.reflink == Reflink::Always;
                    Some(OffloadFile { storage: file.storage.clone(), way, changed, must_clone })
                }));
            }
            found.push(ways);
        }
        match refused {
            Some(error) if options.reflink == Reflink::Always => {
                Err(error.hint("--reflink=auto copies where blocks cannot be shared"))
            }
            _ => Ok(Self(found)),
        }
    }

    pub(super) fn file(&self, image: usize, file: FileId) -> Option<&OffloadFile> {
        self.0.get(image)?.get(file.0 as usize)?.as_ref()
    }
}

impl OffloadFile {
    /// What guest offsets must be multiples of so that the run from host offset `at` on can be moved. `whole_units`: the
    /// output places units; otherwise each byte is placed at its own offset.
    pub(super) fn step(&self, at: u64, unit: u64, whole_units: bool) -> Option<u64> {
        match self.way {
            Way::Copy => Some(unit),
            Way::Clone { block } if !at.is_multiple_of(block) => None,
            Way::Clone { block } if whole_units => unit.is_multiple_of(block).then_some(unit),
            Way::Clone { block } => Some(unit.max(block)),
        }
    }
}

impl FileRun {
    /// Whether its blocks are shared with the source.
    pub(super) const fn is_cloned(&self) -> bool {
        matches!(self.from.way, Way::Clone { .. })
    }

    /// Stands for the fingerprint of the content: what is moved from where, and when the file was last changed.
    pub(super) fn fingerprint(&self, guest: &Range<u64>) -> u64 {
        let (seconds, nanoseconds) = self.from.changed;
        let facts = [self.at, guest.end - guest.start, seconds as u64, nanoseconds as u64];
        let bytes: Vec<u8> = facts.iter().flat_map(|fact| fact.to_le_bytes()).collect();
        fingerprint(guest.start, &bytes, bytes.len())
    }

    /// Brings `len` bytes from `skip` bytes into the run to offset `at` of `target`: shared, copied by the kernel or, if
    /// it will not, read and written.
    pub(super) fn transfer(
        &self,
        target: &dyn Storage,
        at: u64,
        skip: u64,
        len: u64,
        monitor: &Monitor,
    ) -> std::io::Result<()> {
        let (source, from) = (&*self.from.storage, self.at.saturating_add(skip));
        if let Way::Clone { .. } = self.from.way {
            match target.clone_range(at, source, from, len) {
                Ok(()) => {
                    monitor.add_cloned(len);
                    return Ok(());
                }
                Err(error) if self.from.must_clone => return Err(error),
                // Whatever the reason: if it is a lasting one, copying meets it too.
                Err(_) => {}
            }
        }
        copy(target, at, source, from, len, self.from.way == Way::Copy, monitor)
    }
}

/// Copies a run, its holes as holes; `in_kernel` as far as the kernel does it.
fn copy(
    target: &dyn Storage,
    mut at: u64,
    source: &dyn Storage,
    mut from: u64,
    len: u64,
    mut in_kernel: bool,
    monitor: &Monitor,
) -> std::io::Result<()> {
    let end = from.saturating_add(len);
    let mut buf: Option<Buf> = None;
    while from < end {
        let (kind, until) = source.allocation(from)?.ok_or(std::io::ErrorKind::UnexpectedEof)?;
        let part = until.min(end).saturating_sub(from);
        let done = match kind {
            Allocation::Hole => {
                target.write_zeroes(at, part, false)?;
                part
            }
            Allocation::Data if in_kernel => match target.copy_range(at, source, from, part) {
                Ok(0) => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => {
                    monitor.add_copied(done);
                    done
                }
                Err(_) => {
                    in_kernel = false;
                    0
                }
            },
            Allocation::Data => {
                let buf = match &mut buf {
                    Some(buf) => buf,
                    none => none.insert(Buf::new(STEP)?),
                };
                buf.set_len(part.min(STEP as u64) as usize);
                let got = source.read_at(buf, from)?;
                let bytes = buf.get(..got).filter(|bytes| !bytes.is_empty());
                let bytes = bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?;
                monitor.add_read(got as u64);
                target.write_all_at(bytes, at)?;
                monitor.add_written(got as u64);
                got as u64
            }
        };
        from = from.saturating_add(done);
        at = at.saturating_add(done);
    }
    Ok(())
}

/// Shares the first block of `source` with `target`, and takes that back. `None` if there is nothing to share.
fn try_clone(target: &dyn Storage, source: &dyn Storage, reflink: Reflink) -> std::io::Result<Option<Way>> {
    if reflink == Reflink::Never {
        return Ok(None);
    }
    let no_file = || std::io::Error::new(std::io::ErrorKind::Unsupported, "it is no regular file");
    let block = source.block_size().ok_or_else(no_file)?;
    if source.len()? < block {
        return Ok(None);
    }
    undone(target, block, || target.clone_range(0, source, 0, block))?;
    Ok(Some(Way::Clone { block }))
}

/// Copies the first bytes of `source` to `target`, and takes that back.
fn try_copy(target: &dyn Storage, source: &dyn Storage) -> std::io::Result<Way> {
    let len = source.len()?.min(4096);
    undone(target, len, || target.copy_range(0, source, 0, len).map(drop))?;
    Ok(Way::Copy)
}

/// Does something to the first `len` bytes of `target`, a fresh file, and makes it a fresh file again.
fn undone(
    target: &dyn Storage,
    len: u64,
    change: impl FnOnce() -> std::io::Result<()>,
) -> std::io::Result<()> {
    let before = target.len()?;
    change()?;
    target.write_zeroes(0, len, false)?;
    target.set_len(before)
}

/// When the file was last changed: seconds and nanoseconds.
fn changed(storage: &dyn Storage) -> Option<(i64, i64)> {
    let meta = File::from(storage.fd()?.try_clone_to_owned().ok()?).metadata().ok()?;
    Some((meta.mtime(), meta.mtime_nsec()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use diskmill_io::{FaultyStorage, MemoryStorage};

    use super::*;

    const BLOCK: u64 = 4096;

    /// Moves 64 blocks in four steps; the first `clones` clones succeed. Gives what arrived.
    fn moved(clones: usize, must_clone: bool, monitor: &Monitor) -> std::io::Result<Vec<u8>> {
        let bytes: Vec<u8> = (0..64 * BLOCK).map(|at| (at / 512) as u8).collect();
        let source = MemoryStorage::with_bytes(bytes, 1 << 20);
        let target = Arc::new(MemoryStorage::with_bytes(vec![0xee; 70 * BLOCK as usize], 1 << 20));
        let faulty = FaultyStorage::new(target.clone());
        faulty.allow_clones(clones);
        faulty.shorten(700);
        let from = OffloadFile {
            storage: Arc::new(source),
            way: Way::Clone { block: BLOCK },
            changed: (0, 0),
            must_clone,
        };
        let run = FileRun { from, at: BLOCK };
        for step in 0..4 {
            let skip = step * 15 * BLOCK;
            run.transfer(&faulty, 3 * BLOCK + skip, skip, 15 * BLOCK, monitor)?;
        }
        Ok(target.to_vec())
    }

    #[test]
    fn what_cannot_be_cloned_after_all_is_copied() {
        let want: Vec<u8> = (BLOCK..61 * BLOCK).map(|at| (at / 512) as u8).collect();
        for clones in 0..=4 {
            let monitor = Monitor::new();
            let got = moved(clones, false, &monitor).unwrap();
            let (before, rest) = got.split_at(3 * BLOCK as usize);
            let (run, after) = rest.split_at(want.len());
            assert!(run == want, "{clones}");
            assert!(before.iter().chain(after).all(|&byte| byte == 0xee), "{clones}");
            let cloned = clones as u64 * 15 * BLOCK;
            assert_eq!((monitor.bytes_cloned(), monitor.bytes_written()), (cloned, 60 * BLOCK - cloned));
        }
        let error = moved(2, true, &Monitor::new()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
    }

    #[test]
    fn only_what_fits_the_blocks_is_cloned() {
        let storage: SharedStorage = Arc::new(MemoryStorage::with_bytes(Vec::new(), 0));
        let file = |way| OffloadFile { storage: storage.clone(), way, changed: (0, 0), must_clone: false };
        let clone = file(Way::Clone { block: BLOCK });
        assert_eq!(clone.step(BLOCK, 65_536, true), Some(65_536));
        assert_eq!(clone.step(BLOCK, 512, true), None, "clusters would lie inside blocks");
        assert_eq!(clone.step(BLOCK, 512, false), Some(BLOCK));
        assert_eq!(clone.step(512, 65_536, true), None);
        assert_eq!(file(Way::Copy).step(7, 512, true), Some(512));
    }
}
