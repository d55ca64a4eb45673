//! Unpacks a guest's tree, as GNU tar in the appliance packs it, into a folder of the host.
//!
//! The guest chose every name, link and mode in the archive. So each part of a path is opened for itself without
//! following links, below a descriptor of the target folder; names with `..` are errors; device nodes, FIFOs and sockets
//! are left out; set-user-ID and the like, and owners, are taken over only when asked for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown, futimens, linkat,
    mkdirat, open, openat, symlinkat, unlinkat, utimensat,
};
use tar::{Archive, Entry, EntryType};

use super::copied::Copied;
use super::name::{parts, shown};

/// Longest path or link target that is taken, in bytes: Linux's `PATH_MAX` and some.
const MAX_PATH: u64 = 64 << 10;
/// Deepest folder that is made. Each level costs a descriptor while the path is walked, never more than two at once.
const MAX_DEPTH: usize = 1024;

/// What to take over.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Keep {
    /// Owners by number, and set-user-ID, set-group-ID and sticky bits. Needs root.
    pub(crate) owners: bool,
    /// Replace files that exist, and go into folders that exist.
    pub(crate) existing: bool,
}

/// Unpacks `archive` below the folder `target`, which exists.
///
/// # Errors
/// A name that leads out of the folder, a kind of member that tar-out never writes, what the system says, and a name that
/// exists already unless `keep` says otherwise. What was unpacked before stays.
pub(crate) fn unpack(archive: impl Read, target: &Path, keep: Keep) -> io::Result<Copied> {
    let root = open(target, FOLDER, Mode::empty())?;
    let mut unpacker = Unpacker { root, keep, last: None, folders: Vec::new(), done: Copied::default() };
    let mut archive = Archive::new(archive);
    let (mut long_name, mut long_link) = (None, None);
    // Raw: long names are members of their own then, and their length can be limited.
    for entry in archive.entries()?.raw(true) {
        let mut entry = entry?;
        match entry.header().entry_type() {
            EntryType::GNULongName => long_name = Some(long(&mut entry)?),
            EntryType::GNULongLink => long_link = Some(long(&mut entry)?),
            kind => {
                let name = long_name.take().unwrap_or_else(|| entry.path_bytes().into_owned());
                let link = long_link.take().or_else(|| entry.link_name_bytes().map(Into::into));
                unpacker
                    .member(kind, &name, &link.unwrap_or_default(), &mut entry)
                    .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", shown(&name))))?;
            }
        }
    }
    unpacker.finish()
}

/// A long name, with the NUL that ends it.
fn long(entry: &mut Entry<'_, impl Read>) -> io::Result<Vec<u8>> {
    if entry.size() > MAX_PATH {
        return Err(io::Error::other(format!("a name of {} bytes in the archive", entry.size())));
    }
    let mut name = Vec::new();
    entry.read_to_end(&mut name)?;
    if name.last() == Some(&0) {
        name.pop();
    }
    Ok(name)
}

const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

struct Unpacker {
    root: OwnedFd,
    keep: Keep,
    /// The folder of the last member.
    last: Option<(Vec<u8>, OwnedFd)>,
    /// Folders and what they get at the end, when nothing needs to be written into them any more.
    folders: Vec<(Vec<u8>, Attributes)>,
    done: Copied,
}

#[derive(Debug, Clone)]
struct Attributes {
    mode: Mode,
    owner: Option<(Uid, Gid)>,
    times: Timestamps,
}

