//! The appliance that supermin builds into a cache folder, and the lock that it holds meanwhile.

use std::fs::File;
use std::path::PathBuf;

use rustix::process::{Flock, FlockOffsetType, FlockType, fcntl_getlk, getpid};

use crate::place::uid;
use crate::process::descends;
use crate::{Error, Kind, Settings};

/// A process that holds the lock of the appliance's folder: until it lets go, no appliance starts that is not a fixed one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Builder {
    /// The file that is locked.
    pub lock: PathBuf,
    /// The process; `None` if it is outside of our process namespace.
    pub pid: Option<i32>,
}

impl Builder {
    /// Who builds an appliance for these settings right now, if anybody does. supermin(1), `--lock`, locks the file `lock`
    /// in [`Settings::appliance_cache`] by fcntl(2). Only looks: nobody has to wait for us.
    #[must_use]
    pub fn find(settings: &Settings) -> Option<Self> {
        let lock = settings.appliance_cache().join("lock");
        let file = File::open(&lock).ok()?;
        let whole = Flock {
            start: 0,
            length: 0,
            pid: None,
            typ: FlockType::WriteLock,
            offset_type: FlockOffsetType::Set,
        };
        let held = fcntl_getlk(&file, &whole).ok()??;
        Some(Self { lock, pid: held.pid.map(|pid| pid.as_raw_nonzero().get()) })
    }

    /// Whether it works for this program.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.pid.is_some_and(|pid| descends(pid, getpid().as_raw_nonzero().get()))
    }
}

impl std::fmt::Display for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("another program")?;
        if let Some(pid) = self.pid {
            write!(f, " (process {pid})")?;
        }
        write!(f, " is building the appliance: {} is locked", self.lock.display())
    }
}

impl Settings {
    /// The folder into which supermin builds the appliance (guestfs(3), "guestfs_set_cachedir").
    #[must_use]
    pub fn appliance_cache(&self) -> PathBuf {
        let var = || std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        let base = self.cache_dir.clone().or_else(var).unwrap_or_else(|| "/var/tmp".into());
        base.join(format!(".guestfs-{}", uid()))
    }

    /// What kept an appliance from starting in time.
    pub(crate) fn explain_late(&self, error: Error) -> Error {
        if error.kind() != Kind::Timeout {
            return error;
        }
        let builder = Builder::find(self).filter(|_| self.appliance.is_none());
        let late = Error::new(
            Kind::Timeout,
            format!("the appliance did not start within {} s", self.start_timeout.as_secs_f32()),
        );
        builder.map_or(late, |builder| {
            Error::new(Kind::Busy, builder.to_string()).hint(
                "wait until it is done, or end it if it hangs; `diskmill doctor cache` tells whether it still is",
            )
        })
    }
}
