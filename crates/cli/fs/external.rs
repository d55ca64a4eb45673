//! libguestfs' own programs, where a verb is one of them: guestfish, guestmount, virt-customize and their like.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command as Process, ExitStatus, Output};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::args::{GuestArgs, Key, KeySource};
use super::keys;
use super::settings::{SettingsArgs, settings};
use super::watch;
use crate::exit::{Exit, Failure};
use crate::names;

/// What is read of a tool's messages, in bytes.
const MAX_SAID: u64 = 1 << 20;

/// How often a child is looked after.
const TICK: Duration = Duration::from_millis(50);

/// A program of libguestfs with the settings of the session in its environment.
pub(crate) struct Tool {
    name: &'static str,
    process: Process,
    /// The user wants to see what libguestfs does while it does it.
    verbose: bool,
    /// Passphrases, in files for us alone; removed when the tool has ended.
    secrets: Vec<tempfile::NamedTempFile>,
}

impl Tool {
    /// For an image of `size` bytes.
    pub(crate) fn new(name: &'static str, args: &SettingsArgs, size: u64) -> Result<Self, Failure> {
        let (settings, _) = settings(args, size)?;
        let mut process = Process::new(name);
        settings.apply(&mut process);
        Ok(Self { name, process, verbose: settings.debug || settings.trace, secrets: Vec::new() })
    }

    pub(crate) fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.process.arg(arg);
        self
    }

    pub(crate) fn args(&mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> &mut Self {
        self.process.args(args);
        self
    }

    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// `--key` for each volume. A passphrase stands in a file, never among the arguments.
    pub(crate) fn keys(&mut self, keys: &[Key]) -> Result<&mut Self, Failure> {
        for key in keys {
            key.source.check()?;
            let Some(device) = &key.device else {
                return Err(Failure::usage(format!(
                    "{} must be told which volume a passphrase is for: --key DEVICE:prompt or --key DEVICE:file:PATH",
                    self.name
                )));
            };
            let mut selector = OsString::from(format!("{device}:file:"));
            selector.push(self.secret(&key.source, device)?);
            self.process.arg("--key").arg(selector);
        }
        Ok(self)
    }

    /// The name of a file with a passphrase in it.
    pub(crate) fn secret(&mut self, source: &KeySource, what: &str) -> Result<OsString, Failure> {
        if let KeySource::File(path) = source {
            return Ok(path.as_os_str().to_owned());
        }
        let failed = |error: io::Error| Failure::failed(format!("cannot read the passphrase: {error}"));
        let secret = keys::read(source, what).map_err(failed)?;
        let mut file = tempfile::Builder::new().prefix("diskmill-").tempfile().map_err(failed)?;
        file.write_all(&secret).map_err(failed)?;
        let name = file.path().as_os_str().to_owned();
        self.secrets.push(file);
        Ok(name)
    }

    /// `-i`, or what is to be mounted.
    pub(crate) fn mounts(&mut self, args: &GuestArgs) -> Result<&mut Self, Failure> {
        if args.root.is_some() {
            return Err(Failure::usage(format!(
                "--root is not supported by {}: mount with -m DEVICE:FOLDER",
                self.name
            )));
        }
        if args.mount.is_empty() {
            self.process.arg("-i");
        } else if !args.image.key.is_empty() {
            // guestfish(1), "OPENING DISKS WITH LUKS": encrypted volumes are opened by -i.
            return Err(Failure::usage(format!(
                "--key together with -m is not supported by {}: it opens LUKS volumes only for the mounts of an operating \
                 system",
                self.name
            )));
        }
        for spec in &args.mount {
            let mut text = format!("{}:{}", spec.device, spec.folder);
            if !spec.options.is_empty() || !spec.fstype.is_empty() {
                text = format!("{text}:{}", spec.options);
            }
            if !spec.fstype.is_empty() {
                text = format!("{text}:{}", spec.fstype);
            }
            self.process.arg("-m").arg(text);
        }
        Ok(self)
    }

    /// Runs it to its end. A signal to us ends it too.
    pub(crate) fn run(mut self) -> Result<ExitStatus, Failure> {
        watch::install()?;
        let mut child = self.process.spawn().map_err(|error| not_started(self.name, &error))?;
        let status = wait(&mut child).map_err(|error| Failure::failed(format!("{}: {error}", self.name)))?;
        match watch::received() {
            Some(signal) => Err(Failure::signal(signal, "interrupted")),
            None => Ok(status),
        }
    }

    /// Runs it and keeps what it prints.
    pub(crate) fn output(mut self) -> Result<Output, Failure> {
        self.process.output().map_err(|error| not_started(self.name, &error))
    }

    /// Runs it; anything but success is an error, explained by what the tool says on standard error.
    pub(crate) fn run_well(mut self) -> Result<(), Failure> {
        let name = self.name;
        if self.verbose {
            let status = self.run()?;
            return if status.success() { Ok(()) } else { Err(failed(name, status, "")) };
        }
        let failed_to = |error: io::Error| Failure::failed(format!("cannot make a file: {error}"));
        // Messages are read by us.
        self.process.env("LC_ALL", "C");
        let mut said = tempfile::tempfile().map_err(failed_to)?;
        self.process.stderr(said.try_clone().map_err(failed_to)?);
        let status = self.run()?;
        let mut text = Vec::new();
        said.rewind().and_then(|()| said.take(MAX_SAID).read_to_end(&mut text)).map_err(failed_to)?;
        let text = String::from_utf8_lossy(&text);
        let (before, error) = if status.success() { (&*text, "") } else { parts(name, &text) };
        for line in before.lines() {
            eprintln!("{}", names::shown(line));
        }
        if status.success() { Ok(()) } else { Err(failed(name, status, error)) }
    }
}

