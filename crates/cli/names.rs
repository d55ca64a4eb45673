//! How names are shown.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

pub(crate) use diskmill::escaped as shown;
use diskmill::{FileId, FormatInfo, Image};

/// What names of images end in whose formats are not written here.
const FOREIGN: [&str; 8] = ["vhdx", "vhd", "vpc", "vdi", "qed", "qcow", "hdd", "dmg"];

/// The ending of a file's name, in small letters, if it tells of an image's format other than raw.
pub(crate) fn telling_ending(file: &Path) -> Option<String> {
    let ending = file.extension()?.to_str()?.to_ascii_lowercase();
    let telling = matches!(ending.as_str(), "qcow2" | "vmdk" | "ova") || is_foreign(&ending);
    telling.then_some(ending)
}

/// Whether the ending of a name tells of a format that is not written here.
pub(crate) fn is_foreign(ending: &str) -> bool {
    FOREIGN.contains(&ending)
}

/// The name of `file` as an image named `image` means it: relative names start in the image's folder. Like qemu-img,
/// this only joins texts.
pub(crate) fn resolved(image: &str, file: &str) -> String {
    resolved_path(image.as_ref(), file).to_string_lossy().into_owned()
}

/// The same for files that are opened, whose names may have any bytes.
pub(crate) fn resolved_path(image: &Path, file: &str) -> PathBuf {
    let file = file.strip_prefix("file:").unwrap_or(file).as_bytes();
    let image = image.as_os_str().as_bytes();
    let folder = match image.iter().rposition(|&byte| byte == b'/') {
        Some(slash) if !file.starts_with(b"/") => image.get(..=slash),
        _ => None,
    };
    OsString::from_vec([folder.unwrap_or_default(), file].concat()).into()
}

/// The names of a chain's images, as each image names the next one.
pub(crate) fn chain_names(image: &Image, top: &Path) -> Vec<String> {
    let mut name = top.to_string_lossy().into_owned();
    let mut names = Vec::new();
    for (_, info) in image.chain() {
        let next = info.backing_name.as_deref().map(|backing| resolved(&name, backing));
        names.push(std::mem::replace(&mut name, next.unwrap_or_default()));
    }
    names
}

/// The names of an image's files as the images name them, where [`Image::files`] has canonical paths.
pub(crate) struct FileNames(Vec<String>);

impl FileNames {
    pub(crate) fn new(image: &Image, top: &Path) -> Self {
        let mut known: Vec<(PathBuf, String)> = Vec::new();
        let mut learn = |name: String| {
            if let Ok(path) = fs::canonicalize(&name) {
                known.push((path, name));
            }
        };
        for (name, (_, info)) in chain_names(image, top).into_iter().zip(image.chain()) {
            if let FormatInfo::Qcow2(qcow2) = &info.specific
                && let Some(data) = &qcow2.data_file
            {
                learn(resolved(&name, data));
            }
            learn(name);
        }
        let name_of = |path: &Path| {
            let canonical = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
            let found = known.iter().find(|(path, _)| *path == canonical);
            found.map_or_else(|| path.to_string_lossy().into_owned(), |(_, name)| name.clone())
        };
        Self(image.files().iter().map(|file| name_of(&file.path)).collect())
    }

    pub(crate) fn get(&self, file: FileId) -> &str {
        self.0.get(file.0 as usize).map_or("", String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_names_start_at_the_image() {
        let cases = [
            ("a", "b", "b"),
            ("x/a", "b", "x/b"),
            ("x//a", "../b", "x//../b"),
            ("x/a", "/b", "/b"),
            ("./a", "file:b", "./b"),
        ];
        for (image, file, want) in cases {
            assert_eq!(resolved(image, file), want);
            assert_eq!(resolved_path(image.as_ref(), file), Path::new(want));
        }
    }
}
