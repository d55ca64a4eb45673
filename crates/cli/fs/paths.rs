//! Where paths of the guest lead.
//!
//! libguestfs' tar-in, tar-out, find0, rm-rf, mv, cp and mount look at the guest's files from outside: an absolute link on
//! the way leads them into the appliance's own root. They get paths without links, as realpath, which looks from inside,
//! finds them.

use diskmill_guestfs::Command;

use super::guest::Guest;
use super::name::{base, join, parent};
use crate::exit::Failure;

impl Guest {
    /// Where `path` leads in the end, without links and `..`.
    pub(crate) fn real_path(&mut self, path: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut real = self.call(Command::new("realpath").arg(path))?;
        if real.last() == Some(&b'\n') {
            real.pop();
        }
        Ok(real)
    }

    /// The same of the folder that `path` is in: what stands there itself may be a link, or missing.
    pub(crate) fn real_name(&mut self, path: &[u8]) -> Result<Vec<u8>, Failure> {
        match base(path) {
            b"" | b".." => self.real_path(path),
            name => Ok(join(&self.real_path(parent(path))?, name)),
        }
    }

    /// The folder to mount on. Where it is not found, mount says so.
    pub(crate) fn mount_point(&mut self, folder: &str) -> Vec<u8> {
        let real = if folder == "/" { None } else { self.real_path(folder.as_bytes()).ok() };
        real.unwrap_or_else(|| folder.as_bytes().to_vec())
    }
}
