use std::fmt;
use std::io;

/// What kind of failure an [`Error`] is, for callers that act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Kind {
    /// guestfish is not installed, or cannot be run.
    NotInstalled,
    /// The appliance could not be built or did not boot.
    Start,
    /// There is no kernel for the appliance, or none that may be read.
    NoKernel,
    /// guestfish's server does not take the version that `guestfish --version` tells. The session is over.
    Version,
    /// No answer, and no sign of life, within the time limit. The session is over.
    Timeout,
    /// The caller cancelled. The session is over, but for [`Session::tidy`](crate::Session::tidy).
    Cancelled,
    /// guestfish or its appliance ended in the middle of the work.
    Died,
    /// What guestfish sends is not its protocol.
    Protocol,
    /// The guest refused a command.
    Command,
    /// The file or device is not there (inside the guest).
    NotFound,
    /// The disk inside the guest is full.
    NoSpace,
    /// The file system inside the guest is mounted read-only.
    ReadOnly,
    /// An image, a session or the appliance's cache is in use by somebody else.
    Busy,
    /// The request cannot be put to guestfish.
    Invalid,
    /// The operating system refused or failed.
    Io,
}

impl Kind {
    /// Whether a session is of no more use after an error of this kind.
    #[must_use]
    pub fn is_fatal(self) -> bool {
        matches!(self, Self::Timeout | Self::Cancelled | Self::Died | Self::Protocol | Self::Version)
    }
}

/// An error: what went wrong and what can be done about it.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    message: String,
    hint: Option<String>,
    source: Option<io::Error>,
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` with a message.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), hint: None, source: None }))
    }

    /// A failure of the operating system while `doing` something.
    #[must_use]
    pub fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let mut error = Self::new(Kind::Io, doing);
        error.0.source = Some(source);
        error
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn protocol(message: impl Into<String>) -> Self {
        Self::new(Kind::Protocol, message)
    }

    /// The same error with the next step for the user, unless it has one.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// The same error, said of `what` (a disk, a command).
    #[must_use]
    pub fn of(mut self, what: impl fmt::Display) -> Self {
        self.0.message = format!("{what}: {}", self.0.message);
        self
    }

    /// The kind of failure.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The message without the hint and without the system's words.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The next step for the user, if there is one to name.
    #[must_use]
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The operating system's error, if it was the cause.
    #[must_use]
    pub fn os_error(&self) -> Option<&io::Error> {
        self.0.source.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(source) = &self.0.source {
            write!(f, ": {source}")?;
        }
        if let Some(hint) = &self.0.hint {
            write!(f, "; {hint}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|e| e as &(dyn std::error::Error + 'static))
    }
}
