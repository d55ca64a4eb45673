//! Everything that is read from guestfish, for the fuzz target `guestfs_replies`. Not part of the interface.

use crate::keeper::server::server_pid;
use crate::messages::{diagnose, progress_line};
use crate::wire::{self, decode};

/// Reads `bytes` as each of guestfish's replies.
///
/// # Panics
/// When a reader breaks what it promises.
pub fn replies(bytes: &[u8]) {
    if let Some((status, _)) = bytes.split_first_chunk() {
        let _ = wire::status(*status);
    }
    let mut rest = bytes;
    if let Ok(Some(call)) = decode::call(&mut rest) {
        let name = std::str::from_utf8(&call.name).ok().filter(|_| !call.exit_on_error);
        // A NUL is read, but never sent.
        if let Some(Ok(again)) = name.map(|name| wire::call(name, &call.args)) {
            let used = bytes.len() - rest.len();
            assert_eq!(again, bytes.get(..used).unwrap_or_default(), "a call is written in one way only");
        }
    }
    let text = String::from_utf8_lossy(bytes);
    for line in text.lines() {
        assert!(server_pid(line).is_none_or(|pid| pid > 1));
        assert!(progress_line(line).is_none_or(|(done, total)| done <= total && total > 0));
    }
    for command in ["run", "ls0", "is-file"] {
        let error = diagnose(command, &text);
        assert!(!error.message().is_empty());
        assert!(!error.message().contains(|c: char| c.is_control()), "{error:?}");
    }
}
