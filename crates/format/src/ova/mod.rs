//! OVA: a tar of an OVF envelope, disks, and a manifest (DMTF DSP0243, "Open Virtualization
//! Format" 1.1 and 2.1).

pub mod manifest;
pub mod ovf;
mod ovf_write;
pub mod tar;

pub use manifest::{Algorithm, Manifest};
pub use ovf::Ovf;
pub use ovf_write::{OvfBuilder, STREAM_OPTIMIZED};

/// The name of chunk `number` (from 0) of a file with `chunkSize`: `href.000000000` (DSP0243,
/// "References").
#[must_use]
pub fn chunk_name(href: &str, number: u32) -> String {
    format!("{href}.{number:09}")
}
