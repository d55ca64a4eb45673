use std::sync::Arc;

use diskmill_format::GuestOffset;

use super::ExtentFile;
use super::grains::GrainMap;
use crate::error::{Error, Kind};
use crate::layout::{ImageInfo, LayerExtent, LayerSource, Layout, MapError};
use crate::raw::FileRuns;

/// A VMDK: extents, one behind the other.
pub(crate) struct VmdkLayout {
    pub(super) info: ImageInfo,
    /// In guest order and without gaps.
    pub(crate) parts: Vec<Part>,
}

/// An extent in its place.
pub(crate) struct Part {
    /// First guest byte.
    pub(crate) start: u64,
    /// Guest bytes.
    pub(crate) len: u64,
    pub(crate) source: PartSource,
    /// The descriptor forbids to write to it.
    pub(crate) read_only: bool,
}

pub(crate) enum PartSource {
    /// Zeros.
    Zero,
    /// A flat file from byte `offset` on.
    Flat {
        runs: FileRuns,
        offset: u64,
        file: ExtentFile,
    },
    Sparse(Arc<GrainMap>),
    /// Not opened: only the metadata was asked for.
    Closed,
}

impl Part {
    fn map(&self, within: u64, max: u64) -> Result<LayerExtent, MapError> {
        match &self.source {
            PartSource::Zero => Ok(LayerExtent { len: max, source: LayerSource::Zero(None) }),
            PartSource::Closed => {
                Err(MapError { error: Error::invalid("the extents are not open"), len: max })
            }
            PartSource::Sparse(map) => map
                .map(within, max)
                .map_err(|MapError { error, len }| MapError { error: error.of(&map.file().path), len }),
            PartSource::Flat { runs, offset, file, .. } => {
                let at = offset.saturating_add(within);
                let failed = |error: Error| MapError { error: error.of(&file.path), len: max };
                match runs.map(at, max).map_err(|error| failed(error.error))? {
                    Some(extent) => Ok(extent),
                    None => {
                        let message = format!(
                            "it needs the byte at {at:#x} and the file ends at {:#x}: the image is truncated",
                            runs.len()
                        );
                        Err(failed(Error::new(Kind::Corrupt, message).within("flat extent", at)))
                    }
                }
            }
        }
    }
}

impl Layout for VmdkLayout {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn warnings(&self) -> Vec<String> {
        [self.info.warnings.clone(), self.bypassed()].concat()
    }

    fn bypassed(&self) -> Vec<String> {
        let late = self.parts.iter().flat_map(|part| match &part.source {
            PartSource::Sparse(map) => map.late_warnings(),
            _ => Vec::new(),
        });
        late.collect()
    }

    fn map(&self, at: GuestOffset, max: u64) -> Result<LayerExtent, MapError> {
        let at = at.get();
        // Empty extents share their start with the next one, which the search prefers.
        let index = self.parts.partition_point(|part| part.start <= at).saturating_sub(1);
        let Some((part, within)) = self.parts.get(index).map(|part| (part, at - part.start)) else {
            return Err(MapError { error: Error::invalid("a disk without extents"), len: max });
        };
        let Some(left) = part.len.checked_sub(within).filter(|&left| left > 0) else {
            return Err(MapError { error: Error::invalid("an offset past all extents"), len: max });
        };
        part.map(within, max.min(left))
    }
}
