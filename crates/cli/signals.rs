//! Signals, taken by a thread of their own: the first one cancels, a second one ends the program at once.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use diskmill::convert::Monitor;
use diskmill::{is_ignored, unlink_all_pending};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGXFSZ};
use signal_hook::iterator::{Handle, Signals};

use crate::exit::Exit;
use crate::progress::qemu_line;

/// Watches for signals until it is dropped.
pub(crate) struct Watch {
    handle: Handle,
    received: Arc<AtomicI32>,
}

impl Watch {
    /// Lets signals cancel what `monitor` watches. `at_once`: a signal ends the program without waiting for the work to
    /// stop, which may hang in a pipe.
    pub(crate) fn start(monitor: &Arc<Monitor>, at_once: bool) -> io::Result<Self> {
        let mut signals = Signals::new(ending_signals().chain([SIGUSR1]))?;
        let watch = Self { handle: signals.handle(), received: Arc::default() };
        let (monitor, received) = (Arc::clone(monitor), Arc::clone(&watch.received));
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in &mut signals {
                if signal == SIGUSR1 {
                    eprintln!("{}", qemu_line(monitor.done(), monitor.total()));
                } else if received.swap(signal, Relaxed) == 0 && !at_once {
                    monitor.cancel();
                } else {
                    unlink_all_pending();
                    eprintln!("diskmill: interrupted");
                    std::process::exit(Exit::Signal(signal).code().into());
                }
            }
        })?;
        Ok(watch)
    }

    /// A signal ends the program at once, and removes files that have no names yet: for work that nobody watches.
    pub(crate) fn ending() -> io::Result<Self> {
        Self::start(&Arc::default(), true)
    }

    /// Calls `stop` at the first signal; the next one ends the program at once.
    pub(crate) fn start_with(stop: impl Fn() + Send + 'static) -> io::Result<Self> {
        let mut signals = Signals::new(ending_signals())?;
        let watch = Self { handle: signals.handle(), received: Arc::default() };
        let received = Arc::clone(&watch.received);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in &mut signals {
                if received.swap(signal, Relaxed) != 0 {
                    std::process::exit(Exit::Signal(signal).code().into());
                }
                stop();
            }
        })?;
        Ok(watch)
    }

    /// The signal that came.
    pub(crate) fn received(&self) -> Option<i32> {
        Some(self.received.load(Relaxed)).filter(|&signal| signal != 0)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.handle.close();
    }
}

/// Lets a write behind the limit for the size of files fail, as one to a full disk does, where the signal for it would
/// end the program. It is caught, not ignored: programs that are started have it as it was.
pub(crate) fn outlive_size_limit() {
    if !is_ignored(SIGXFSZ) {
        // Without it the signal ends the program, as before.
        let _ = signal_hook::flag::register(SIGXFSZ, Arc::default());
    }
}

/// The signals that end us. `nohup` and shells that start a job in the background mean what they set.
pub(crate) fn ending_signals() -> impl Iterator<Item = i32> {
    [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal))
}
