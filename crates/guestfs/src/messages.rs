//! What guestfish says besides its answers: errors on its standard error, progress through an event of ours.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use crate::place::Place;
use crate::{Error, Kind};

/// What is kept of the messages of one call: the last so many bytes.
const MAX_MESSAGES: u64 = 64 << 10;

/// The longest reason that an error gives, in characters.
const MAX_REASON: usize = 2000;

/// The next step that errors of the start name.
const DOCTOR: &str = "`diskmill doctor` checks what the appliance needs";

/// Reads the files of a session from where it has come to.
#[derive(Debug)]
pub(crate) struct Messages {
    messages: Tail,
    progress: Tail,
    console: Tail,
}

impl Messages {
    pub(crate) fn new(place: &Place) -> Self {
        let [messages, progress, console] =
            [place.messages(), place.progress(), place.console()].map(Tail::new);
        Self { messages, progress, console }
    }

    /// Forgets what has been said so far.
    pub(crate) fn skip(&mut self) {
        self.messages.skip();
        self.progress.skip();
        self.console.skip();
    }

    /// What has been said since.
    pub(crate) fn take(&mut self) -> String {
        String::from_utf8_lossy(&self.messages.take()).trim_end().to_owned()
    }

    /// Whether there is progress, of which `tell` hears the latest.
    pub(crate) fn progress(&mut self, tell: &mut dyn FnMut(u64, u64)) -> bool {
        let text = self.progress.take();
        let text = String::from_utf8_lossy(&text);
        if let Some((done, total)) = text.lines().rev().find_map(progress_line) {
            tell(done, total);
        }
        !text.is_empty()
    }

    /// What QEMU and the appliance have said since, where [`console_handler`](Self::console_handler) hears them.
    pub(crate) fn console(&mut self) -> String {
        String::from_utf8_lossy(&self.console.take()).into_owned()
    }

    /// The shell command that guestfish runs for each progress event.
    pub(crate) fn progress_handler(&self) -> Vec<u8> {
        self.progress.handler("echo")
    }

    /// The shell command for each piece of the appliance's output, which QEMU's own messages are part of.
    pub(crate) fn console_handler(&self) -> Vec<u8> {
        self.console.handler("printf %s")
    }
}

/// Position and total from `procedure serial position total` (guestfish(1), "event").
pub(crate) fn progress_line(line: &str) -> Option<(u64, u64)> {
    let mut fields = line.split_ascii_whitespace().skip(2);
    let done = fields.next()?.parse().ok()?;
    let total = fields.next()?.parse().ok().filter(|&total| total > 0)?;
    Some((u64::min(done, total), total))
}

/// The end of a growing file.
#[derive(Debug)]
struct Tail {
    path: PathBuf,
    at: u64,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self { path, at: 0 }
    }

    /// A shell command that adds its arguments, which `print` prints.
    fn handler(&self, print: &str) -> Vec<u8> {
        let mut command = format!("{print} \"$@\" >>'").into_bytes();
        for &byte in self.path.as_os_str().as_bytes() {
            if byte == b'\'' {
                command.extend_from_slice(br"'\'");
            }
            command.push(byte);
        }
        command.push(b'\'');
        command
    }

    fn skip(&mut self) {
        self.at = len(&self.path);
    }

    fn take(&mut self) -> Vec<u8> {
        let end = len(&self.path);
        let from = self.at.max(end.saturating_sub(MAX_MESSAGES));
        self.at = end;
        let mut bytes = Vec::new();
        if end > from
            && let Ok(mut file) = File::open(&self.path)
            && file.seek(SeekFrom::Start(from)).is_ok()
        {
            // Where it cannot be read there is no message, and the status tells the rest.
            let _ = file.take(end - from).read_to_end(&mut bytes);
        }
        bytes
    }
}

fn len(path: &Path) -> u64 {
    path.metadata().map_or(0, |found| found.len())
}

/// The error of a command that failed, from what guestfish said.
pub(crate) fn diagnose(command: &str, said: &str) -> Error {
    let reasons: Vec<&str> = said
        .lines()
        .filter_map(|line| line.strip_prefix("libguestfs: error: ").or_else(|| line.strip_prefix("error: ")))
        .collect();
    let reason = one_line(if reasons.is_empty() { said.lines().collect() } else { reasons });
    let own = format!("{command}: ");
    // "ls0: ls0_stub: …" and "ls0: …"
    let own_stub = format!("{}_stub: ", command.replace('-', "_"));
    let underscored = format!("{}: ", command.replace('-', "_"));
    let reason = reason.strip_prefix(&own).or_else(|| reason.strip_prefix(&underscored)).unwrap_or(&reason);
    let reason = reason.strip_prefix(&own_stub).unwrap_or(reason);
    if command == "run" {
        return start_failed(said, reason);
    }
    let kind = if has(
        said,
        &["appliance closed the connection unexpectedly", "unexpectedly closed", "call launch before using"],
    ) {
        return Error::new(Kind::Died, format!("{command}: the appliance ended in the middle of the work"))
            .hint(DOCTOR);
    } else if has(said, &["No such file or directory", "no such file or directory"]) {
        Kind::NotFound
    } else if has(said, &["No space left on device"]) {
        Kind::NoSpace
    } else if has(said, &["Read-only file system"]) {
        Kind::ReadOnly
    } else {
        Kind::Command
    };
    let reason = if reason.is_empty() { "guestfish gives no reason" } else { reason };
    Error::new(kind, format!("{command}: {reason}"))
}

