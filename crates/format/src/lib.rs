//! On-disk structures of qcow2 and VMDK: bytes to structs and back.
//!
//! Pure: no files, no threads, no policy. Every parser takes bytes and an upper bound
//! ([`Limits`]) and answers with a struct or a [`FormatError`] that names the structure and
//! the offset at which it is wrong.
#![forbid(unsafe_code)]

mod error;
mod limits;
mod offset;
pub mod ova;
pub mod qcow2;
pub mod vmdk;

pub use error::{FormatError, Problem};
pub use limits::Limits;
pub use offset::{GuestOffset, HostOffset};
