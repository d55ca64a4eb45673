//! `mount`, `umount`, `script`, `shell`: guestmount and guestfish themselves, on an image that we have checked and serve.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::args::GuestArgs;
use super::copy::{host_failure, readable};
use super::drive::{Drive, wait_closed};
use super::external::{Tool, exit_of, failed, not_started};
use super::guest::Access;
use super::output::print_json;
use crate::exit::{Exit, Failure};

/// How long guestmount may write back after its file system was unmounted.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The folder of the host
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: PathBuf,

    /// Let the image be changed
    #[arg(short = 'w', long)]
    pub(crate) write: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UmountArgs {
    /// Print one JSON value
    #[arg(long)]
    pub(crate) json: bool,

    /// The folder of the host
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ScriptArgs {
    #[command(flatten)]
    pub(crate) guestfish: GuestfishArgs,

    /// The commands; `-` is standard input. Those that ask for a passphrase ask on the terminal
    #[arg(value_name = "FILE")]
    pub(crate) script: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ShellArgs {
    #[command(flatten)]
    pub(crate) guestfish: GuestfishArgs,
}

/// How guestfish is to find the image.
#[derive(Debug, Args)]
pub(crate) struct GuestfishArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Let the image be changed
    #[arg(short = 'w', long)]
    pub(crate) write: bool,

    /// Mount nothing, as for an empty disk: the first command is `run`
    #[arg(long, conflicts_with_all = ["mount", "root"])]
    pub(crate) no_mount: bool,
}

pub(crate) fn script(args: &ScriptArgs) -> Result<Exit, Failure> {
    let from_file = args.script != Path::new("-");
    if from_file {
        readable(&args.script)?;
    }
    let mut tool = guestfish(&args.guestfish)?;
    if from_file {
        tool.tool.arg("-f").arg(&args.script);
    }
    if !args.guestfish.guest.image.json {
        return Ok(exit_of(tool.tool.run()?));
    }
    let status = tool.tool.output()?;
    print_json(&json!({
        "exit-code": status.status.code(),
        "stdout": String::from_utf8_lossy(&status.stdout),
        "stderr": String::from_utf8_lossy(&status.stderr),
    }))?;
    Ok(exit_of(status.status))
}

pub(crate) fn shell(args: &ShellArgs) -> Result<Exit, Failure> {
    if args.guestfish.guest.image.json {
        return Err(Failure::usage("shell --json is not supported: it is for people; see script --json"));
    }
    Ok(exit_of(guestfish(&args.guestfish)?.tool.run()?))
}

/// A tool, and what its appliance reads the image through.
struct WithDrive {
    tool: Tool,
    _drive: Drive,
}

fn guestfish(args: &GuestfishArgs) -> Result<WithDrive, Failure> {
    let (guest, image) = (&args.guest, &args.guest.image);
    if image.keep {
        return Err(Failure::usage("--keep is not supported here: guestfish has a session of its own"));
    }
    let access = if args.write { Access::Write } else { Access::Read };
    let drive = Drive::open(image, &guest.file, access, false)?;
    let mut tool = Tool::new("guestfish", &image.settings, drive.size())?;
    tool.arg(if args.write { "--rw" } else { "--ro" }).args(drive.tool_arguments()).keys(&image.key)?;
    if !args.no_mount {
        tool.mounts(guest)?;
    }
    Ok(WithDrive { tool, _drive: drive })
}

pub(crate) fn mount(args: &MountArgs) -> Result<Exit, Failure> {
    let folder = fs::canonicalize(&args.folder).map_err(|error| host_failure(&args.folder, &error))?;
    let pid_file = pid_file(&folder)?;
    let access = if args.write { Access::Write } else { Access::Read };
    let drive = Drive::open(&args.guest.image, &args.guest.file, access, true)?;
    let mut tool = Tool::new("guestmount", &args.guest.image.settings, drive.size())?;
    tool.arg(if args.write { "--rw" } else { "--ro" }).args(drive.tool_arguments());
    tool.keys(&args.guest.image.key)?.mounts(&args.guest)?;
    tool.arg("--pid-file").arg(&pid_file).arg("--").arg(&folder);
    // What stays behind must not hold our outputs open.
    let said = tempfile::NamedTempFile::new()
        .map_err(|error| Failure::failed(format!("cannot make a file: {error}")))?;
    let stderr = said.reopen().map_err(|error| host_failure(said.path(), &error))?;
    tool.process().stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
    let status = tool.run()?;
    if !status.success() {
        let text = fs::read_to_string(said.path()).unwrap_or_default();
        return Err(failed("guestmount", status, &text));
    }
    let pid = read_pid(&pid_file).ok_or_else(|| Failure::failed("guestmount does not tell its process"))?;
    if let Some(socket) = drive.socket() {
        // For `umount`, behind the number.
        let note =
            fs::write(&pid_file, [format!("{pid}\n").as_bytes(), socket.as_os_str().as_bytes()].concat());
        note.map_err(|error| host_failure(&pid_file, &error))?;
    }
    drive.release(pid)?;
    if args.guest.image.json {
        return print_json(
            &json!({ "mounted": folder.to_string_lossy(), "pid": pid, "writable": args.write }),
        );
    }
    Ok(Exit::Done)
}

pub(crate) fn umount(args: &UmountArgs) -> Result<Exit, Failure> {
    let folder = std::path::absolute(&args.folder).map_err(|error| host_failure(&args.folder, &error))?;
    // Not canonicalize: the file system may hang.
    let pid_file = pid_file(&folder)?;
    let (pid, socket) = (read_pid(&pid_file), read_socket(&pid_file));
    if pid.is_none() && !is_mounted(&folder) {
        return Err(Failure::failed(format!("{folder:?}: nothing is mounted there")));
    }
    let output = Process::new("guestunmount").arg("--").arg(&folder).stdin(Stdio::null()).output();
    let output = output.map_err(|error| not_started("guestunmount", &error))?;
    if !output.status.success() {
        // Behind the first line stands what fuser(1) cannot see.
        let said = String::from_utf8_lossy(&output.stderr);
        let reason = said.lines().find(|line| !line.trim().is_empty()).unwrap_or_default();
        return Err(failed("guestunmount", output.status, reason));
    }
    // guestmount(1), "--pid-file": the image is whole when the process has ended.
    let end = Instant::now() + UNMOUNT_LIMIT;
    while pid.is_some_and(runs) {
        if Instant::now() > end {
            return Err(Failure::failed(format!(
                "guestmount (process {}) is still writing",
                pid.unwrap_or(0)
            )));
        }
        sleep(Duration::from_millis(20));
    }
    let _ = fs::remove_file(&pid_file);
    socket.map_or(Ok(()), |socket| wait_closed(&socket))?;
    if args.json {
        return print_json(&json!({ "unmounted": folder.to_string_lossy() }));
    }
    Ok(Exit::Done)
}

/// Whether something is mounted on this very folder (proc(5), `mountinfo`). The folder itself is not looked at: its file
/// system may hang.
fn is_mounted(folder: &Path) -> bool {
    let Ok(table) = fs::read("/proc/self/mountinfo") else { return true };
    let real = folder.parent().and_then(|parent| fs::canonicalize(parent).ok());
    let real = real.zip(folder.file_name()).map(|(parent, name)| parent.join(name));
    table.split(|&byte| byte == b'\n').any(|line| {
        let point = line.split(|&byte| byte == b' ').nth(4).map(unescaped).unwrap_or_default();
        [Some(folder), real.as_deref()].contains(&Some(Path::new(OsStr::from_bytes(&point))))
    })
}

/// A field of the kernel's table, where blanks and the like are `\` and three octal digits.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, behind)) = rest.split_first() {
        let octal = behind.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = octal.filter(|_| byte == b'\\').and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(code.unwrap_or(byte));
        rest = if code.is_some() { behind.get(3..).unwrap_or_default() } else { behind };
    }
    out
}

/// Whether a process has not ended; one that nobody has waited for has.
fn runs(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    !state.is_empty() && !state.starts_with('Z')
}

/// Where the process of a mount is noted, by the folder's name.
fn pid_file(folder: &Path) -> Result<PathBuf, Failure> {
    let place = super::drive::run_folder()
        .map_err(|error| Failure::failed(format!("no run-time folder: {error}")))?;
    let hash: String =
        Sha256::digest(folder.as_os_str().as_bytes()).iter().take(12).map(|b| format!("{b:02x}")).collect();
    Ok(place.join(format!("mount-{hash}.pid")))
}

fn read_pid(file: &Path) -> Option<i32> {
    fs::read_to_string(file).ok()?.lines().next()?.trim().parse().ok()
}

/// Where the server of a mounted image listens, if it has one.
fn read_socket(file: &Path) -> Option<PathBuf> {
    let text = fs::read(file).ok()?;
    let socket = text.splitn(2, |&byte| byte == b'\n').nth(1).filter(|socket| !socket.is_empty())?;
    Some(OsStr::from_bytes(socket).into())
}
