//! Packs a tree of the host into the archive that tar-in reads in the appliance.

use std::fs::{self, File, Metadata};
use std::io::{self, Read as _, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header};

use super::copied::{Copied, Counted};

/// Who owns what arrives in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The numbers that the host has.
    Kept,
    /// These.
    Ids { user: u32, group: u32 },
}

impl Default for Owner {
    fn default() -> Self {
        Self::Ids { user: 0, group: 0 }
    }
}

impl Owner {
    pub(crate) fn of(self, meta: &Metadata) -> (u32, u32) {
        match self {
            Self::Kept => (meta.uid(), meta.gid()),
            Self::Ids { user, group } => (user, group),
        }
    }
}

/// Writes `source` and all that is below it into `out`, under the name `name`. Links are packed as links; `mode` is for
/// the files, instead of their own.
///
/// # Errors
/// What cannot be read, and a file that becomes shorter meanwhile.
pub(crate) fn pack(
    source: &Path,
    name: &[u8],
    owner: Owner,
    mode: Option<u32>,
    out: impl Write,
) -> io::Result<Copied> {
    let mut builder = Builder::new(out);
    builder.sparse(false);
    let mut done = Copied::default();
    // A stack of what is left, not recursion: the depth of a tree has no limit.
    let mut left: Vec<(PathBuf, Vec<u8>)> = vec![(source.to_owned(), name.to_vec())];
    while let Some((path, name)) = left.pop() {
        let folder = one(&mut builder, &path, &name, (owner, mode), &mut done)
            .map_err(|error| io::Error::new(error.kind(), format!("{path:?}: {error}")))?;
        if folder {
            for entry in fs::read_dir(&path)
                .map_err(|error| io::Error::new(error.kind(), format!("{path:?}: {error}")))?
            {
                let entry = entry?;
                let name = [&name[..], b"/", entry.file_name().as_bytes()].concat();
                left.push((entry.path(), name));
            }
        }
    }
    builder.into_inner()?.flush()?;
    Ok(done)
}

/// Packs what is at `path` itself and tells whether it is a folder.
fn one(
    builder: &mut Builder<impl Write>,
    path: &Path,
    name: &[u8],
    (owner, mode): (Owner, Option<u32>),
    done: &mut Copied,
) -> io::Result<bool> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    let mut header = Header::new_gnu();
    let own_mode = meta.mode() & 0o7777;
    header.set_mode(if kind.is_file() { mode.unwrap_or(own_mode) } else { own_mode });
    let (user, group) = owner.of(&meta);
    header.set_uid(user.into());
    header.set_gid(group.into());
    set_mtime(&mut header, meta.mtime());
    header.set_size(0);
    let name = Path::new(std::ffi::OsStr::from_bytes(name));
    if kind.is_dir() {
        header.set_entry_type(EntryType::Directory);
        builder.append_data(&mut header, name, io::empty())?;
        done.folders += 1;
    } else if kind.is_symlink() {
        header.set_entry_type(EntryType::Symlink);
        builder.append_link(&mut header, name, fs::read_link(path)?)?;
        done.links += 1;
    } else if kind.is_file() {
        let file = open_regular(path)?;
        let size = file.metadata()?.len();
        header.set_entry_type(EntryType::Regular);
        header.set_size(size);
        let mut content = Counted::new(file.take(size));
        builder.append_data(&mut header, name, &mut content)?;
        if content.bytes != size {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "became shorter while it was read"));
        }
        done.files += 1;
        done.bytes = done.bytes.saturating_add(size);
    } else if kind.is_fifo() || kind.is_socket() || kind.is_block_device() || kind.is_char_device() {
        done.left_out += 1;
    } else {
        return Err(io::Error::other("a kind of file that is not known"));
    }
    Ok(kind.is_dir())
}

/// Seconds since 1970. Before that, in base 256 with the sign, as GNU tar writes them.
fn set_mtime(header: &mut Header, seconds: i64) {
    match u64::try_from(seconds) {
        Ok(seconds) => header.set_mtime(seconds),
        Err(_) => {
            let field = &mut header.as_old_mut().mtime;
            field.fill(0xff);
            if let Some(number) = field.last_chunk_mut() {
                *number = seconds.to_be_bytes();
            }
        }
    }
}

/// Opens a regular file, and nothing that took its place since it was looked at: no link, no FIFO to wait for.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let flags = i32::try_from(flags.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::super::extract::{Keep, unpack};
    use super::*;

    #[test]
    fn a_tree_goes_through_an_archive_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        let deep = source.join("n".repeat(120)).join("m".repeat(120));
        fs::create_dir_all(&deep).unwrap();
        fs::write(deep.join("file\n"), [7; 3000]).unwrap();
        fs::set_permissions(deep.join("file\n"), fs::Permissions::from_mode(0o640)).unwrap();
        // 1960, and the earliest time that ext4 has.
        let times = [-315_619_200_i64, i32::MIN.into()];
        for seconds in times {
            let file = File::create(source.join(format!("old{seconds}"))).unwrap();
            let time = std::time::UNIX_EPOCH - std::time::Duration::from_secs(seconds.unsigned_abs());
            file.set_modified(time).unwrap();
        }
        symlink("x".repeat(150), source.join("link")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, source.join("fifo"), rustix::fs::Mode::RWXU).unwrap();

        let mut archive = Vec::new();
        let packed = pack(&source, b"tree", Owner::Ids { user: 3, group: 4 }, None, &mut archive).unwrap();
        assert_eq!(packed, Copied { files: 3, folders: 3, links: 1, bytes: 3000, left_out: 1 });
        for entry in tar::Archive::new(&archive[..]).entries().unwrap() {
            let entry = entry.unwrap();
            assert_eq!((entry.header().uid().unwrap(), entry.header().gid().unwrap()), (3, 4));
        }

        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let unpacked = unpack(&archive[..], &out, Keep::default()).unwrap();
        assert_eq!((unpacked.files, unpacked.folders, unpacked.links, unpacked.bytes), (3, 3, 1, 3000));
        let file = out.join("tree").join("n".repeat(120)).join("m".repeat(120)).join("file\n");
        assert_eq!(fs::read(&file).unwrap(), [7; 3000]);
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o640);
        for seconds in times {
            assert_eq!(fs::metadata(out.join(format!("tree/old{seconds}"))).unwrap().mtime(), seconds);
        }
        assert_eq!(fs::read_link(out.join("tree/link")).unwrap(), Path::new(&"x".repeat(150)));
    }
}
