use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use diskmill_codec::is_zero;
use diskmill_io::{Align, Allocation, SharedStorage, Storage, temporary};
use flate2::read::MultiGzDecoder;

use crate::error::{Error, Kind, Result};

const SPOOL_STEP: usize = 1 << 20;
/// Zeros are looked for in granules of this size.
const HOLE: usize = 64 << 10;

/// A run of an archive's bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part {
    pub(super) at: u64,
    pub(super) len: u64,
}

/// A file inside an archive: some runs of its bytes, one behind the other. Read-only. It has no descriptor, as
/// offsets in it are not offsets in a file.
#[derive(Debug)]
struct MemberStorage {
    archive: SharedStorage,
    /// Each part with the offset at which it starts here.
    parts: Vec<(u64, Part)>,
    len: u64,
}

/// The bytes of `parts` of `archive`, one behind the other.
pub(super) fn concatenated(
    archive: &SharedStorage,
    parts: impl Iterator<Item = Part>,
) -> Result<SharedStorage> {
    let mut len = 0u64;
    let mut placed = Vec::new();
    for part in parts.filter(|part| part.len > 0) {
        placed.push((len, part));
        len = len
            .checked_add(part.len)
            .ok_or_else(|| Error::corrupt("tar", None, "its members are larger than a file can be"))?;
    }
    Ok(Arc::new(MemberStorage { archive: Arc::clone(archive), parts: placed, len }))
}

impl MemberStorage {
    /// The part that holds offset `at`, and the offset in it.
    fn part(&self, at: u64) -> Option<(Part, u64)> {
        let index = self.parts.partition_point(|(start, _)| *start <= at).checked_sub(1)?;
        let (start, part) = *self.parts.get(index)?;
        let within = at - start;
        (within < part.len).then_some((part, within))
    }
}

fn read_only<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "a file inside an archive cannot be written"))
}

impl Storage for MemberStorage {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        let Some((part, within)) = self.part(at) else { return Ok(0) };
        let most = usize::try_from(part.len - within).unwrap_or(usize::MAX).min(buf.len());
        self.archive.read_at(buf.get_mut(..most).unwrap_or_default(), part.at.saturating_add(within))
    }

    fn write_at(&self, _buf: &[u8], _at: u64) -> io::Result<usize> {
        read_only()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len)
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        let Some((part, within)) = self.part(at) else { return Ok(None) };
        let host = part.at.saturating_add(within);
        let found = self.archive.allocation(host)?;
        Ok(found.map(|(kind, end)| (kind, at.saturating_add((end - host).min(part.len - within)))))
    }

    fn write_zeroes(&self, _at: u64, _len: u64, _keep_allocated: bool) -> io::Result<()> {
        read_only()
    }

    fn allocate(&self, _at: u64, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn will_need(&self, at: u64, len: u64) {
        if let Some((part, within)) = self.part(at) {
            self.archive.will_need(part.at.saturating_add(within), len.min(part.len - within));
        }
    }

    fn clone_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<()> {
        read_only()
    }

    fn copy_range(&self, _at: u64, _src: &dyn Storage, _src_at: u64, _len: u64) -> io::Result<u64> {
        read_only()
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        Align { offset: 1, memory: 1 }
    }
}

/// `packed`, a gzip file, unpacked to a temporary file without a name, of at most `limit` bytes: gzip gives no random
/// access.
pub(super) fn spooled(packed: &dyn Storage, name: &str, limit: u64) -> Result<SharedStorage> {
    let failed = |error| Error::io("cannot make a temporary file", error).hint("TMPDIR names its folder");
    let storage = temporary(&std::env::temp_dir()).map_err(failed)?;
    let mut unpacked = MultiGzDecoder::new(Sequential { file: packed, at: 0 });
    let mut buf = Vec::with_capacity(SPOOL_STEP);
    let mut at = 0u64;
    loop {
        buf.clear();
        unpacked
            .by_ref()
            .take(SPOOL_STEP as u64)
            .read_to_end(&mut buf)
            .map_err(|error| Error::corrupt(format!("gzip member {name:?}"), None, error.to_string()))?;
        if buf.is_empty() {
            storage.set_len(at).map_err(failed)?;
            return Ok(Arc::new(storage));
        }
        if at + buf.len() as u64 > limit {
            let message = format!("{name:?} unpacks to more than {limit} bytes");
            return Err(Error::new(Kind::Limit, message).hint("unpack it with gunzip first"));
        }
        // A small file may unpack to zeros without end: they become holes.
        for block in buf.chunks(HOLE) {
            if !is_zero(block) {
                storage.file().write_all_at(block, at).map_err(failed)?;
            }
            at += block.len() as u64;
        }
    }
}

/// A storage, front to back.
pub(super) struct Sequential<'a> {
    pub(super) file: &'a dyn Storage,
    pub(super) at: u64,
}

impl Read for Sequential<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.file.read_at(buf, self.at)?;
        self.at = self.at.saturating_add(got as u64);
        Ok(got)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use diskmill_io::MemoryStorage;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeros_are_spooled_as_holes_within_the_limit() {
        let mut bytes = vec![0; 8 << 20];
        bytes[3 << 20] = 1;
        bytes.push(0);
        let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
        packed.write_all(&bytes).unwrap();
        let packed = MemoryStorage::with_bytes(packed.finish().unwrap(), 0);
        let len = bytes.len() as u64;
        let error = spooled(&packed, "d", len - 1).err().unwrap();
        assert_eq!(error.kind(), Kind::Limit);
        let storage = spooled(&packed, "d", len).unwrap();
        let mut read = Vec::new();
        Sequential { file: &*storage, at: 0 }.read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        let file = std::fs::File::from(storage.fd().unwrap().try_clone_to_owned().unwrap());
        let meta = file.metadata().unwrap();
        assert!(meta.nlink() == 0 && meta.blocks() * 512 < 1 << 20, "{meta:?}");
    }
}
