//! What happens beside a session: signals that end it, and progress that is shown.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use diskmill::unlink_all_pending;
use diskmill_guestfs::{Builder, Cancel, Error, Event, Listener, Options, Settings, WatchdogCommand};
use indicatif::{ProgressBar, ProgressStyle};
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::iterator::Signals;

use super::failure::{cancelled, failure};
use super::settings::{SettingsArgs, asked_for, settings};
use crate::exit::{Exit, Failure};
use crate::signals::ending_signals;

/// The hidden subcommand under which this program looks after guestfish.
pub(crate) const KEEPER: &str = "guestfs-keeper";

/// After how long a start that says nothing is remarked upon.
const LONG: Duration = Duration::from_secs(5);

static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// The signal that came.
pub(crate) fn received() -> Option<i32> {
    Some(RECEIVED.load(Relaxed)).filter(|&signal| signal != 0)
}

/// Watches for signals, for a child that is to be told of them.
pub(crate) fn install() -> Result<(), Failure> {
    cancel().map(drop)
}

/// Reads, and ends with an error when a signal comes: whoever writes may have nothing to say.
pub(crate) struct Interruptible {
    file: File,
    cancel: Cancel,
}

impl Interruptible {
    pub(crate) fn new(file: File) -> Result<Self, Failure> {
        Ok(Self { file, cancel: cancel()? })
    }
}

impl Read for Interruptible {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let mut fds = [PollFd::new(&self.cancel, PollFlags::IN), PollFd::new(&self.file, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if fds.first().is_some_and(|cancelled| !cancelled.revents().is_empty()) => {
                Err(io::Error::other("interrupted"))
            }
            Ok(_) => self.file.read(buf),
            Err(error) => Err(error.into()),
        }
    }
}

/// Standard input, without a buffer that would hide from poll what is there.
pub(crate) fn stdin() -> Result<Interruptible, Failure> {
    let file = io::stdin().as_fd().try_clone_to_owned();
    Interruptible::new(File::from(file.map_err(|error| Failure::failed(format!("standard input: {error}")))?))
}

/// Cancels every session at the first signal and ends the program at the second.
fn cancel() -> Result<Cancel, Failure> {
    static CANCEL: OnceLock<Cancel> = OnceLock::new();
    static STARTING: Mutex<()> = Mutex::new(());
    let _starting = STARTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(cancel) = CANCEL.get() {
        return Ok(cancel.clone());
    }
    let failed = |error: std::io::Error| Failure::failed(format!("cannot watch for signals: {error}"));
    let cancel = Cancel::new().map_err(failed)?;
    let mut signals = Signals::new(ending_signals()).map_err(failed)?;
    let theirs = cancel.clone();
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in &mut signals {
                if RECEIVED.swap(signal, Relaxed) == 0 {
                    theirs.cancel();
                } else {
                    unlink_all_pending();
                    // The keeper sees us end, and ends the appliance.
                    eprintln!("diskmill: interrupted");
                    std::process::exit(Exit::Signal(signal).code().into());
                }
            }
        })
        .map_err(failed)?;
    Ok(CANCEL.get_or_init(|| cancel).clone())
}

/// A session's cancel and its progress.
pub(crate) struct Watch {
    cancel: Cancel,
    bar: ProgressBar,
    quiet: bool,
    /// Dropped when the start is over.
    starting: Mutex<Option<Sender<()>>>,
}

impl Watch {
    pub(crate) fn start(quiet: bool) -> Result<Self, Failure> {
        // Draws nothing where standard error is no terminal.
        let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
            bar.set_style(style);
        }
        Ok(Self { cancel: cancel()?, bar, quiet, starting: Mutex::default() })
    }

    /// The options of a session that runs already: of the settings only the time limit of calls counts.
    pub(crate) fn attach_options(&self, args: &SettingsArgs) -> Result<Options, Failure> {
        let (settings, _) = asked_for(args)?;
        let mut options =
            Options::new(WatchdogCommand::this_program([KEEPER])).map_err(|error| failure(&error))?;
        options.settings.call_timeout = settings.call_timeout;
        options.cancel = self.cancel.clone();
        options.listener = Some(self.listener());
        Ok(options)
    }

    /// The options of a session on an image of `size` bytes that is watched.
    pub(crate) fn options(&self, args: &SettingsArgs, size: u64) -> Result<Options, Failure> {
        let (settings, _) = settings(args, size)?;
        let mut options =
            Options::new(WatchdogCommand::this_program([KEEPER])).map_err(|error| failure(&error))?;
        options.settings = settings;
        options.cancel = self.cancel.clone();
        options.listener = Some(self.listener());
        self.remark_when_long(&options.settings);
        Ok(options)
    }

    /// Says, once, why nothing happens if the start takes [`LONG`].
    fn remark_when_long(&self, settings: &Settings) {
        if self.quiet {
            return;
        }
        let (starting, over) = mpsc::channel();
        *self.starting.lock().unwrap_or_else(PoisonError::into_inner) = Some(starting);
        let (bar, settings) = (self.bar.clone(), settings.clone());
        std::thread::spawn(move || {
            if over.recv_timeout(LONG) == Err(RecvTimeoutError::Timeout)
                && let Some(text) = why_long(&settings, !bar.is_hidden())
                && !REMARKED.swap(true, Relaxed)
            {
                bar.suspend(|| eprintln!("diskmill: {text}"));
            }
        });
    }

    fn listener(&self) -> Listener {
        let bar = self.bar.clone();
        bar.enable_steady_tick(Duration::from_millis(120));
        Arc::new(move |event| match event {
            Event::Step(step) => bar.set_message(step.to_owned()),
            Event::Progress { done, total } => {
                let percent = u128::from(done) * 100 / u128::from(total.max(1));
                let step = bar.message();
                let step = step.split_once(" (").map_or(step.as_str(), |(step, _)| step);
                bar.set_message(format!("{step} ({percent}%)"));
            }
            Event::Message(text) => bar.suspend(|| eprintln!("{}", crate::names::shown(text.trim_end()))),
            _ => {}
        })
    }

    /// Takes the progress off the terminal.
    pub(crate) fn clear(&self) {
        self.starting.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.bar.finish_and_clear();
    }

    /// The program's end for an error.
    pub(crate) fn failure(&self, error: Error) -> Failure {
        self.clear();
        cancelled(&error).unwrap_or_else(|| failure(&error))
    }
}

/// Whether the remark was made: with several images once is enough.
static REMARKED: AtomicBool = AtomicBool::new(false);

/// Why a start takes long. Where the progress is `shown`, only what it cannot show.
fn why_long(settings: &Settings, shown: bool) -> Option<String> {
    match Builder::find(settings).filter(|_| settings.appliance.is_none()) {
        Some(builder) if !builder.is_ours() => Some(format!("waiting: {builder}")),
        _ if shown => None,
        Some(_) => Some("the appliance is being built, once for all later commands".to_owned()),
        None if settings.forces_emulation() => {
            Some("the appliance is starting; emulated, that takes 5 to 30 s".to_owned())
        }
        None => Some("the appliance is starting".to_owned()),
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.clear();
    }
}
