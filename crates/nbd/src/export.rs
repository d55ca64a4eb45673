use std::fmt;
use std::io;

/// What a failed request is answered with (specification, "Error values").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorCode {
    /// `NBD_EPERM`: the export is read-only.
    Permission,
    /// `NBD_EIO`: the image is damaged, or the system failed.
    Io,
    /// `NBD_ENOMEM`.
    NoMemory,
    /// `NBD_EINVAL`: the request makes no sense.
    Invalid,
    /// `NBD_ENOSPC`: a write past the end of the disk, or more than the file system, a quota or a limit allows.
    NoSpace,
    /// `NBD_EOVERFLOW`: too long for one piece.
    Overflow,
    /// `NBD_ENOTSUP`.
    NotSupported,
}

impl ErrorCode {
    /// The number on the wire.
    pub(crate) const fn number(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
        }
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What the client is told.
    pub code: ErrorCode,
    /// For people; clients that take structured replies get it, too.
    pub message: String,
}

impl Failure {
    /// A failure with a message.
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    pub(crate) fn read_only() -> Self {
        Self::new(ErrorCode::Permission, "the export is read-only")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<diskmill::Error> for Failure {
    fn from(error: diskmill::Error) -> Self {
        let code = match error.kind() {
            diskmill::Kind::Invalid => ErrorCode::Invalid,
            diskmill::Kind::Unsupported => ErrorCode::NotSupported,
            diskmill::Kind::Io if error.os_error().is_some_and(is_full) => ErrorCode::NoSpace,
            _ => ErrorCode::Io,
        };
        Self::new(code, error.to_string())
    }
}

/// Whether it is `ENOSPC`, `EDQUOT` or `EFBIG`, which the specification wants told as one.
fn is_full(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// A run of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Bytes; never 0.
    pub len: u64,
    /// It is known to read as zeros and takes no space.
    pub hole: bool,
}

/// A disk that can be served.
pub trait Export: Send + Sync {
    /// Bytes in the disk; does not change.
    fn size(&self) -> u64;

    /// Whether [`Session`]s write. What is written by one of them must be seen by all.
    fn is_writable(&self) -> bool {
        false
    }

    /// For people, in lists of exports.
    fn description(&self) -> String {
        String::new()
    }

    /// The run that starts at `at`, which is below [`size`](Self::size): at most `max` bytes (`max` > 0).
    ///
    /// # Errors
    /// A [`Failure`] that the client is answered with.
    fn status(&self, at: u64, max: u64) -> Result<Run, Failure>;

    /// Access to the bytes. Each worker thread has its own.
    fn session(&self) -> Box<dyn Session + '_>;
}

/// One thread's access to an [`Export`]. Ranges lie within the disk.
///
/// The methods that write are called only if the export [is writable](Export::is_writable).
pub trait Session {
    /// Fills `buf` with the bytes from `at` on.
    ///
    /// # Errors
    /// A [`Failure`] that the client is answered with; so do all methods.
    fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<(), Failure>;

    /// Writes `buf` at `at`.
    ///
    /// # Errors
    /// As all methods.
    fn write_at(&mut self, buf: &[u8], at: u64) -> Result<(), Failure> {
        let _ = (buf, at);
        Err(Failure::read_only())
    }

    /// Makes a range read as zeros; `keep_allocated`: later writes to it must not fail for want of space.
    ///
    /// # Errors
    /// As all methods.
    fn write_zeroes(&mut self, at: u64, len: u64, keep_allocated: bool) -> Result<(), Failure> {
        let _ = (at, len, keep_allocated);
        Err(Failure::read_only())
    }

    /// Gives a range back: it may read as anything.
    ///
    /// # Errors
    /// As all methods.
    fn discard(&mut self, at: u64, len: u64) -> Result<(), Failure> {
        let _ = (at, len);
        Err(Failure::read_only())
    }

    /// Makes durable what any session has written.
    ///
    /// # Errors
    /// As all methods.
    fn flush(&mut self) -> Result<(), Failure> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn a_quota_and_a_limit_are_no_space() {
        for (errno, full) in
            [(Errno::NOSPC, true), (Errno::DQUOT, true), (Errno::FBIG, true), (Errno::IO, false)]
        {
            assert_eq!(is_full(&errno.into()), full, "{errno}");
        }
    }
}
