//! Running programs under a time limit, with their output and their peak memory.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use wait4::Wait4 as _;

/// The program under test.
pub struct Tool(PathBuf);

impl Tool {
    /// `built` (pass `env!("CARGO_BIN_EXE_diskmill")`), unless `DISKMILL_TEST_PROGRAM` names another.
    pub fn under_test(built: &str) -> Self {
        let other = std::env::var_os("DISKMILL_TEST_PROGRAM");
        Self(other.map_or_else(|| PathBuf::from(built), PathBuf::from))
    }

    /// A run of the program with these arguments.
    pub fn cmd<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        Cmd::new(&self.0).args(args)
    }
}

#[derive(Clone)]
enum Input {
    Null,
    Bytes(Vec<u8>),
    File(PathBuf),
}

/// A command to run. Standard input is empty and the time limit is two minutes unless said otherwise.
#[derive(Clone)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    dir: Option<PathBuf>,
    input: Input,
    limit: Duration,
}

impl Cmd {
    /// A run of `program` (a path, or a name on `PATH`).
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Self {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            envs: Vec::new(),
            dir: None,
            input: Input::Null,
            limit: Duration::from_secs(120),
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs in this folder.
    #[must_use]
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Feeds these bytes to standard input through a pipe.
    #[must_use]
    pub fn stdin_bytes(mut self, bytes: Vec<u8>) -> Self {
        self.input = Input::Bytes(bytes);
        self
    }

    /// Gives this file as standard input.
    #[must_use]
    pub fn stdin_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.input = Input::File(path.into());
        self
    }

    /// The time after which the command is killed and the test fails.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// The same command started by another one: `launcher args… program args…`.
    #[must_use]
    pub fn under<A: AsRef<OsStr>>(mut self, launcher: impl IntoIterator<Item = A>) -> Self {
        let mut words: Vec<OsString> = launcher.into_iter().map(|a| a.as_ref().to_owned()).collect();
        words.push(self.program);
        words.append(&mut self.args);
        self.program = words.remove(0);
        self.args = words;
        self
    }

    /// The command as a reader would type it.
    pub fn line(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for arg in &self.args {
            let _ = write!(line, " {}", arg.to_string_lossy());
        }
        line
    }

    /// Starts it and returns at once.
    pub fn spawn(self) -> Running {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.envs.iter().map(|(k, v)| (k, v)));
        // Messages are compared: no translation, whatever the user's language is.
        command.env("LC_ALL", "C").stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command.stdin(match &self.input {
            Input::Null => Stdio::null(),
            Input::Bytes(_) => Stdio::piped(),
            Input::File(path) => File::open(path).expect("open standard input").into(),
        });
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start `{}`: {e}", self.line()));
        let line = self.line();
        if let Input::Bytes(bytes) = self.input {
            let mut pipe = child.stdin.take().expect("a pipe");
            // A program that stops reading early breaks the pipe; its exit code tells.
            std::thread::spawn(move || pipe.write_all(&bytes));
        }
        Running {
            stdout: drain(child.stdout.take().expect("a pipe")),
            stderr: drain(child.stderr.take().expect("a pipe")),
            child,
            line,
            started,
            limit: self.limit,
        }
    }

    /// Runs it to its end. Panics when the time limit passes.
    pub fn run(self) -> Outcome {
        self.spawn().wait()
    }

    /// Runs it and panics unless it exits with 0.
    pub fn ok(self) -> Outcome {
        self.run().expect_code(0)
    }

    /// Runs it and panics unless it exits with `code`.
    pub fn fails(self, code: i32) -> Outcome {
        self.run().expect_code(code)
    }
}

fn drain(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        bytes
    })
}

/// A command that has been started.
pub struct Running {
    child: Child,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    line: String,
    started: Instant,
    limit: Duration,
}

impl Running {
    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal. A process that has ended already is no error: it stays a zombie until `wait`.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(self.pid(), signal);
    }

    fn pid(&self) -> Pid {
        i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id")
    }

    /// Whether it has ended within `time` from now.
    pub fn ended_within(&self, time: Duration) -> bool {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).expect("pidfd_open");
        let time = time.try_into().expect("a time limit that fits");
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        poll(&mut fds, Some(&time)).expect("poll") > 0
    }

    /// Waits for the end. Panics when the time limit passes.
    pub fn wait(mut self) -> Outcome {
        let left = self.limit.saturating_sub(self.started.elapsed());
        let in_time = self.ended_within(left);
        if !in_time {
            let _ = self.child.kill();
        }
        let used = self.child.wait4().expect("wait4");
        let outcome = Outcome {
            line: self.line,
            code: used.status.code(),
            signal: std::os::unix::process::ExitStatusExt::signal(&used.status),
            wall: self.started.elapsed(),
            cpu: used.rusage.utime + used.rusage.stime,
            peak_rss: used.rusage.maxrss,
            stdout: self.stdout.join().expect("reader thread"),
            stderr: self.stderr.join().expect("reader thread"),
        };
        assert!(in_time, "still running after {:?}: {outcome}", self.limit);
        outcome
    }
}

/// How a command ended.
pub struct Outcome {
    line: String,
    /// Exit code; `None` when a signal ended the program.
    pub code: Option<i32>,
    /// The signal that ended the program.
    pub signal: Option<i32>,
    /// Elapsed time.
    pub wall: Duration,
    /// User and system time together.
    pub cpu: Duration,
    /// Peak resident memory in bytes, of the program or of the largest child it waited for. An upper
    /// bound: the kernel counts what the test itself held when it started the program.
    pub peak_rss: u64,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Outcome {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Standard output as JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout).unwrap_or_else(|e| panic!("no JSON ({e}): {self}"))
    }

    /// Panics unless the exit code is `code`.
    #[must_use]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code == Some(code), "expected exit code {code}: {self}");
        self
    }

    /// Panics unless standard error contains one of `words`, ignoring case.
    pub fn says(&self, words: &[&str]) {
        let err = self.err().to_lowercase();
        assert!(
            words.iter().any(|w| err.contains(&w.to_lowercase())),
            "the message names none of {words:?}: {self}"
        );
    }

    /// Panics if the program panicked or was killed: an error must be an error message.
    pub fn no_panic(&self) {
        assert!(
            self.signal.is_none() && self.code != Some(101) && !self.err().contains("panicked at"),
            "panicked: {self}"
        );
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let clip =
            |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(4000)]).trim_end().to_owned();
        write!(f, "`{}`\n  exit code {:?}, signal {:?}", self.line, self.code, self.signal)?;
        write!(f, "\n  stdout: {}\n  stderr: {}", clip(&self.stdout), clip(&self.stderr))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_code_and_memory_are_reported() {
        let out = Cmd::new("sh").args(["-c", "cat; echo b >&2; exit 3"]).stdin_bytes(b"a".to_vec()).run();
        assert_eq!((out.code, &out.stdout[..], &out.stderr[..]), (Some(3), &b"a"[..], &b"b\n"[..]));
        assert!(out.peak_rss > 100_000, "{} bytes", out.peak_rss);
    }

    #[test]
    #[should_panic(expected = "still running")]
    fn the_time_limit_holds() {
        let _ = Cmd::new("sleep").arg("20").limit(Duration::from_millis(100)).run();
    }

    #[test]
    fn signals_arrive() {
        let run = Cmd::new("sleep").arg("20").spawn();
        run.signal(Signal::KILL);
        assert_eq!(run.wait().signal, Some(9));
    }
}
