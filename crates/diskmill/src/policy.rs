use std::path::{Path, PathBuf};

use crate::error::{Error, Kind, Result};

/// Whether an image may name other files (backing file, external data file, extents).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Allow {
    /// It may not. The default of the library.
    #[default]
    Nothing,
    /// It may name files in the directory of the image that the caller opened, in the folders below it, and in
    /// [`OpenPolicy::paths`].
    OwnTree,
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
    /// More files, or folders with all that is below them, that may be named under [`Allow::OwnTree`].
    pub paths: Vec<PathBuf>,
}

impl OpenPolicy {
    /// The canonical path of `named`, if an image in the tree `root` (canonical) may name it.
    pub(crate) fn check(&self, named: &Path, root: &Path, what: &str) -> Result<PathBuf> {
        let denied = |path: &Path, why: &str| {
            Err(Error::new(Kind::Denied, format!("the {what} {path:?} {why}"))
                .hint("--allow-path DIR allows a folder, --allow-any-path everything"))
        };
        if self.allow == Allow::Nothing {
            return denied(named, "is not opened: images may not name other files here");
        }
        let canonical = named
            .canonicalize()
            .map_err(|error| Error::io(format!("cannot open the {what} {named:?}"), error))?;
        if self.allow == Allow::Anything || self.allows(&canonical, root) {
            return Ok(canonical);
        }
        denied(&canonical, "lies outside the image's own directory")
    }

    fn allows(&self, canonical: &Path, root: &Path) -> bool {
        canonical.starts_with(root)
            || self.paths.iter().any(|path| path.canonicalize().is_ok_and(|path| canonical.starts_with(path)))
    }
}