/// Where the advice of libguestfs and its tools begins, which is about reporting bugs.
const ADVICE: [&str; 3] =
    ["To see full error messages", "If reporting bugs", "This usually means the libguestfs appliance"];

/// What a tool said besides its error, such as the output of a script in the guest, and its error, advice and all.
fn parts<'s>(name: &str, said: &'s str) -> (&'s str, &'s str) {
    let start = said.find(&format!("{name}: error: ")).unwrap_or(0);
    said.split_at_checked(start).unwrap_or(("", said))
}

/// A tool's failure: its error in one line without the advice, and for an appliance that does not start the check that
/// explains it.
pub(crate) fn failed(name: &str, status: ExitStatus, error: &str) -> Failure {
    let advised = ADVICE.iter().filter_map(|advice| error.find(advice)).min();
    let reason = advised.and_then(|at| error.get(..at)).unwrap_or(error);
    let own = format!("{name}: ");
    let reason = reason.trim().strip_prefix(&own).unwrap_or(reason).trim();
    let reason = reason.strip_prefix("error: ").unwrap_or(reason);
    let lines: Vec<&str> = reason.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let mut message = match lines.as_slice() {
        [] => format!("{name} failed ({status})"),
        lines => format!("{name}: {}", names::shown(&lines.join("; "))),
    };
    if error.contains("LIBGUESTFS_DEBUG") {
        let checks = if reason.contains("supermin") { " kernel supermin cache" } else { "" };
        message.push_str(&format!("; `diskmill doctor{checks}` tells what this machine lacks"));
    }
    Failure::failed(message)
}

fn wait(child: &mut Child) -> io::Result<ExitStatus> {
    let mut told = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if watch::received().is_some() && !told {
            told = true;
            if let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        sleep(TICK);
    }
}

/// How a program ended, as a shell says it.
pub(crate) fn exit_of(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Command(u8::try_from(code).unwrap_or(1)),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Failed,
    }
}

pub(crate) fn not_started(name: &str, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::NotFound {
        return Failure::failed(format!(
            "{name} is not installed (Debian: guestfish, guestmount and guestfs-tools); `diskmill doctor` tells what this \
             machine lacks"
        ));
    }
    Failure::failed(format!("cannot run {name}: {error}"))
}
