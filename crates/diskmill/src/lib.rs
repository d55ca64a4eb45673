//! Reads, writes and converts disk images: qcow2, raw, VMDK.
//!
//! ```no_run
//! use diskmill::{Image, OpenOptions, convert::{self, ConvertOptions, Monitor}};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! let source = Image::open("disk.qcow2", &OpenOptions::default())?;
//! for extent in source.extents(0..source.size()) {
//!     println!("{:?}", extent?);
//! }
//! let done = convert::convert(&[source], "disk.raw".into(), &ConvertOptions::default(), &Monitor::new())?;
//! println!("{} bytes written", done.bytes_written);
//! # Ok(())
//! # }
//! ```
//!
//! Formats map, one engine moves: a format ([`Layout`]) only answers where guest bytes come from, and everything
//! that touches bytes is in [`mod@convert`].
#![forbid(unsafe_code)]

pub mod check;
pub mod compare;
pub mod convert;
pub mod create;
mod custody;
pub mod edit;
mod encrypted;
mod error;
mod image;
mod layout;
pub mod measure;
pub mod ova;
mod policy;
mod probe;
pub mod qcow2;
mod raw;
mod reader;
mod size;
mod tables;
pub mod vmdk;

pub use custody::Custody;
pub use diskmill_codec::engines as codec_engines;
pub use diskmill_crypt::{self as crypt, Secret};
pub use diskmill_format::{GuestOffset, HostOffset, Limits};
pub use diskmill_io::{
    Allocation, EngineChoice, EnginePlan, PipeReader, PipeWriter, inherit_nothing, reflinks_in,
    unlink_all_pending,
};
pub use error::{Error, Kind};
pub use image::{Image, ImageFile, OpenOptions, SnapshotRef};
pub use layout::{Extent, FileId, FormatInfo, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
pub use policy::{Allow, OpenPolicy};
pub use probe::Format;
pub use reader::Reader;
pub use size::parse_size;

/// The version of this library.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
