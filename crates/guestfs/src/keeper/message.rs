//! What a session and its keeper say to each other: a line of JSON each.

use std::path::PathBuf;

use crate::kept::Keep;
use crate::place::Place;
use crate::process::{ProcessId, children_of};
use crate::{Kind, Settings};

/// The longest line, in bytes.
pub(crate) const MAX_LINE: usize = 1 << 20;

/// From the session to the keeper.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) enum Request {
    /// The first: start guestfish.
    Start {
        /// The settings.
        settings: Box<Settings>,
        /// Whether there is anything to be written back at the end.
        writable: bool,
    },
    /// Go on without this session until nobody has used the appliance for a while.
    Keep(Keep),
    /// End everything at once, writing nothing back: the appliance hangs.
    Kill,
}

/// From the keeper to the session.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) enum Reply {
    /// Something worth telling whoever waits.
    Note(String),
    /// guestfish listens.
    Ready(Server),
    /// The state is written, the session may go.
    Kept,
    /// It could not be done.
    Failed {
        /// The error's kind.
        kind: Kind,
        /// The error's message.
        message: String,
        /// The next step.
        hint: Option<String>,
    },
}

/// A guestfish that listens.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Server {
    /// Its process.
    pub(crate) process: ProcessId,
    /// Its socket.
    pub(crate) socket: PathBuf,
    /// Its version, which hello must repeat.
    pub(crate) version: String,
    /// The session's folders.
    pub(crate) place: Place,
}

impl Server {
    /// Kills it and its appliance. Its keeper sees that, and cleans up.
    pub(crate) fn kill(&self) {
        children_of(self.process.pid).into_iter().filter_map(ProcessId::of).for_each(ProcessId::kill);
        self.process.kill();
    }
}
