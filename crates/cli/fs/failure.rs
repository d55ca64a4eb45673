//! What becomes of a session's errors: the program's end, with the check that explains it.

use diskmill_guestfs::{Error, Kind};

use super::watch;
use crate::exit::Failure;

/// Whether the guest said no, and the session goes on.
pub(crate) fn guest_refused(error: &Error) -> bool {
    matches!(error.kind(), Kind::Command | Kind::NotFound | Kind::NoSpace | Kind::ReadOnly)
}

/// The program's end for an error of the session.
pub(crate) fn failure(error: &Error) -> Failure {
    if let Some(cause) = error.os_error().filter(|cause| cause.kind() == std::io::ErrorKind::BrokenPipe) {
        return Failure::from(std::io::Error::from(cause.kind()));
    }
    let mut message = error.to_string();
    let check = match error.kind() {
        Kind::NotInstalled | Kind::Version => Some("doctor guestfish"),
        Kind::NoKernel => Some("doctor kernel"),
        Kind::Timeout => Some("doctor kvm memory"),
        Kind::Start | Kind::Died => Some("doctor"),
        _ => None,
    };
    if let Some(check) = check.filter(|_| !message.contains("`diskmill doctor")) {
        message.push_str(&format!("; `diskmill {check}` tells what this machine lacks"));
    }
    Failure::failed(message)
}

/// The program's end for a session that a signal cancelled.
pub(crate) fn cancelled(error: &Error) -> Option<Failure> {
    let signal = watch::received().filter(|_| error.kind() == Kind::Cancelled)?;
    Some(Failure::signal(signal, "interrupted"))
}
