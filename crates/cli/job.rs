//! Work that takes long: its progress is shown, and a signal ends it.

use std::sync::Arc;

use diskmill::convert::Monitor;
use diskmill::{Error, Kind};

use crate::args::ProgressArgs;
use crate::exit::{Exit, Failure};
use crate::progress::Progress;
use crate::signals::Watch;

/// Does `work`. Standard output belongs to the result if `stdout_taken`. A failure ends the program with what `exit` says of it,
/// or by the signal that cancelled the work.
pub(crate) fn run<T>(
    args: &ProgressArgs,
    stdout_taken: bool,
    exit: impl FnOnce(&Error) -> Exit,
    work: impl FnOnce(&Monitor) -> Result<T, Error>,
) -> Result<T, Failure> {
    let monitor = Arc::new(Monitor::new());
    let watch = Watch::start(&monitor, false)?;
    let progress = Progress::start(args, stdout_taken, &monitor);
    let result = work(&monitor);
    progress.finish(result.is_ok());
    result.map_err(|error| match watch.received() {
        Some(signal) if error.kind() == Kind::Cancelled => Failure::signal(signal, "interrupted"),
        _ => {
            let exit = exit(&error);
            Failure::from(error).or_exit(exit)
        }
    })
}
