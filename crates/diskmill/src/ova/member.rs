use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use diskmill_io::{Align, Allocation, PendingFile, SharedStorage, Storage};
use flate2::read::MultiGzDecoder;

use crate::error::{Error, Kind, Result};

/// Most bytes that a compressed member may unpack to: it has to be unpacked to a temporary file.
const SPOOL_LIMIT: u64 = 64 << 30;
const SPOOL_STEP: usize = 1 << 20;

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

/// `packed`, a gzip file, unpacked to a temporary file without a name: gzip gives no random access.
pub(super) fn spooled(packed: &dyn Storage, name: &str) -> Result<SharedStorage> {
    let failed = |error| Error::io("cannot make a temporary file", error).hint("TMPDIR names its folder");
    let temporary = PendingFile::create(std::env::temp_dir().join("diskmill-disk")).map_err(failed)?;
    let storage = temporary.storage();
    // The name goes, the open file stays.
    drop(temporary);
    let mut unpacked = MultiGzDecoder::new(Sequential { file: packed, at: 0 });
    let mut buf = vec![0; SPOOL_STEP];
    let mut at = 0u64;
    loop {
        let got = match unpacked.read(&mut buf) {
            Ok(0) => return Ok(storage),
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(Error::corrupt(format!("gzip member {name:?}"), None, error.to_string()));
            }
        };
        if at + got as u64 > SPOOL_LIMIT {
            let message = format!("{name:?} unpacks to more than {SPOOL_LIMIT} bytes");
            return Err(Error::new(Kind::Limit, message).hint("unpack it with gunzip first"));
        }
        let mut rest = buf.get(..got).unwrap_or_default();
        while !rest.is_empty() {
            match storage.write_at(rest, at) {
                Ok(done) if done > 0 => {
                    at += done as u64;
                    rest = rest.get(done..).unwrap_or_default();
                }
                Ok(_) => return Err(failed(io::ErrorKind::WriteZero.into())),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
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