impl Unpacker {
    fn member(
        &mut self,
        kind: EntryType,
        name: &[u8],
        link: &[u8],
        entry: &mut Entry<'_, impl Read>,
    ) -> io::Result<()> {
        let attributes = self.attributes(entry)?;
        let Some((folder, base)) = split(name)? else {
            // The tree's own root.
            self.folders.push((Vec::new(), attributes));
            return Ok(());
        };
        let existing = self.keep.existing;
        let parent = self.folder(&folder)?;
        let base = OsStr::from_bytes(base);
        let unlink = |flags| match unlinkat(parent, base, flags) {
            Err(error) if error != rustix::io::Errno::NOENT => Err(error),
            _ => Ok(()),
        };
        match kind {
            EntryType::Directory => {
                match mkdirat(parent, base, Mode::RWXU) {
                    Err(rustix::io::Errno::EXIST) if existing => {
                        drop(openat(parent, base, FOLDER, Mode::empty())?)
                    }
                    made => made?,
                }
                self.done.folders += 1;
                self.folders.push((name.to_vec(), attributes));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                if existing {
                    unlink(AtFlags::empty())?;
                }
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut file = File::from(openat(parent, base, flags, Mode::RUSR | Mode::WUSR)?);
                let size = entry.size();
                let copied = io::copy(entry, &mut file)?;
                if copied != size {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the archive ends in this file",
                    ));
                }
                if let Some((uid, gid)) = attributes.owner {
                    fchown(&file, Some(uid), Some(gid))?;
                }
                fchmod(&file, attributes.mode)?;
                futimens(&file, &attributes.times)?;
                self.done.files += 1;
                self.done.bytes = self.done.bytes.saturating_add(copied);
            }
            EntryType::Symlink => {
                if existing {
                    unlink(AtFlags::empty())?;
                }
                symlinkat(OsStr::from_bytes(link), parent, base)?;
                if let Some((uid, gid)) = attributes.owner {
                    chownat(parent, base, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
                }
                utimensat(parent, base, &attributes.times, AtFlags::SYMLINK_NOFOLLOW)?;
                self.done.links += 1;
            }
            EntryType::Link => {
                if existing {
                    unlink(AtFlags::empty())?;
                }
                let parent = parent.try_clone()?;
                let (folder, old) = split(link)?.ok_or(io::ErrorKind::InvalidInput)?;
                let from = self.folder(&folder)?;
                // Without AT_SYMLINK_FOLLOW: a link to a symbolic link, not to what it names.
                linkat(from, OsStr::from_bytes(old), &parent, base, AtFlags::empty())?;
                self.done.links += 1;
            }
            EntryType::Block | EntryType::Char | EntryType::Fifo => self.done.left_out += 1,
            other => {
                let kind = char::from(other.as_byte()).escape_default();
                return Err(io::Error::other(format!(
                    "an unexpected kind of member in the archive: '{kind}'"
                )));
            }
        }
        Ok(())
    }

    fn attributes(&self, entry: &Entry<'_, impl Read>) -> io::Result<Attributes> {
        let header = entry.header();
        let id =
            |id: u64| u32::try_from(id).map_err(|_| io::Error::other("an owner's number beyond 32 bits"));
        let owner = match self.keep.owners {
            true => Some((Uid::from_raw(id(header.uid()?)?), Gid::from_raw(id(header.gid()?)?))),
            false => None,
        };
        let bits = if self.keep.owners { 0o7777 } else { 0o777 };
        // Of a time before 1970 the crate gives the bits of the signed number.
        let time = Timespec { tv_sec: header.mtime()?.cast_signed(), tv_nsec: 0 };
        Ok(Attributes {
            mode: Mode::from_raw_mode(header.mode()? & bits),
            owner,
            times: Timestamps { last_access: time, last_modification: time },
        })
    }

    /// The folder of this path below the target, made where it is missing.
    fn folder(&mut self, path: &[&[u8]]) -> io::Result<&OwnedFd> {
        if path.is_empty() {
            return Ok(&self.root);
        }
        let key = path.join(&b'/');
        if self.last.as_ref().is_none_or(|(last, _)| *last != key) {
            let mut fd = self.root.try_clone()?;
            for part in path {
                let part = OsStr::from_bytes(part);
                match mkdirat(&fd, part, Mode::RWXU) {
                    Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                fd = openat(&fd, part, FOLDER, Mode::empty())?;
            }
            self.last = Some((key, fd));
        }
        Ok(self.last.as_ref().map_or(&self.root, |(_, fd)| fd))
    }

    /// Gives the folders their modes, owners and times, the deepest first, so that none is shut before it is done.
    fn finish(mut self) -> io::Result<Copied> {
        for (name, attributes) in std::mem::take(&mut self.folders).into_iter().rev() {
            let fd = match split(&name)? {
                None => self.root.try_clone()?,
                Some((folder, base)) => {
                    openat(self.folder(&folder)?.as_fd(), OsStr::from_bytes(base), FOLDER, Mode::empty())?
                }
            };
            if let Some((uid, gid)) = attributes.owner {
                fchown(&fd, Some(uid), Some(gid))?;
            }
            fchmod(&fd, attributes.mode)?;
            futimens(&fd, &attributes.times)?;
        }
        Ok(self.done)
    }
}

/// A member's folder, part by part, and its own name.
type Place<'n> = (Vec<&'n [u8]>, &'n [u8]);

/// Where a member belongs; `None` for the root of the tree.
fn split(name: &[u8]) -> io::Result<Option<Place<'_>>> {
    let mut path: Vec<&[u8]> = parts(name).collect();
    if path.contains(&&b".."[..]) {
        return Err(io::Error::other("a name with `..` would lead out of the folder"));
    }
    if path.len() > MAX_DEPTH {
        return Err(io::Error::other(format!("more than {MAX_DEPTH} folders deep")));
    }
    Ok(path.pop().map(|base| (path, base)))
}
