//! How the program ends.

use std::io;
use std::process::ExitCode;

use diskmill::{Error, Kind};
use signal_hook::consts::SIGPIPE;

/// What the exit code tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// All done; images are the same.
    Done,
    /// An error.
    Failed,
    /// The command line is wrong.
    Usage,
    /// `convert --salvage` is done, but parts of the source could not be read.
    BadRanges,
    /// `compare`: the images differ.
    Differ,
    /// `compare`: an image cannot be opened.
    CannotOpen,
    /// `compare`: what an image allocates cannot be told.
    CannotMap,
    /// `compare`: an image cannot be read.
    CannotRead,
    /// `fs run` and `fs script`: the code of the command that ran.
    Command(u8),
    /// `check`: the image is corrupt.
    Corrupt,
    /// `check`: the image only has leaks.
    Leaks,
    /// `check`: the format has no check.
    NoCheck,
    /// Ended by this signal.
    Signal(i32),
}

impl Exit {
    /// The code that the parent process gets.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed | Self::Differ => 1,
            Self::Usage | Self::CannotOpen | Self::Corrupt => 2,
            Self::BadRanges | Self::CannotMap | Self::Leaks => 3,
            Self::CannotRead => 4,
            Self::Command(code) => code,
            Self::NoCheck => 63,
            // As shells report a program that a signal ended.
            Self::Signal(signal) => 128 | (signal & 0x7f) as u8,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        exit.code().into()
    }
}

/// An end with an error: the code, the text for standard error if there is one, and what may help.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) exit: Exit,
    pub(crate) message: Option<String>,
    pub(crate) hint: Option<&'static str>,
}

impl Failure {
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { exit: Exit::Failed, message: Some(message.into()), hint: None }
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { exit: Exit::Usage, message: Some(message.into()), hint: None }
    }

    /// Of a request that no image could fulfil is a mistake in the command line; of an image, as [`From`] has it.
    pub(crate) fn of_request(error: Error) -> Self {
        match error.kind() {
            Kind::Invalid | Kind::Unsupported if error.path().is_none() => Self::usage(error.to_string()),
            _ => error.into(),
        }
    }

    /// Ended by `signal`.
    pub(crate) fn signal(signal: i32, message: impl Into<String>) -> Self {
        Self { exit: Exit::Signal(signal), message: Some(message.into()), hint: None }
    }

    /// The same failure, with what may help.
    pub(crate) fn hinting(self, hint: &'static str) -> Self {
        Self { hint: Some(hint), ..self }
    }

    /// The same failure, said of `what`.
    pub(crate) fn of(mut self, what: &str) -> Self {
        if let Some(message) = &mut self.message {
            *message = format!("{what}: {message}");
        }
        self
    }

    /// The same failure with the code `exit`, unless a signal or a closed pipe is the cause.
    pub(crate) fn or_exit(self, exit: Exit) -> Self {
        Self { exit: if self.exit == Exit::Failed { exit } else { self.exit }, ..self }
    }
}

/// The reader of our output has gone: no error worth a word.
const BROKEN_PIPE: Failure = Failure { exit: Exit::Signal(SIGPIPE), message: None, hint: None };

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error.os_error() {
            Some(cause) if cause.kind() == io::ErrorKind::BrokenPipe => BROKEN_PIPE,
            _ => Self::failed(error.to_string()),
        }
    }
}

impl From<io::Error> for Failure {
    /// Of an error while writing to standard output.
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => BROKEN_PIPE,
            _ => Self::failed(format!("cannot write to standard output: {error}")),
        }
    }
}
