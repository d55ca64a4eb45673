use std::ops::Range;

use diskmill_codec::Codec;
use diskmill_format::qcow2::CryptMethod;
use diskmill_format::{GuestOffset, HostOffset};

use crate::error::Error;
use crate::probe::Format;

/// Index of a file that an image consists of, in [`Image::files`](crate::Image::files).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// Where a run of guest bytes comes from, backing chain resolved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// It reads as zeros.
    Zero,
    /// It stands in a file as it is.
    Raw {
        /// The file.
        file: FileId,
        /// Of the first byte.
        at: HostOffset,
    },
    /// It is part of one packed unit.
    Packed {
        /// The file.
        file: FileId,
        /// Of the payload.
        at: HostOffset,
        /// Bytes from there to where the payload ends at the latest.
        len: u32,
        /// Guest bytes in the unpacked unit.
        unit: u32,
        /// Bytes of the unpacked unit before the run.
        skip: u32,
        /// How it is packed.
        codec: Codec,
    },
}

impl Source {
    /// The same source with the first `bytes` of its run cut off.
    #[must_use]
    pub(crate) fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Zero => Self::Zero,
            // Runs lie within their file and unit, so neither sum can overflow; a wrap would be caught
            // as an end-of-file error.
            Self::Raw { file, at } => Self::Raw { file, at: HostOffset(at.get().saturating_add(bytes)) },
            Self::Packed { file, at, len, unit, skip, codec } => {
                let skip = skip.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
                Self::Packed { file, at, len, unit, skip, codec }
            }
        }
    }
}

/// A run of guest bytes and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extent {
    /// The guest bytes.
    pub guest: Range<u64>,
    /// Where they come from.
    pub source: Source,
    /// The layer that decided: 0 is the image itself, 1 its backing file, and so on.
    pub depth: u16,
    /// Whether that layer allocates the run, rather than nothing in the chain having it.
    pub present: bool,
    /// For runs that read as zeros, the host offset that the layer keeps for them, if any.
    pub zero_host: Option<(FileId, HostOffset)>,
}

/// What one layer says of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerSource {
    /// Nothing: ask the backing file.
    Unallocated,
    /// Nothing, but the cluster around it has its place at this offset (extended L2 entries): ask the backing file.
    Reserved((FileId, HostOffset)),
    /// It reads as zeros. A host offset may be kept for it.
    Zero(Option<(FileId, HostOffset)>),
    /// As in [`Source`].
    Data(Source),
}

/// A run of guest bytes as one layer has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerExtent {
    /// Bytes in the run; never 0.
    pub len: u64,
    /// What it is.
    pub source: LayerSource,
}

impl LayerExtent {
    /// The same run with its first `bytes` cut off, of which it has more.
    #[must_use]
    pub(crate) fn advanced(self, bytes: u64) -> Self {
        let host_after =
            |(file, host): (FileId, HostOffset)| (file, HostOffset(host.get().saturating_add(bytes)));
        let source = match self.source {
            LayerSource::Unallocated => LayerSource::Unallocated,
            LayerSource::Reserved(host) => LayerSource::Reserved(host_after(host)),
            LayerSource::Zero(host) => LayerSource::Zero(host.map(host_after)),
            LayerSource::Data(source) => LayerSource::Data(source.advanced(bytes)),
        };
        Self { len: self.len.saturating_sub(bytes), source }
    }
}

/// A run that cannot be mapped because the image is damaged there.
#[derive(Debug)]
pub struct MapError {
    /// The damage.
    pub error: Error,
    /// Guest bytes from the offset asked for that it makes unreadable; never 0.
    pub len: u64,
}

/// Every readable format: a look-up over cached metadata.
pub trait Layout: Send + Sync {
    /// Facts about the image.
    fn info(&self) -> &ImageInfo;

    /// What is doubtful about the image: [`ImageInfo::warnings`], and what mapping has found since it was opened.
    fn warnings(&self) -> Vec<String> {
        self.info().warnings.clone()
    }

    /// Those of the warnings that are damage, found by mapping, which reading gets around.
    fn bypassed(&self) -> Vec<String> {
        Vec::new()
    }

    /// What the layer has at guest offset `at`, which is below the virtual size: a run of at most `max` bytes
    /// (`max` > 0), as long as is cheap to tell.
    ///
    /// # Errors
    /// [`MapError`] where a table is damaged or cannot be read.
    fn map(&self, at: GuestOffset, max: u64) -> Result<LayerExtent, MapError>;
}

/// Facts about one image file.
#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// The format.
    pub format: Format,
    /// The disk that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes in a cluster or grain, if the format has them.
    pub cluster_size: Option<u64>,
    /// Guest bytes in the largest packed unit, or 0 if nothing can be packed.
    pub packed_unit: u64,
    /// The backing file as the image names it.
    pub backing_name: Option<String>,
    /// The backing file's format as the image names it.
    pub backing_format: Option<String>,
    /// What is doubtful about the image and was read all the same, for people.
    pub warnings: Vec<String>,
    /// What only this format has.
    pub specific: FormatInfo,
}

impl ImageInfo {
    /// Whether the image encrypts its guest data (LUKS or AES).
    pub fn is_encrypted(&self) -> bool {
        matches!(&self.specific, FormatInfo::Qcow2(qcow2) if qcow2.area.header.crypt != CryptMethod::None)
    }
}

/// Facts that only one format has.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum FormatInfo {
    /// None.
    Raw,
    /// Of a qcow2 image.
    Qcow2(Box<crate::qcow2::Qcow2Info>),
    /// Of a VMDK.
    Vmdk(Box<crate::vmdk::VmdkInfo>),
}
