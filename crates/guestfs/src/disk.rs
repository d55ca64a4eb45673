use std::path::{Path, PathBuf};

use crate::{Command, Error, Result};

/// A disk for the appliance.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Disk {
    source: Source,
    format: String,
    writable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Source {
    File(PathBuf),
    Nbd { socket: PathBuf, export: String },
}

impl Disk {
    /// The image at `path`, read-only: what the guest writes goes into an overlay that ends with the session. The format,
    /// in QEMU's words (`raw`, `qcow2`), is always named, so that nothing is probed.
    pub fn file(path: impl Into<PathBuf>, format: impl Into<String>) -> Self {
        Self { source: Source::File(path.into()), format: format.into(), writable: false }
    }

    /// What an NBD server offers on a Unix socket, as a raw disk, read-only. The default export has the empty name.
    pub fn nbd(socket: impl Into<PathBuf>, export: impl Into<String>) -> Self {
        let source = Source::Nbd { socket: socket.into(), export: export.into() };
        Self { source, format: "raw".to_owned(), writable: false }
    }

    /// The same disk, to be written. QEMU holds the image's write lock while the session lasts.
    #[must_use]
    pub fn writable(mut self) -> Self {
        self.writable = true;
        self
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The image's file, unless it comes from a server.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.source {
            Source::File(path) => Some(path),
            Source::Nbd { .. } => None,
        }
    }

    /// The socket and the export of the NBD server that it comes from, if it does.
    #[must_use]
    pub fn served(&self) -> Option<(&Path, &str)> {
        match &self.source {
            Source::File(_) => None,
            Source::Nbd { socket, export } => Some((socket, export)),
        }
    }

    /// The format, in QEMU's words.
    #[must_use]
    pub fn format(&self) -> &str {
        &self.format
    }

    /// The command that adds it to an appliance.
    pub(crate) fn add(&self) -> Result<Command> {
        let command = match &self.source {
            // guestfish reads `file:///…` and the like as addresses, but only from its command line.
            Source::File(path) => {
                let path = std::path::absolute(path)
                    .map_err(|e| Error::io(format!("cannot name {} in full", path.display()), e))?;
                Command::new("add-drive").path(path)
            }
            Source::Nbd { socket, export } => {
                let mut server = b"unix:".to_vec();
                server.extend_from_slice(std::os::unix::ffi::OsStrExt::as_bytes(socket.as_os_str()));
                Command::new("add-drive").arg(export).opt("protocol", "nbd").opt("server", server)
            }
        };
        let command = command.opt("format", &self.format);
        Ok(match self.writable {
            // What the guest discards goes back to the host where that is possible.
            true => command.opt("readonly", "false").opt("discard", "besteffort"),
            false => command.opt("readonly", "true"),
        })
    }
}
