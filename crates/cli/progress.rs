//! Progress of a long job, drawn by a thread that polls its [`Monitor`].

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use diskmill::convert::Monitor;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::args::{ProgressArgs, ProgressMode};

/// Who reads the progress, and where.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Style {
    Bar,
    Json,
    Qemu { on_stderr: bool },
}

impl Style {
    fn choose(args: &ProgressArgs, stdout_taken: bool) -> Option<Self> {
        let terminal = || io::stderr().is_terminal();
        let qemu = Self::Qemu { on_stderr: stdout_taken };
        match args.mode.unwrap_or(ProgressMode::Auto) {
            _ if args.quiet => None,
            ProgressMode::Auto if terminal() => Some(Self::Bar),
            ProgressMode::Auto => args.show.then_some(qemu),
            ProgressMode::Bar => Some(Self::Bar),
            ProgressMode::Json => Some(Self::Json),
            ProgressMode::Qemu => Some(qemu),
            ProgressMode::None => None,
        }
    }
}

/// Shows progress until it is finished or dropped.
pub(crate) struct Progress(Option<(Sender<()>, JoinHandle<()>)>);

impl Progress {
    /// Begins to show what `monitor` sees. `stdout_taken`: standard output is for something else.
    pub(crate) fn start(args: &ProgressArgs, stdout_taken: bool, monitor: &Arc<Monitor>) -> Self {
        let Some(style) = Style::choose(args, stdout_taken) else { return Self(None) };
        let (sender, stop) = mpsc::channel();
        let view = View { style, monitor: Arc::clone(monitor), started: Instant::now() };
        // Without the thread there is no progress to see, which is no reason not to work.
        let spawned = std::thread::Builder::new().name("progress".to_owned()).spawn(move || view.run(&stop));
        Self(spawned.ok().map(|thread| (sender, thread)))
    }

    /// Shows the end of the job; `whole` if it was done to its end.
    pub(crate) fn finish(mut self, whole: bool) {
        self.stop(whole);
    }

    fn stop(&mut self, whole: bool) {
        let Some((sender, thread)) = self.0.take() else { return };
        if whole {
            let _ = sender.send(());
        }
        drop(sender);
        let _ = thread.join();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.stop(false);
    }
}

struct View {
    style: Style,
    monitor: Arc<Monitor>,
    started: Instant,
}

impl View {
    /// Runs until `stop` hangs up. A message before that says that the job is whole.
    fn run(&self, stop: &mpsc::Receiver<()>) {
        let until = |interval: u64| match stop.recv_timeout(Duration::from_millis(interval)) {
            Err(RecvTimeoutError::Timeout) => None,
            Ok(()) => Some(true),
            Err(RecvTimeoutError::Disconnected) => Some(false),
        };
        match self.style {
            Style::Bar => self.bar(|| until(80)),
            Style::Json => self.json(|| until(250)),
            Style::Qemu { on_stderr: true } => self.qemu(&mut io::stderr(), || until(100)),
            Style::Qemu { on_stderr: false } => self.qemu(&mut io::stdout(), || until(100)),
        }
    }

    fn bar(&self, end: impl Fn() -> Option<bool>) {
        const KNOWN: &str = "{percent:>3}% {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  ETA {eta}";
        const UNKNOWN: &str = "{spinner} {bytes}  {bytes_per_sec}  {elapsed}";
        let bar = ProgressBar::new(0);
        let mut template = "";
        let whole = loop {
            let wanted = if self.monitor.total() > 0 { KNOWN } else { UNKNOWN };
            if wanted != template {
                template = wanted;
                if let Ok(style) = ProgressStyle::with_template(template) {
                    bar.set_style(style);
                }
            }
            bar.set_length(self.monitor.total());
            bar.set_position(self.monitor.done());
            if let Some(whole) = end() {
                break whole;
            }
        };
        if whole {
            bar.set_length(self.monitor.total());
            bar.set_position(self.monitor.done());
            bar.finish();
        } else {
            bar.abandon();
        }
    }

