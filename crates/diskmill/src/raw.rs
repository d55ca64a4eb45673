//! Raw: the guest's bytes as they are. Holes of the file are zeros.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use diskmill_format::{GuestOffset, HostOffset};
use diskmill_io::{Allocation, SharedStorage};

use crate::error::{Error, Result};
use crate::layout::{FileId, FormatInfo, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
use crate::probe::Format;

pub(crate) struct RawLayout {
    info: ImageInfo,
    runs: FileRuns,
}

/// The data and the holes of a file.
pub(crate) struct FileRuns {
    file: SharedStorage,
    file_id: FileId,
    len: Arc<AtomicU64>,
    /// The last answer of the file system: a walk asks for each piece of a hole anew. `None` for a file that changes.
    last: Option<Mutex<(u64, Allocation, u64)>>,
}

impl FileRuns {
    pub(crate) fn new(file: SharedStorage, file_id: FileId) -> Result<Self> {
        let len = file.len().map_err(|error| Error::io("cannot tell the size", error))?;
        let last = Some(Mutex::new((0, Allocation::Data, 0)));
        Ok(Self { file, file_id, len: Arc::new(AtomicU64::new(len)), last })
    }

    /// The runs of a file that is being written to, whose length is kept in `len`.
    pub(crate) const fn changing(file: SharedStorage, file_id: FileId, len: Arc<AtomicU64>) -> Self {
        Self { file, file_id, len, last: None }
    }

    /// Bytes in the file.
    pub(crate) fn len(&self) -> u64 {
        self.len.load(Ordering::Acquire)
    }

    /// What stands at `at`: at most `max` bytes. `None` at and past the end of the file.
    pub(crate) fn map(&self, at: u64, max: u64) -> Result<Option<LayerExtent>, MapError> {
        let Some(left) = self.len().checked_sub(at).filter(|&left| left > 0) else { return Ok(None) };
        let (kind, end) = self
            .allocation(at)
            .map_err(|error| MapError { error: Error::io("cannot look for holes", error), len: max })?;
        let len = (end - at).min(left).min(max);
        let source = match kind {
            Allocation::Data => LayerSource::Data(Source::Raw { file: self.file_id, at: HostOffset(at) }),
            Allocation::Hole => LayerSource::Zero(Some((self.file_id, HostOffset(at)))),
        };
        Ok(Some(LayerExtent { len, source }))
    }

    fn allocation(&self, at: u64) -> std::io::Result<(Allocation, u64)> {
        let ask = || {
            // The file may have shrunk since: what is gone is reported when it is read.
            let len = self.len();
            let (kind, end) = self.file.allocation(at)?.unwrap_or((Allocation::Data, len));
            let least = at.saturating_add(1);
            std::io::Result::Ok((at, kind, end.clamp(least, len.max(least))))
        };
        let Some(last) = &self.last else { return ask().map(|(_, kind, end)| (kind, end)) };
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        if !(last.0..last.2).contains(&at) {
            *last = ask()?;
        }
        Ok((last.1, last.2))
    }
}

fn info(virtual_size: u64) -> ImageInfo {
    ImageInfo {
        format: Format::Raw,
        virtual_size,
        cluster_size: None,
        packed_unit: 0,
        backing_name: None,
        backing_format: None,
        warnings: Vec::new(),
        specific: FormatInfo::Raw,
    }
}

impl RawLayout {
    pub(crate) fn new(file: SharedStorage, file_id: FileId) -> Result<Self> {
        Self::of(FileRuns::new(file, file_id)?)
    }

    pub(crate) fn of(runs: FileRuns) -> Result<Self> {
        // QEMU's disks consist of 512-byte sectors: the last one is filled up with zeros.
        let virtual_size = runs
            .len()
            .checked_next_multiple_of(512)
            .filter(|&size| size <= i64::MAX as u64)
            .ok_or_else(|| Error::invalid("the file is larger than a disk can be"))?;
        Ok(Self { info: info(virtual_size), runs })
    }
}

impl Layout for RawLayout {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        // The rest of the last sector.
        let zeros = LayerSource::Zero(Some((self.runs.file_id, HostOffset(at.get()))));
        let past_end = LayerExtent { len: max, source: zeros };
        Ok(self.runs.map(at.get(), max)?.unwrap_or(past_end))
    }
}

/// A disk that stands in no file: zeros, or nothing at all.
pub(crate) struct ZeroLayout {
    info: ImageInfo,
    allocated: bool,
}

impl ZeroLayout {
    /// Zeros; `allocated`: that count as data of this layer.
    pub(crate) fn new(size: u64, allocated: bool) -> Self {
        Self { info: info(size), allocated }
    }
}

impl Layout for ZeroLayout {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn map(&self, _: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        let source = if self.allocated { LayerSource::Zero(None) } else { LayerSource::Unallocated };
        Ok(LayerExtent { len: max, source })
    }
}
