//! Files of the guest that get a new content: beside the old one first, which stays whatever goes wrong.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use diskmill_guestfs::Command;

use super::args::FileType;
use super::content::no_file;
use super::copy::host_failure;
use super::guest::Guest;
use super::meta::Meta;
use super::name::{base, join, parent, shown};
use super::pack::open_regular;
use crate::exit::{Exit, Failure};

/// Gives the file at `path`, behind links, what `input` holds; `finish` sets what else it is to have. A file that is there
/// hands on mode, owner and attributes.
pub(crate) fn replace(
    guest: &mut Guest,
    input: &mut dyn Read,
    path: &[u8],
    finish: impl Fn(&mut Guest, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let stored = match guest.stat_if_there(path)? {
        Some(meta) if !meta.is(FileType::File) => return Err(no_file(path, &meta)),
        Some(meta) => {
            let real = guest.real_path(path)?;
            beside(guest, input, &real, Some(&meta), &finish)
        }
        // A link to what is not there yet: the guest's kernel follows it.
        None if guest.lstat_if_there(path)?.is_some() => {
            let made = guest.upload(input, path).and_then(|()| finish(guest, path));
            if made.is_err()
                && let Ok(real) = guest.real_path(path)
            {
                guest.discard(&real);
            }
            made
        }
        None => {
            let real = guest.real_name(path)?;
            beside(guest, input, &real, None, &finish)
        }
    };
    stored.map_err(|failure| if failure.exit == Exit::Failed { failure.of(&shown(path)) } else { failure })
}

/// The same of a `path` without links, where `old` stands.
fn beside(
    guest: &mut Guest,
    input: &mut dyn Read,
    path: &[u8],
    old: Option<&Meta>,
    finish: &impl Fn(&mut Guest, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let fresh = join(parent(path), format!(".diskmill-{}", std::process::id()).as_bytes());
    let stored = store(guest, input, path, &fresh, old, finish);
    if stored.is_err() {
        guest.discard(&fresh);
    }
    stored
}

fn store(
    guest: &mut Guest,
    input: &mut dyn Read,
    path: &[u8],
    fresh: &[u8],
    old: Option<&Meta>,
    finish: &impl Fn(&mut Guest, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    guest.upload(input, fresh)?;
    if old.is_some_and(|old| old.links > 1) {
        // Its other names stay names of it: written over, and only where that cannot fail for want of room.
        let size = guest.lstat(fresh)?.size;
        if !guest.has_room(fresh, size)? {
            return Err(Failure::failed(
                "No space left on device: a file with several names (hard links) is copied twice",
            ));
        }
        guest.call(Command::new("cp").arg(fresh).arg(path))?;
        guest.call(Command::new("rm-f").arg(fresh))?;
        return finish(guest, path);
    }
    if old.is_some() {
        guest.call(Command::new("copy-attributes").arg(path).arg(fresh).opt("all", "true"))?;
    }
    finish(guest, fresh)?;
    guest.call(Command::new("mv").arg(fresh).arg(path)).map(drop)
}

/// A private file of the host with the guest's content, for tools that work on files. Removed when dropped.
pub(crate) struct LocalCopy {
    folder: tempfile::TempDir,
    name: OsString,
}

impl LocalCopy {
    /// Copies the file at `path` out of the guest.
    pub(crate) fn fetch(guest: &mut Guest, path: &[u8]) -> Result<Self, Failure> {
        let folder = tempfile::Builder::new().prefix("diskmill-").tempdir();
        let folder =
            folder.map_err(|error| Failure::failed(format!("cannot make a temporary folder: {error}")))?;
        // The guest's name may be an option, or drive a terminal.
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._".contains(byte);
        let name: Vec<u8> = base(path).iter().copied().filter(plain).take(200).collect();
        let name = if name.iter().all(|&byte| byte == b'.') { b"file".to_vec() } else { name };
        let copy = Self { folder, name: OsStr::from_bytes(&name).to_owned() };
        let to = copy.path();
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&to);
        let mut file = file.map_err(|error| host_failure(&to, &error))?;
        guest.download(path, &mut file)?;
        Ok(copy)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join(&self.name)
    }

    /// Puts the copy in the place of the guest's file.
    pub(crate) fn store(&self, guest: &mut Guest, path: &[u8]) -> Result<(), Failure> {
        let local = self.path();
        let mut file = open_regular(&local).map_err(|error| host_failure(&local, &error))?;
        replace(guest, &mut file, path, |_, _| Ok(()))
    }
}
