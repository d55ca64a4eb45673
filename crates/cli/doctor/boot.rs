//! The appliance, started for once.

use std::time::Instant;

use diskmill_guestfs::{Disk, Session};

use super::report::{Check, Topic};
use crate::exit::Failure;
use crate::fs::settings::SettingsArgs;
use crate::fs::watch::Watch;

/// Bytes of the disk that the appliance is given: it wants one.
const DISK: u64 = 1 << 20;

pub(super) fn boot(args: &SettingsArgs) -> Check {
    match timed(args) {
        Ok(found) => Check::ok(Topic::Boot, found),
        Err(failure) => Check::problem(
            Topic::Boot,
            failure.message.unwrap_or_else(|| "interrupted".to_owned()),
            "see the other findings; LIBGUESTFS_DEBUG=1 shows what the appliance says",
        ),
    }
}

fn timed(args: &SettingsArgs) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::failed(format!("cannot make a disk: {error}"));
    let disk = tempfile::NamedTempFile::new().map_err(failed)?;
    disk.as_file().set_len(DISK).map_err(failed)?;
    let watch = Watch::start(false)?;
    let options = watch.options(args, DISK)?;
    let emulated = options.settings.forces_emulation();
    let start = Instant::now();
    let session =
        Session::open(&[Disk::file(disk.path(), "raw")], options).map_err(|error| watch.failure(error))?;
    let time = start.elapsed();
    watch.clear();
    session.close().map_err(|error| watch.failure(error))?;
    let how = if emulated { ", emulated" } else { "" };
    Ok(format!("the appliance starts in {:.1} s{how}", time.as_secs_f64()))
}
