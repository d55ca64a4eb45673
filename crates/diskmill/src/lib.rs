//! Reads, writes and converts disk images: qcow2, raw, VMDK.
//!
//! Formats map, one engine moves: a format ([`Layout`]) only answers where guest bytes come from, and everything
//! that touches bytes is in [`mod@convert`].
//!
//! # Create, write, read
//!
//! Guest writes and changes of an image itself are in [`mod@edit`].
//!
//! ```
//! use diskmill::convert::TargetFormat;
//! use diskmill::create::{CreateOptions, create};
//! use diskmill::{Image, OpenOptions};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! # let dir = tempfile::tempdir().expect("a folder");
//! # let path = dir.path().join("disk.qcow2");
//! let format = TargetFormat::named("qcow2")?;
//! create(&path, &CreateOptions { format, size: 1 << 30, trust_backing: false })?;
//!
//! let image = Image::open(&path, &OpenOptions { writable: true, ..OpenOptions::default() })?;
//! image.write_at(b"hello", 4096)?;
//! image.flush()?;
//! let mut bytes = [0; 5];
//! image.read_at(&mut bytes, 4096)?;
//! assert_eq!(&bytes, b"hello");
//! // Dropping it does the same, but cannot report errors.
//! image.close()
//! # }
//! ```
//!
//! # Map
//!
//! ```
//! use diskmill::{Image, OpenOptions, Source};
//! # use diskmill::convert::TargetFormat;
//! # use diskmill::create::{CreateOptions, create};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! # let dir = tempfile::tempdir().expect("a folder");
//! # let path = dir.path().join("disk.qcow2");
//! # let format = TargetFormat::named("qcow2")?;
//! # create(&path, &CreateOptions { format, size: 1 << 30, trust_backing: false })?;
//! # let image = Image::open(&path, &OpenOptions { writable: true, ..OpenOptions::default() })?;
//! # image.write_at(b"hello", 4096)?;
//! # image.close()?;
//! let image = Image::open(&path, &OpenOptions::default())?;
//! let mut data = 0;
//! for extent in image.extents(0..image.size()) {
//!     let extent = extent?;
//!     if extent.source != Source::Zero {
//!         data += extent.guest.end - extent.guest.start;
//!     }
//! }
//! assert_eq!(data, 65_536, "one cluster");
//! # Ok(())
//! # }
//! ```
//!
//! # Convert, with progress
//!
//! ```
//! use std::time::Duration;
//!
//! use diskmill::convert::{ConvertOptions, Monitor, TargetFormat, convert};
//! use diskmill::{Image, OpenOptions};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! # let dir = tempfile::tempdir().expect("a folder");
//! # let (path, target) = (dir.path().join("disk.raw"), dir.path().join("disk.qcow2"));
//! # std::fs::write(&path, vec![7; 3 << 20]).expect("a disk");
//! let source = [Image::open(&path, &OpenOptions::default())?];
//! let options = ConvertOptions { format: TargetFormat::named("qcow2")?, ..ConvertOptions::default() };
//! let monitor = Monitor::new();
//! let done = std::thread::scope(|scope| {
//!     let converting = scope.spawn(|| convert(&source, target.clone().into(), &options, &monitor));
//!     while !converting.is_finished() {
//!         println!("{} of {} bytes", monitor.done(), monitor.total());
//!         // `monitor.cancel()` would end it.
//!         std::thread::sleep(Duration::from_millis(10));
//!     }
//!     converting.join().expect("it does not panic")
//! })?;
//! assert_eq!(done.virtual_size, 3 << 20);
//! assert_eq!(monitor.done(), monitor.total());
//! # Ok(())
//! # }
//! ```
//!
//! # Which files an image may name
//!
//! An image from a stranger may name `/etc/shadow` as its backing file. So no file is opened that the image names,
//! unless the [`OpenPolicy`] allows it.
//!
//! ```
//! use diskmill::{Allow, Image, Kind, OpenOptions, OpenPolicy};
//! # use diskmill::convert::TargetFormat;
//! # use diskmill::create::{CreateOptions, create};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! # let dir = tempfile::tempdir().expect("a folder");
//! # let (base, path) = (dir.path().join("base.raw"), dir.path().join("disk.qcow2"));
//! # std::fs::write(&base, vec![7; 1 << 20]).expect("a disk");
//! # let mut format = TargetFormat::named("qcow2")?;
//! # format.set("backing_file", "base.raw")?;
//! # format.set("backing_fmt", "raw")?;
//! # create(&path, &CreateOptions { format, size: 1 << 20, trust_backing: false })?;
//! // The image names base.raw as its backing file.
//! let error = Image::open(&path, &OpenOptions::default()).err().expect("the default denies");
//! assert_eq!(error.kind(), Kind::Denied);
//!
//! let policy = OpenPolicy { allow: Allow::OwnTree, ..OpenPolicy::default() };
//! let image = Image::open(&path, &OpenOptions { policy, ..OpenOptions::default() })?;
//! assert_eq!(image.chain().len(), 2);
//! # Ok(())
//! # }
//! ```
//!
//! # Limits
//!
//! What an image says about its own size is checked against [`Limits`] before memory is taken.
//!
//! ```
//! use diskmill::{Image, Kind, Limits, OpenOptions};
//! # use diskmill::convert::TargetFormat;
//! # use diskmill::create::{CreateOptions, create};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! # let dir = tempfile::tempdir().expect("a folder");
//! # let path = dir.path().join("disk.qcow2");
//! # let format = TargetFormat::named("qcow2")?;
//! # create(&path, &CreateOptions { format, size: 1 << 40, trust_backing: false })?;
//! // A disk of 1 TiB with clusters of 64 KiB needs an L1 table of 16 KiB.
//! let mut limits = Limits::default();
//! limits.qcow2_l1_bytes = 4096;
//! let error = Image::open(&path, &OpenOptions { limits, ..OpenOptions::default() }).err().expect("too large");
//! assert_eq!(error.kind(), Kind::Limit);
//! # Ok(())
//! # }
//! ```
//!
//! # Images that are not files
//!
//! ```
//! use std::sync::Arc;
//!
//! use diskmill::{Image, MemoryStorage, OpenOptions};
//!
//! # fn main() -> Result<(), diskmill::Error> {
//! let storage = Arc::new(MemoryStorage::with_bytes(vec![1; 1024], 1 << 20));
//! let image = Image::from_storage(storage, "memory", &OpenOptions::default())?;
//! assert_eq!(image.size(), 1024);
//! # Ok(())
//! # }
//! ```
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
mod parallel;
mod policy;
mod probe;
pub mod qcow2;
mod raw;
mod reader;
mod reserve;
mod size;
mod tables;
pub mod vmdk;

pub use custody::Custody;
pub use diskmill_codec::engines as codec_engines;
pub use diskmill_crypt::{self as crypt, Secret};
pub use diskmill_format::{GuestOffset, HostOffset, Limits};
pub use diskmill_io::{
    Allocation, EngineChoice, EnginePlan, FileStorage, MemoryStorage, OpenHow, PipeReader, PipeWriter,
    SharedStorage, Storage, inherit_nothing, is_ignored, reflinks_in, unlink_all_pending,
};
pub use error::{Error, Kind, escaped, without_os_codes};
pub use image::{Image, ImageFile, OpenOptions, SnapshotRef};
pub use layout::{Extent, FileId, FormatInfo, ImageInfo, LayerExtent, LayerSource, Layout, MapError, Source};
pub use policy::{Allow, OpenPolicy};
pub use probe::Format;
pub use reader::Reader;
pub use size::parse_size;

/// The version of this library.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
