//! The library's errors in qemu-img's words, where qemu-img has words for them.

use std::io;
use std::path::Path;

use diskmill::{Error, Format, Kind, without_os_codes};

use crate::names::shown;

/// What the system says, without Rust's number behind it.
pub(super) fn system(error: &io::Error) -> String {
    without_os_codes(&error.to_string())
}

/// Why the image in the file `path` cannot be opened: what stands behind "Could not open 'NAME': ".
pub(super) fn cannot_open(error: &Error, path: &Path, format: Option<Format>) -> String {
    let of_other_file = error.path().filter(|&at| at != path);
    let inner = reason(error, of_other_file.unwrap_or(path), format);
    match of_other_file {
        Some(_) => format!("Could not open backing file: {inner}"),
        None => inner,
    }
}

fn reason(error: &Error, path: &Path, format: Option<Format>) -> String {
    let name = path.to_string_lossy();
    // An image may have named it.
    let name = shown(&name);
    match (error.kind(), error.os_error()) {
        (Kind::Io, Some(cause)) if path.is_dir() => {
            let _ = cause;
            format!("'file' driver requires '{name}' to be a regular file")
        }
        (Kind::Io, Some(cause)) => format!("Could not open '{name}': {}", system(cause)),
        (Kind::NotThisFormat, _) => match format {
            Some(Format::Vmdk) => "invalid VMDK image descriptor".to_owned(),
            Some(format) => format!("Image is not in {format} format"),
            None => error.to_string(),
        },
        (Kind::Busy, _) => locked(error, &name),
        _ if error.structure() == Some("AES encryption") => {
            "Parameter 'encrypt.key-secret' is required for cipher".to_owned()
        }
        _ if error.structure() == Some("LUKS header") => match error.kind() {
            Kind::Denied if error.to_string().contains("needs its passphrase") => {
                "Parameter 'encrypt.key-secret' is required for cipher".to_owned()
            }
            Kind::Denied => "Invalid password, cannot unlock any keyslot".to_owned(),
            _ => error.to_string(),
        },
        (Kind::Corrupt, _) if error.to_string().contains("where the LUKS header stands") => {
            "Missing CRYPTO header for crypt method 2".to_owned()
        }
        (Kind::Corrupt, _) if error.to_string().contains("the L1 table has") => "Image is too big".to_owned(),
        _ => error.to_string(),
    }
}

/// QEMU names the permission that another process keeps from us.
fn locked(error: &Error, name: &str) -> String {
    let text = error.to_string();
    let lock = text.split("failed to get ").nth(1).and_then(|rest| rest.split(':').next());
    lock_message(lock.unwrap_or("shared \"write\" lock"), Path::new(name))
}

/// The message for a lock that another process keeps from us.
pub(super) fn lock_message(lock: &str, path: &Path) -> String {
    format!("Failed to get {lock}\nIs another process using the image [{}]?", path.display())
}

/// Why the file `path` cannot be created.
pub(super) fn cannot_create(error: &Error, path: &Path) -> String {
    match error.os_error() {
        Some(cause) => format!("Could not create '{}': {}", path.display(), system(cause)),
        None => error.to_string(),
    }
}

/// The reason of a failure while working on images that are open.
pub(super) fn while_working(error: &Error) -> String {
    match (error.kind(), error.os_error()) {
        (Kind::Io, Some(cause)) => system(cause),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_errors_have_no_numbers() {
        assert_eq!(system(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(system(&io::Error::other("x")), "x");
    }
}
