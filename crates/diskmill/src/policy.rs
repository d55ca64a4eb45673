use std::fs::Metadata;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// What the files of a VMDK's disk are called in messages.
pub(crate) const EXTENT: &str = "extent";

/// Whether an image may name other files (backing file, external data file, extents).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Allow {
    /// It may not. The default of the library.
    #[default]
    Nothing,
    /// It may name files in the directory of the image that the caller opened, in the folders below it (but for `/`),
    /// and in [`OpenPolicy::paths`]. Block devices only by the latter: a guest's own device stands beside the host's.
    OwnTree,
    /// It may name any file as a backing file, parent or external data file, as QEMU's tools allow; the extents of a
    /// VMDK only as under [`Allow::OwnTree`], in the tree of the VMDK that names them.
    Backing,
    /// It may name any file. Only for images whose writer is trusted.
    Anything,
}

/// What a hostile image must not reach.
///
/// Names are checked after symbolic links are resolved, and the file that was opened is checked once more, so a link
/// that is swapped in between does not help.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenPolicy {
    /// Which other files an image may name.
    pub allow: Allow,
    /// More files and devices, or folders with all that is below them, that may be named under [`Allow::OwnTree`].
    pub paths: Vec<PathBuf>,
}

impl OpenPolicy {
    /// The canonical path of `named`, if an image in the tree `root` (canonical) may name it.
    pub(crate) fn check(&self, named: &Path, root: &Path, what: &str) -> Result<PathBuf> {
        if self.allow == Allow::Nothing {
            return Err(denied(named, what, "is not opened: images may not name other files here"));
        }
        let canonical = named
            .canonicalize()
            .map_err(|error| Error::io(format!("cannot open the {what}"), error).of(named))?;
        let meta = canonical
            .metadata()
            .map_err(|error| Error::io(format!("cannot open the {what}"), error).of(named))?;
        self.check_open(&canonical, &meta, root, what)?;
        Ok(canonical)
    }

    /// Checks a file that is open by now, by its real path and its metadata.
    pub(crate) fn check_open(&self, real: &Path, meta: &Metadata, root: &Path, what: &str) -> Result<()> {
        let named =
            || self.paths.iter().any(|path| path.canonicalize().is_ok_and(|path| real.starts_with(path)));
        let device = meta.file_type().is_block_device();
        match self.allow {
            Allow::Anything => Ok(()),
            Allow::Backing if what != EXTENT => Ok(()),
            Allow::OwnTree | Allow::Backing if named() => Ok(()),
            Allow::OwnTree | Allow::Backing if device => Err(denied(real, what, "is a block device")),
            Allow::OwnTree | Allow::Backing if in_tree(real, root) => Ok(()),
            _ => Err(denied(real, what, "lies outside the image's own directory")),
        }
    }
}

fn denied(path: &Path, what: &str, why: &str) -> Error {
    Error::new(Kind::Denied, format!("the {what} {path:?} {why}"))
        .hint("--allow-path DIR allows a folder, --allow-any-path everything")
}

fn in_tree(file: &Path, root: &Path) -> bool {
    // Below `/` is everything.
    if root == Path::new("/") { file.parent() == Some(root) } else { file.starts_with(root) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_is_no_tree() {
        assert!(in_tree(Path::new("/srv/vm/base"), Path::new("/srv")));
        assert!(!in_tree(Path::new("/srv2/base"), Path::new("/srv")));
        assert!(in_tree(Path::new("/base"), Path::new("/")));
        assert!(!in_tree(Path::new("/etc/shadow"), Path::new("/")));
    }

    #[test]
    fn block_devices_are_allowed_by_name_only() {
        let is_device = |path: &PathBuf| path.metadata().is_ok_and(|meta| meta.file_type().is_block_device());
        let Some(device) =
            std::fs::read_dir("/dev").unwrap().flatten().map(|entry| entry.path()).find(is_device)
        else {
            eprintln!("SKIPPED: no block device in /dev");
            return;
        };
        let device = device.canonicalize().unwrap();
        let check = |allow, paths: &[&Path]| {
            let paths = paths.iter().map(|path| path.to_path_buf()).collect();
            OpenPolicy { allow, paths }.check(&device, device.parent().unwrap(), "extent").map(drop)
        };
        assert_eq!(check(Allow::OwnTree, &[]).unwrap_err().kind(), Kind::Denied);
        assert_eq!(check(Allow::Nothing, &[&device]).unwrap_err().kind(), Kind::Denied);
        check(Allow::OwnTree, &[&device]).unwrap();
        check(Allow::OwnTree, &[Path::new("/dev")]).unwrap();
        check(Allow::Anything, &[]).unwrap();
    }
}
