//! Starting `guestfish --listen` and finding its socket.

use std::fs::{self, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::message::Server;
use crate::place::{Place, private_dir, uid};
use crate::process::ProcessId;
use crate::{Error, Kind, Result, Settings};

/// How long guestfish may take to make its socket (it takes some milliseconds).
const SOCKET_TIMEOUT: Duration = Duration::from_secs(20);

/// Starts guestfish. Its messages go to a file of the session, passphrases come from a named pipe.
pub(super) fn start(settings: &Settings, place: &Place) -> Result<Server> {
    let asked = ask_version(settings)?;
    let doing = |what: &str| format!("cannot {what} in {}", place.dir.display());
    let create = |path| OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    let messages = create(place.messages()).map_err(|e| Error::io(doing("write"), e))?;
    create(place.lock()).map_err(|e| Error::io(doing("write"), e))?;
    mknodat(CWD, place.keys(), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .map_err(|e| Error::io(doing("make a named pipe"), e.into()))?;
    // Open for writing too: so it is never at its end.
    let keys = OpenOptions::new().read(true).write(true).open(place.keys());
    let keys = keys.map_err(|e| Error::io(doing("open a named pipe"), e))?;

    let mut command = guestfish(settings, place);
    command.args(["--listen", "--keys-from-stdin"]).stdin(keys).stdout(Stdio::piped()).stderr(messages);
    let mut child = command.spawn().map_err(|e| not_installed(settings, e))?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        // The program that was started ends at once; what it leaves behind is the server.
        let mut stdout = BufReader::new(stdout.take(4096));
        stdout.read_line(&mut line).map_err(|e| Error::io("cannot read what guestfish says", e))?;
    }
    let _ = child.wait();
    let pid = server_pid(&line).ok_or_else(|| {
        let said = fs::read(place.messages()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        Error::new(Kind::Start, format!("guestfish does not listen: {said}"))
    })?;
    let process = ProcessId::of(pid).ok_or_else(|| Error::new(Kind::Start, "guestfish ended at once"))?;
    let socket = find_socket(process)?;
    let version = version(settings, asked)?;
    Ok(Server { process, socket, version, place: place.clone() })
}

/// guestfish with the environment of the settings and the folders of the session.
pub(super) fn guestfish(settings: &Settings, place: &Place) -> Command {
    let mut command = Command::new(&settings.guestfish);
    settings.apply(&mut command);
    // Messages are read by us.
    command.env("LC_ALL", "C");
    // It runs our event handlers, dozens of times in each start: a small one, that knows their language.
    command.env("SHELL", "/bin/sh").env_remove("GUESTFISH_PID").env_remove("GUESTFISH_INIT");
    // libguestfs puts its sockets into the one and overlays into the other.
    command.env("XDG_RUNTIME_DIR", &place.dir).env("LIBGUESTFS_TMPDIR", &place.scratch);
    command
}

/// The server's process from `GUESTFISH_PID=4321; export GUESTFISH_PID`.
pub(crate) fn server_pid(line: &str) -> Option<i32> {
    let (number, _) = line.strip_prefix("GUESTFISH_PID=")?.split_once(';')?;
    number.parse().ok().filter(|&pid| pid > 1)
}

/// Asks guestfish for its version, which takes as long as starting it to listen: both are done at the same time.
fn ask_version(settings: &Settings) -> Result<Child> {
    let mut command = Command::new(&settings.guestfish);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().map_err(|e| not_installed(settings, e))
}

/// The version of the guestfish that is there, as hello has it.
fn version(settings: &Settings, asked: Child) -> Result<String> {
    let out = asked.wait_with_output().map_err(|e| Error::io("cannot read guestfish's version", e))?;
    let text = String::from_utf8_lossy(&out.stdout);
    let version = hello_version(&text).filter(|_| out.status.success());
    version.map(str::to_owned).ok_or_else(|| {
        let said = format!("{}{}", text.trim(), String::from_utf8_lossy(&out.stderr).trim());
        let name = settings.guestfish.display();
        Error::new(Kind::NotInstalled, format!("{name} --version says \"{}\"", said.escape_debug()))
    })
}

/// `1.48.6` from `guestfish 1.48.6`, and `1.50.1` from `guestfish 1.50.1rhel=9,release=8.el9_4,libvirt`: what a
/// distribution adds to the version is not part of hello.
fn hello_version(said: &str) -> Option<&str> {
    let version = said.trim().strip_prefix("guestfish ")?;
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    version.get(..end).filter(|version| (1..=64).contains(&version.len()))
}

fn not_installed(settings: &Settings, error: std::io::Error) -> Error {
    let name = settings.guestfish.display();
    if error.kind() == std::io::ErrorKind::NotFound {
        Error::new(Kind::NotInstalled, format!("{name} is not installed"))
            .hint("install libguestfs (Debian: guestfish and a kernel, such as linux-image-amd64)")
    } else {
        Error::io(format!("cannot run {name}"), error)
    }
}

/// guestfish binds its socket a moment after it has told its number, in a folder that must be ours alone.
fn find_socket(server: ProcessId) -> Result<PathBuf> {
    let dir = PathBuf::from(format!("/tmp/.guestfish-{}", uid()));
    let socket = socket_in(&dir, server.pid);
    let end = Instant::now() + SOCKET_TIMEOUT;
    loop {
        if fs::symlink_metadata(&socket).is_ok_and(|found| found.file_type().is_socket()) {
            private_dir(&dir).map_err(|reason| {
                Error::new(Kind::Start, format!("{} is not safe to use: {reason}", dir.display()))
            })?;
            return Ok(socket);
        }
        if !server.is_alive() {
            return Err(Error::new(Kind::Start, "guestfish ended before it listened"));
        }
        if Instant::now() >= end {
            return Err(Error::new(Kind::Start, format!("guestfish made no socket at {}", socket.display())));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Where the server with that number has its socket.
pub(crate) fn socket_in(dir: &Path, pid: i32) -> PathBuf {
    dir.join(format!("socket-{pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_three_numbers_whatever_a_distribution_adds() {
        for (said, version) in [
            ("guestfish 1.48.6\n", Some("1.48.6")),
            ("guestfish 1.50.1rhel=9,release=8.el9_4,libvirt\n", Some("1.50.1")),
            ("guestfish \n", None),
            ("guestfish version\n", None),
            ("bash 5.2\n", None),
        ] {
            assert_eq!(hello_version(said), version, "{said}");
        }
    }

    #[test]
    fn the_number_of_the_server() {
        assert_eq!(server_pid("GUESTFISH_PID=4321; export GUESTFISH_PID\n"), Some(4321));
        for bad in ["", "GUESTFISH_PID=", "GUESTFISH_PID=-1; x", "GUESTFISH_PID=1; x", "hello"] {
            assert_eq!(server_pid(bad), None, "{bad}");
        }
    }
}
