use std::fmt;
use std::sync::Arc;

use crate::{Cancel, Error, Result, Settings, WatchdogCommand};

/// What a session tells while it works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The start has come to this.
    Step(&'a str),
    /// So much of the start or of a long command is done.
    Progress {
        /// In units of its own.
        done: u64,
        /// In the same units; never 0.
        total: u64,
    },
    /// What guestfish wrote to its standard error besides errors: warnings, and with `debug` or `trace` their output.
    Message(&'a str),
}

/// Hears events.
pub type Listener = Arc<dyn Fn(Event<'_>) + Send + Sync>;

/// How a session is opened.
#[derive(Clone)]
#[non_exhaustive]
pub struct Options {
    /// How the appliance is run.
    pub settings: Settings,
    /// The program that ends the appliance whatever becomes of us.
    pub watchdog: WatchdogCommand,
    /// Ends the session from another thread.
    pub cancel: Cancel,
    /// Hears what goes on.
    pub listener: Option<Listener>,
}

impl Options {
    /// The settings of the environment, and nobody who listens.
    ///
    /// # Errors
    /// `Io` when the process has too many open files; as [`Settings::from_env`].
    pub fn new(watchdog: WatchdogCommand) -> Result<Self> {
        let cancel = Cancel::new().map_err(|e| Error::io("cannot make an event descriptor", e))?;
        Ok(Self { settings: Settings::from_env()?, watchdog, cancel, listener: None })
    }

    pub(crate) fn tell(&self, event: Event<'_>) {
        if let Some(listener) = &self.listener {
            listener(event);
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Options").field("settings", &self.settings).finish_non_exhaustive()
    }
}
