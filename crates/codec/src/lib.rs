//! Packing and unpacking one unit (a cluster or a grain) of a disk image, and the zero scan.
//!
//! One [`Packer`] and one [`Unpacker`] per thread: each keeps its codecs' contexts between units.
//! Deflate is libdeflate's, zstd the reference implementation's; with the feature `pure-rust` they are zlib-rs's and
//! libzstd-rs-sys's. All are called on whole units, never as streams.
#![deny(unsafe_code)]

#[cfg(not(any(feature = "libdeflate", feature = "pure-rust")))]
compile_error!("diskmill-codec needs one of its features libdeflate (default) and pure-rust");

mod deflate;
mod fingerprint;
mod pack;
mod recode;
mod shrink;
mod unpack;
mod zero;

pub use fingerprint::fingerprint;
pub use pack::{Packer, default_level, level_range};
pub use recode::rewrap;
pub use unpack::Unpacker;
pub use zero::{Run, is_zero, runs};

use std::fmt;

/// The libraries behind the codecs, with their versions: "deflate by libdeflate 1.26, zstd by libzstd 1.5.7".
#[must_use]
pub fn engines() -> String {
    let zstd = if cfg!(feature = "pure-rust") { "libzstd-rs-sys" } else { "libzstd" };
    format!("deflate by {}, zstd by {zstd} {}", deflate::ENGINE, zstd_safe::version_string())
}

/// How a unit is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// Raw deflate (RFC 1951): qcow2's "zlib".
    Deflate,
    /// Deflate in a zlib wrapper (RFC 1950): VMDK's grains.
    Zlib,
    /// Zstandard frames (RFC 8878), one or more, possibly followed by padding.
    Zstd,
}

impl Codec {
    /// The name that image formats use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deflate | Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }

    /// Whether [`rewrap`] makes a payload of the one into one of the other.
    #[must_use]
    pub const fn is_kin_of(self, other: Self) -> bool {
        matches!(
            (self, other),
            (Self::Zstd, Self::Zstd) | (Self::Deflate | Self::Zlib, Self::Deflate | Self::Zlib)
        )
    }
}

/// Why a unit could not be packed or unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// The payload is not what the codec writes.
    Damaged(String),
    /// The payload is fine but unpacks to another number of bytes than the unit has.
    WrongLength {
        /// Bytes that came out.
        got: usize,
        /// Bytes in the unit.
        want: usize,
    },
    /// A level outside [`level_range`].
    Level(i32),
    /// The codec itself failed, for example for want of memory.
    Codec(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(why) => write!(f, "the packed data is damaged ({why})"),
            Self::WrongLength { got, want } => {
                write!(f, "the packed data holds {got} bytes where the unit has {want}")
            }
            Self::Level(level) => write!(f, "{level} is not a level of this codec"),
            Self::Codec(why) => write!(f, "the codec failed ({why})"),
        }
    }
}

impl std::error::Error for Error {}
