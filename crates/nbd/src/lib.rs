//! An NBD server: the disk of any image that the library reads, for any NBD client.
//!
//! ```no_run
//! use diskmill::{Image, OpenOptions};
//! use diskmill_nbd::{Address, ImageExport, Settings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let image = Image::open("disk.vmdk", &OpenOptions::default())?;
//! let server =
//!     diskmill_nbd::serve(ImageExport::new(image), &Address::Unix("/run/disk.sock".into()), Settings::default())?;
//! println!("{}", server.uri()); // nbd+unix:///?socket=/run/disk.sock
//! // Clients are served until `server` is dropped; then the socket is gone, too.
//! # Ok(())
//! # }
//! ```
//!
//! * [`Server`] listens and gives each client its threads; [`serve`] does so in the background of the caller.
//! * [`Export`] is what it serves: [`ImageExport`] for an image of the library.
//! * The protocol is that of <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md> (called *the
//!   specification* below): fixed newstyle negotiation, structured replies, `base:allocation`, multi-conn. Without TLS,
//!   so TCP is for loopback and trusted networks.
//!
//! A client is hostile until it proves otherwise: negotiation has a deadline, every length has a limit ([`MAX_REQUEST`],
//! options, names), and memory per connection is bounded by threads × 1 MiB and one request of the largest size.
#![forbid(unsafe_code)]

mod cache;
mod export;
mod image;
mod listener;
mod negotiate;
mod protocol;
mod server;
mod stream;
mod transmit;

pub use export::{ErrorCode, Export, Failure, Run, Session};
pub use image::ImageExport;
pub use listener::Address;
pub use protocol::{MAX_NAME, MAX_REQUEST};
pub use server::{Running, Server, Settings, Stopper, converse, serve};
