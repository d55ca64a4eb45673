//! A session with guestfish: one appliance, many operations on the file systems inside disk images.
//!
//! guestfish is started once, as a server, and spoken to through its own remote control: a call on a running appliance
//! takes milliseconds, where each libguestfs tool would boot an appliance of its own.
//!
//! ```no_run
//! use diskmill_guestfs::{Command, Disk, Options, Session, WatchdogCommand};
//!
//! # fn main() -> diskmill_guestfs::Result<()> {
//! // The program runs `diskmill_guestfs::keeper_main()` when it is started with this argument.
//! let options = Options::new(WatchdogCommand::this_program(["guestfs-keeper"]))?;
//! let mut session = Session::open(&[Disk::file("disk.qcow2", "qcow2")], options)?;
//! session.call(&Command::new("mount-ro").arg("/dev/sda1").arg("/"))?;
//! session.download("/etc/os-release", &mut std::io::stdout())?;
//! session.close()
//! # }
//! ```
//!
//! The disks are the guest's and untrusted: they are only ever opened by QEMU inside the session, with their format
//! named, and no command of guestfish that works on the host can be sent.
#![forbid(unsafe_code)]

mod building;
mod bzimage;
mod cancel;
mod command;
mod connection;
mod disk;
mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod initrd;
mod keeper;
mod kept;
mod keys;
pub mod kvm;
mod messages;
mod options;
mod parts;
mod place;
mod prepared;
mod process;
mod session;
mod settings;
mod watchdog;
pub mod wire;

pub use building::Builder;
pub use cancel::Cancel;
pub use command::Command;
pub use disk::Disk;
pub use error::{Error, Kind, Result};
pub use keeper::keeper_main;
pub use kept::{Kept, leftovers, sweep};
pub use options::{Event, Listener, Options};
pub use prepared::{Preparation, Prepared};
pub use session::{MAX_OUTPUT, Session};
pub use settings::Settings;
pub use watchdog::WatchdogCommand;
