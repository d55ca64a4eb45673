//! VMDK: opening and mapping descriptors with their extents.

mod flat;
mod grains;
mod layout;
mod open;
mod options;
mod pipe;
mod sparse;
mod stream;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use diskmill_format::vmdk::Descriptor;
use diskmill_io::SharedStorage;

use crate::error::{Error, Result};
use crate::layout::FileId;

pub(crate) use grains::{GrainMap, Growable};
pub(crate) use layout::{Part, PartSource, VmdkLayout};
pub(crate) use open::{Parent, open};
pub use options::{Subformat, VmdkOptions};
pub use pipe::VmdkStream;
pub(crate) use stream::StreamAssembler;

pub use diskmill_format::vmdk::AdapterType;

/// Facts that only VMDKs have.
#[derive(Debug, Clone)]
pub struct VmdkInfo {
    /// The descriptor; an extent that was opened by itself has none.
    pub descriptor: Option<Descriptor>,
    /// The extents in guest order.
    pub extents: Vec<VmdkExtent>,
}

/// One extent of a VMDK.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmdkExtent {
    /// Its type as the descriptor names it: `SPARSE`, `FLAT`, `ZERO`, ….
    pub kind: String,
    /// Its file; `None` where it has none, or none is opened.
    pub path: Option<PathBuf>,
    /// Guest bytes.
    pub size: u64,
    /// Bytes of a grain, if it has grains.
    pub grain_size: Option<u64>,
    /// Its grains are compressed.
    pub compressed: bool,
}

/// A file that was opened for an image.
#[derive(Debug, Clone)]
pub(crate) struct ExtentFile {
    pub(crate) storage: SharedStorage,
    pub(crate) id: FileId,
    pub(crate) path: PathBuf,
    /// Bytes in it.
    pub(crate) len: u64,
}

impl ExtentFile {
    pub(crate) fn new(storage: SharedStorage, id: FileId, path: &Path) -> Result<Self> {
        let len = storage.len().map_err(|error| Error::io("cannot tell the size", error).of(path))?;
        Ok(Self { storage, id, path: path.to_owned(), len })
    }
}

/// The path that the VMDK at `image` means by `name`: relative names start at its own directory.
fn beside(name: &[u8], image: &Path, what: &str) -> Result<PathBuf> {
    if name.is_empty() || name.contains(&0) {
        return Err(Error::corrupt(what, None, "its name is empty or contains a zero byte"));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(OsStr::from_bytes(name)))
}
