//! Passphrases on their way to guestfish: through a named pipe that is its standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;

use rustix::fs::OFlags;

use crate::place::Place;
use crate::{Error, Result};

/// Passphrases of one command. On drop those that were not asked for are taken back: the next question would be answered
/// with them.
pub(crate) struct Keys(Option<File>);

impl Keys {
    /// Lays `lines` out for guestfish to read.
    pub(crate) fn offer(place: &Place, lines: &[u8]) -> Result<Self> {
        if lines.is_empty() {
            return Ok(Self(None));
        }
        let pass = || -> io::Result<File> {
            let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
            let mut pipe =
                OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(place.keys())?;
            pipe.write_all(lines)?;
            Ok(pipe)
        };
        pass().map(|pipe| Self(Some(pipe))).map_err(|e| Error::io("cannot pass a passphrase to guestfish", e))
    }
}

impl Drop for Keys {
    fn drop(&mut self) {
        if let Some(pipe) = &mut self.0 {
            let mut buffer = [0; 4096];
            while pipe.read(&mut buffer).is_ok_and(|len| len > 0) {}
        }
    }
}
