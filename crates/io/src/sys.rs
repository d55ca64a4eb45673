//! What the modules share of the system interface.

use std::io;

/// Repeats a system call that answers −1 with `EINTR`.
pub(crate) fn retry(mut call: impl FnMut() -> i64) -> io::Result<u64> {
    loop {
        match u64::try_from(call()) {
            Ok(value) => return Ok(value),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Repeats an operation of the standard library that fails with `Interrupted`.
pub(crate) fn uninterrupted<T>(mut op: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match op() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// An error of kind `Unsupported` that keeps the system's words.
pub(crate) fn unsupported(what: &str, error: &io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("{what}: {}", describe(error)))
}

/// An error of kind `InvalidInput`.
pub(crate) fn invalid(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message.into())
}

/// A file offset or length for the kernel.
///
/// # Errors
/// `InvalidInput` above 2^63 − 1, the largest file offset.
pub(crate) fn offset(value: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(value)
        .map_err(|_| invalid(format!("offset {value} is beyond the largest file offset (2^63-1)")))
}

/// The end of a range.
///
/// # Errors
/// `InvalidInput` above 2^63 − 1.
pub(crate) fn range_end(at: u64, len: u64) -> io::Result<u64> {
    let end =
        at.checked_add(len).ok_or_else(|| invalid(format!("range of {len} bytes at {at} overflows")))?;
    offset(end)?;
    Ok(end)
}

/// The system's words and the error's symbol: `Operation not permitted (EPERM)`.
pub(crate) fn describe(error: &io::Error) -> String {
    let Some(code) = error.raw_os_error() else { return error.to_string() };
    let text = error.to_string();
    let words = text.split(" (os error").next().unwrap_or(&text);
    match symbol(code) {
        Some(symbol) => format!("{words} ({symbol})"),
        None => format!("{words} (errno {code})"),
    }
}

fn symbol(code: i32) -> Option<&'static str> {
    Some(match code {
        libc::EPERM => "EPERM",
        libc::ENOENT => "ENOENT",
        libc::EIO => "EIO",
        libc::EBADF => "EBADF",
        libc::EAGAIN => "EAGAIN",
        libc::ENOMEM => "ENOMEM",
        libc::EACCES => "EACCES",
        libc::EFAULT => "EFAULT",
        libc::EBUSY => "EBUSY",
        libc::EXDEV => "EXDEV",
        libc::ENODEV => "ENODEV",
        libc::EINVAL => "EINVAL",
        libc::ENFILE => "ENFILE",
        libc::EMFILE => "EMFILE",
        libc::ENOTTY => "ENOTTY",
        libc::ETXTBSY => "ETXTBSY",
        libc::EFBIG => "EFBIG",
        libc::ENOSPC => "ENOSPC",
        libc::EROFS => "EROFS",
        libc::ENOLCK => "ENOLCK",
        libc::ENOSYS => "ENOSYS",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        _ => return None,
    })
}
