use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use diskmill_format::{FormatError, Problem};
use diskmill_io::LockError;

/// `EMFILE` of Linux on all architectures: the process has too many open files.
const EMFILE: i32 = 24;

/// What kind of failure an [`Error`] is, for callers that act on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The operating system refused or failed.
    Io,
    /// The file is of another format than the one asked for.
    NotThisFormat,
    /// The image contradicts its format: damaged, truncated or forged.
    Corrupt,
    /// The image or the request is valid but not supported.
    Unsupported,
    /// The image asks for more than [`Limits`](crate::Limits) allow.
    Limit,
    /// The image names a file that [`OpenPolicy`](crate::OpenPolicy) does not allow.
    Denied,
    /// The request contradicts itself or the image.
    Invalid,
    /// The image is in use by another process.
    Busy,
    /// The caller cancelled.
    Cancelled,
}

/// An error: what went wrong, in which file and structure, and what can be done about it.
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    path: Option<PathBuf>,
    structure: Option<String>,
    offset: Option<u64>,
    message: String,
    hint: Option<String>,
    source: Option<io::Error>,
}

// A result with this crate's [`Error`].
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` with a message.
    #[must_use]
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            path: None,
            structure: None,
            offset: None,
            message: shown(message),
            hint: None,
            source: None,
        }))
    }

    /// A lock that could not be had.
    pub(crate) fn lock(error: LockError) -> Self {
        match error {
            LockError::Io(error) => Self::io("cannot lock", error),
            conflict @ LockError::Conflict { .. } => Self::new(Kind::Busy, conflict.to_string()),
        }
    }

    pub(crate) fn io(doing: impl Into<String>, source: io::Error) -> Self {
        let mut error = Self::new(Kind::Io, doing);
        if source.raw_os_error() == Some(EMFILE) {
            error =
                error.hint("`ulimit -n` sets how many files may be open: each extent of a split disk is one");
        }
        error.0.source = Some(source);
        error
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, message)
    }

    pub(crate) fn unsupported(message: impl Into<String>) -> Self {
        Self::new(Kind::Unsupported, format!("{} is not supported", message.into()))
    }

    pub(crate) fn corrupt(
        structure: impl Into<String>,
        offset: Option<u64>,
        message: impl Into<String>,
    ) -> Self {
        let mut error = Self::new(Kind::Corrupt, message);
        error.0.structure = Some(shown(structure));
        error.0.offset = offset;
        error
    }

    pub(crate) fn cancelled() -> Self {
        Self::new(Kind::Cancelled, "cancelled")
    }

    /// The same error, said of the file at `path`, unless it names one already.
    #[must_use]
    pub(crate) fn of(mut self, path: &Path) -> Self {
        self.0.path.get_or_insert_with(|| path.to_owned());
        self
    }

    /// What to do about it. Commands stand there without the program's name: it has two.
    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| shown(hint));
        self
    }

    #[must_use]
    pub(crate) fn within(mut self, structure: impl Into<String>, offset: u64) -> Self {
        self.0.structure.get_or_insert_with(|| shown(structure));
        self.0.offset.get_or_insert(offset);
        self
    }

    /// The kind of failure.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// What went wrong, without where and without a hint.
    #[must_use]
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The file that the error is about.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The structure of the image that is wrong, such as `L2 table 17, entry 3`.
    #[must_use]
    pub fn structure(&self) -> Option<&str> {
        self.0.structure.as_deref()
    }

    /// Whether a passphrase that fits is all that lacks.
    #[must_use]
    pub fn lacks_passphrase(&self) -> bool {
        self.kind() == Kind::Denied && matches!(self.structure(), Some("LUKS header" | "AES encryption"))
    }

    /// The offset in the file, in bytes, at which that structure stands.
    #[must_use]
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The operating system's error, if it was the cause.
    #[must_use]
    pub fn os_error(&self) -> Option<&io::Error> {
        self.0.source.as_ref()
    }
}

impl From<FormatError> for Error {
    fn from(error: FormatError) -> Self {
        let kind = match error.problem {
            Problem::NotThisFormat => Kind::NotThisFormat,
            Problem::Corrupt => Kind::Corrupt,
            Problem::Limit => Kind::Limit,
            _ => Kind::Unsupported,
        };
        let message = match kind {
            Kind::Unsupported => format!("not supported: {}", error.message),
            _ => error.message,
        };
        let mut converted = Self::new(kind, message);
        converted.0.structure = Some(shown(error.structure));
        converted.0.offset = error.offset;
        converted
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { path, structure, offset, message, hint, source, .. } = &*self.0;
        if let Some(path) = path {
            // Debug form: names from an image may hold control characters.
            write!(f, "{path:?}: ")?;
        }
        if let Some(structure) = structure {
            f.write_str(structure)?;
            if let Some(offset) = offset {
                write!(f, " at offset {offset:#x}")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(message)?;
        if let Some(source) = source {
            write!(f, ": {}", escaped(&without_os_codes(&source.to_string())))?;
        }
        if let Some(hint) = hint {
            write!(f, " ({hint})")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `text` with control characters escaped: a name in an image must not drive the terminal or forge lines.
#[must_use]
pub fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(char::is_control) {
        return Cow::Borrowed(text);
    }
    let escape = |char: char| if char.is_control() { char.escape_default().to_string() } else { char.into() };
    text.chars().map(escape).collect::<String>().into()
}

/// A part of an error as it is kept: messages quote names from images, and have no control characters of their own.
fn shown(text: impl Into<String>) -> String {
    let text = text.into();
    match escaped(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(escaped) => escaped,
    }
}

/// `text` without the numbers that Rust puts behind the system's words: "… (os error 2)".
#[must_use]
pub fn without_os_codes(text: &str) -> String {
    const CODE: &str = " (os error ";
    let mut parts = text.split(CODE);
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |kept, part| match part.split_once(')') {
        Some((code, rest)) if code.bytes().all(|byte| byte.is_ascii_digit()) => kept + rest,
        _ => kept + CODE + part,
    })
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_nothing_else() {
        assert_eq!(escaped("a b\\ü\u{1f600}"), "a b\\ü\u{1f600}");
        assert_eq!(escaped("a\u{1b}[31m\n\u{9b}"), "a\\u{1b}[31m\\n\\u{9b}");
    }

    #[test]
    fn no_part_of_an_error_has_control_characters() {
        const EVIL: &str = "\u{1b}[31m\r\n\u{9b}2Jx";
        let of_format = FormatError::corrupt(EVIL, EVIL);
        for error in [
            Error::corrupt(EVIL, None, EVIL).hint(EVIL),
            Error::new(Kind::Invalid, EVIL).within(EVIL, 7),
            Error::io(EVIL, io::Error::other(EVIL)).of(Path::new(EVIL)),
            of_format.into(),
        ] {
            assert!(!error.to_string().contains(char::is_control), "{error}");
            assert!(!error.message().contains(char::is_control));
        }
    }

    #[test]
    fn messages_have_the_systems_words_without_its_numbers() {
        let gone = || io::Error::from_raw_os_error(2);
        let error = Error::io("cannot open", gone()).hint("look");
        assert_eq!(error.to_string(), "cannot open: No such file or directory (look)");
        let both = format!("a: {} b: {}", gone(), gone());
        assert_eq!(without_os_codes(&both), "a: No such file or directory b: No such file or directory");
        for text in ["", "x (os error", "x (os error y)", "x (os error 1"] {
            assert_eq!(without_os_codes(text), text);
        }
    }
}