    fn json(&self, end: impl Fn() -> Option<bool>) {
        loop {
            let ended = end();
            let line = json_line(self.monitor.done(), self.monitor.total(), self.started.elapsed());
            // One write per line, so that lines stay whole among other writers.
            let _ = io::stderr().write_all(format!("{line}\n").as_bytes());
            if ended.is_some() {
                return;
            }
        }
    }

    fn qemu(&self, out: &mut dyn Write, end: impl Fn() -> Option<bool>) {
        let mut shown = 0.0;
        let mut show = |percent: f64| {
            let _ = write!(out, "{}\r", qemu_percent(percent)).and_then(|()| out.flush());
        };
        show(shown);
        let whole = loop {
            if let Some(whole) = end() {
                break whole;
            }
            let now = percent(self.monitor.done(), self.monitor.total());
            if now >= shown + 1.0 && now < 100.0 {
                shown = now;
                show(now);
            }
        };
        if whole {
            show(100.0);
        }
        let _ = writeln!(out).and_then(|()| out.flush());
    }
}

/// 0 while the total is not known.
fn percent(done: u64, total: u64) -> f64 {
    if total == 0 { 0.0 } else { (done as f64 * 100.0 / total as f64).min(100.0) }
}

fn qemu_percent(percent: f64) -> String {
    format!("    ({percent:.2}/100%)")
}

/// The line that qemu-img prints, and importers look for.
pub(crate) fn qemu_line(done: u64, total: u64) -> String {
    qemu_percent(percent(done, total))
}

fn json_line(done: u64, total: u64, elapsed: Duration) -> serde_json::Value {
    let rate = done as f64 / elapsed.as_secs_f64().max(1e-3);
    let known = total > 0;
    let eta = (known && done > 0).then(|| (total.saturating_sub(done) as f64 / rate).round());
    json!({
        "done": done,
        "total": known.then_some(total),
        "percent": known.then(|| (percent(done, total) * 100.0).round() / 100.0),
        "bytes-per-second": rate as u64,
        "eta-seconds": eta.map(|eta| eta as u64),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_qemu_imgs() {
        assert_eq!(qemu_line(0, 0), "    (0.00/100%)");
        assert_eq!(qemu_line(4534, 10_000), "    (45.34/100%)");
        assert_eq!(qemu_line(7, 7), "    (100.00/100%)");
        assert_eq!(qemu_line(8, 7), "    (100.00/100%)");
        assert_eq!(qemu_line(u64::MAX / 2, u64::MAX), "    (50.00/100%)");
    }

    #[test]
    fn the_object_is_honest_about_what_is_not_known() {
        let line = json_line(1 << 20, 0, Duration::from_secs(1));
        let want =
            r#"{"done":1048576,"total":null,"percent":null,"bytes-per-second":1048576,"eta-seconds":null}"#;
        assert_eq!(line.to_string(), want);
        let line = json_line(25, 100, Duration::from_secs(5));
        let want = r#"{"done":25,"total":100,"percent":25.0,"bytes-per-second":5,"eta-seconds":15}"#;
        assert_eq!(line.to_string(), want);
        let line = json_line(0, 100, Duration::ZERO);
        let want = r#"{"done":0,"total":100,"percent":0.0,"bytes-per-second":0,"eta-seconds":null}"#;
        assert_eq!(line.to_string(), want);
    }

    #[test]
    fn asking_for_quiet_wins() {
        let args = |show, mode, quiet| ProgressArgs { show, mode, quiet };
        assert_eq!(Style::choose(&args(false, Some(ProgressMode::Json), true), false), None);
        assert_eq!(Style::choose(&args(true, None, true), false), None);
        let qemu = Style::choose(&args(false, Some(ProgressMode::Qemu), false), true);
        assert_eq!(qemu, Some(Style::Qemu { on_stderr: true }));
    }
}