/// The error of a server that does not take hello with the version `ours`, from what it said.
pub(crate) fn refused_version(ours: &str, said: &str) -> Error {
    // "version mismatch, server version ‘1.48.6’ does not match client version ‘1.48.5’"
    let theirs =
        said.split_once("server version ").map(|(_, rest)| rest.trim_start_matches(['‘', '\'', '"']));
    let theirs = theirs.and_then(|rest| rest.split(|c: char| !c.is_ascii_digit() && c != '.').next());
    let theirs = theirs.filter(|version| !version.is_empty()).unwrap_or("another version");
    Error::new(
        Kind::Version,
        format!("guestfish listens as {theirs} and refuses {ours}, which `guestfish --version` tells"),
    )
    .hint(
        "if it was upgraded just now, try again; else `diskmill doctor guestfish` shows which one runs: leave one \
         libguestfs on PATH, without a wrapper",
    )
}

fn start_failed(said: &str, reason: &str) -> Error {
    if has(
        said,
        &[
            "Failed to get \"write\" lock",
            "Failed to get shared \"write\" lock",
            "Is another process using the image",
        ],
    ) {
        return Error::new(Kind::Busy, "another process is using the image")
            .hint("end it, or wait until it has ended");
    }
    if has(
        said,
        &["failed to find a suitable kernel", "no kernel", "cannot find any suitable libguestfs supermin"],
    ) {
        return Error::new(Kind::NoKernel, format!("the appliance cannot be built: {reason}"))
            .hint("`diskmill doctor kernel` tells what is missing");
    }
    // supermin says no more than that it failed; QEMU's own words tell more than that it has ended.
    let hint = match reason.contains("supermin") {
        true => "`diskmill doctor kernel supermin cache` tells what is missing",
        false => DOCTOR,
    };
    let qemu: Vec<&str> = said.lines().filter(|line| line.starts_with("qemu-system-")).collect();
    let reason = if qemu.is_empty() { reason.to_owned() } else { one_line(qemu) };
    Error::new(Kind::Start, format!("the appliance does not start: {reason}")).hint(hint)
}

/// The lines as one, cut to a length that can be read. What the guest can make part of a message, such as the name of a
/// file, must not steer the terminal.
pub(crate) fn one_line(lines: Vec<&str>) -> String {
    let lines: Vec<&str> = lines.into_iter().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut text = String::new();
    for c in lines.join("; ").chars().take(MAX_REASON) {
        if c.is_control() { text.extend(c.escape_default()) } else { text.push(c) }
    }
    text
}

fn has(said: &str, words: &[&str]) -> bool {
    words.iter().any(|word| said.contains(word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_clear_message() {
        let error = diagnose("ls0", "libguestfs: error: ls0: ls0_stub: you must call 'mount' first\n");
        assert_eq!(error.to_string(), "ls0: you must call 'mount' first");
        let error = diagnose(
            "is-file",
            "libguestfs: error: is_file: is_file_stub: path must start with a / character",
        );
        assert_eq!(error.to_string(), "is-file: path must start with a / character");
        let error = diagnose("cat", "libguestfs: error: open: /x: No such file or directory");
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (Kind::NotFound, "cat: open: /x: No such file or directory")
        );
        let error = diagnose("cat", "libguestfs: error: open: /\x1b[2J: No such file or directory");
        assert_eq!(error.to_string(), "cat: open: /\\u{1b}[2J: No such file or directory");
        assert_eq!(diagnose("cat", "one\n\ntwo\n").to_string(), "cat: one; two");
        assert_eq!(diagnose("cat", "").to_string(), "cat: guestfish gives no reason");
        let error = diagnose("write", "libguestfs: error: write: /f: No space left on device");
        assert_eq!(error.kind(), Kind::NoSpace);
    }

    #[test]
    fn a_version_that_is_refused_is_named_beside_the_other() {
        let said = "guestfish: protocol error: version mismatch, server version ‘1.48.6’ does not match client version \
                    ‘1.48.5’.  The two versions must match exactly.";
        let error = refused_version("1.48.5", said);
        assert_eq!(error.kind(), Kind::Version);
        assert!(error.message().contains("as 1.48.6 and refuses 1.48.5"), "{error}");
        assert!(refused_version("1", "").message().contains("as another version and refuses 1"));
    }

    #[test]
    fn a_start_that_fails_is_explained_by_qemu() {
        let said = "libguestfs: error: appliance closed the connection unexpectedly.\nThis usually means\n";
        let error = diagnose("run", said);
        assert_eq!((error.kind(), error.message().contains("closed the connection")), (Kind::Start, true));
        let locked =
            "qemu-system-x86_64: -device scsi-hd,drive=hd0: Failed to get \"write\" lock\nIs another process";
        assert_eq!(diagnose("run", &format!("{said}{locked}")).kind(), Kind::Busy);
        let memory = "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n";
        let error = diagnose("run", &format!("{said}{memory}"));
        assert!(error.kind() == Kind::Start && error.message().contains("guest memory"), "{error}");
    }

    #[test]
    fn progress_is_position_and_total() {
        assert_eq!(progress_line("0 3 7 12"), Some((7, 12)));
        assert_eq!(progress_line("0 3 13 12"), Some((12, 12)));
        for bad in ["", "0 3 7", "0 3 7 0", "a b c d"] {
            assert_eq!(progress_line(bad), None, "{bad}");
        }
    }
}
