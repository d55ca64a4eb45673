//! Processes: told apart by number and start time, and ended with all that they started.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal};

/// A process by number and start time, so that a number that was given away again is not taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct ProcessId {
    pub(crate) pid: i32,
    /// In clock ticks since the machine started (`/proc/PID/stat`, field 22).
    pub(crate) started: u64,
}

impl ProcessId {
    /// The process that has the number `pid` now.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        Some(Self { pid, started: Stat::of(pid)?.started })
    }

    /// Whether it is still running (a zombie is not).
    pub(crate) fn is_alive(self) -> bool {
        Stat::of(self.pid).is_some_and(|stat| stat.started == self.started && !stat.is_zombie())
    }

    /// Kills it, if it is still the same.
    pub(crate) fn kill(self) {
        self.signal(Signal::KILL);
    }

    /// Sends a signal, if it is still the same.
    pub(crate) fn signal(self, signal: Signal) {
        let Some(pid) = Pid::from_raw(self.pid) else { return };
        // The descriptor holds on to the process; only then is the start time worth looking at.
        if let Ok(fd) = pidfd_open(pid, PidfdFlags::empty())
            && self.is_alive()
        {
            let _ = pidfd_send_signal(&fd, signal);
        }
    }

    /// Waits until it has ended; `false` if it has not after `limit`.
    pub(crate) fn wait_gone(self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while self.is_alive() {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// What `/proc/PID/stat` tells.
struct Stat {
    state: u8,
    parent: i32,
    started: u64,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
        // The name, in brackets, may hold anything.
        let after = text.iter().rposition(|&b| b == b')')?.checked_add(2)?;
        let fields = std::str::from_utf8(text.get(after..)?).ok()?;
        let mut fields = fields.split_ascii_whitespace();
        let state = *fields.next()?.as_bytes().first()?;
        let parent = fields.next()?.parse().ok()?;
        // Field 22 of proc(5); the parent is field 4.
        let started = fields.nth(17)?.parse().ok()?;
        Some(Self { state, parent, started })
    }

    fn is_zombie(&self) -> bool {
        matches!(self.state, b'Z' | b'X')
    }
}

/// The processes of ours whose environment has exactly this variable, as `NAME=value`.
pub(crate) fn with_variable(variable: &[u8]) -> Vec<ProcessId> {
    let has = |pid: &i32| {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        environment.split(|&b| b == 0).any(|found| found == variable)
    };
    all().filter(has).filter_map(ProcessId::of).collect()
}

fn all() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The children of the process `parent`.
pub(crate) fn children_of(parent: i32) -> Vec<i32> {
    all().filter(|&pid| Stat::of(pid).is_some_and(|stat| stat.parent == parent)).collect()
}

/// The processes that `ancestor` has started, and those have, as one look at all processes shows them.
pub(crate) fn descendants_of(ancestor: i32) -> Vec<ProcessId> {
    let mut others: Vec<(i32, ProcessId)> = all()
        .filter_map(|pid| Stat::of(pid).map(|stat| (stat.parent, ProcessId { pid, started: stat.started })))
        .collect();
    let mut parents = vec![ancestor];
    let mut found = Vec::new();
    while let Some(parent) = parents.pop() {
        for (_, process) in others.extract_if(.., |(of, _)| *of == parent) {
            parents.push(process.pid);
            found.push(process);
        }
    }
    found
}

/// Whether `ancestor` has started the process `pid`, itself or by others.
pub(crate) fn descends(mut pid: i32, ancestor: i32) -> bool {
    while pid > 1 {
        match Stat::of(pid) {
            Some(stat) if stat.parent == ancestor => return true,
            Some(stat) => pid = stat.parent,
            None => break,
        }
    }
    false
}

/// How long we wait for what was killed before we look for what was started meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// Kills all descendants of this process and waits until they are gone. It must be their subreaper: whatever loses its
/// parent becomes our child then, so that none gets away. `false` if some are left after `limit` (a process that waits for
/// a disk cannot be killed).
pub(crate) fn end_all_descendants(limit: Duration) -> bool {
    let own = rustix::process::getpid().as_raw_nonzero().get();
    let end = Instant::now() + limit;
    while reap() {
        if Instant::now() >= end {
            return false;
        }
        // All at once: the appliance need not wait for guestfish to end.
        descendants_of(own).into_iter().for_each(ProcessId::kill);
        let again = Instant::now() + LOOK_AGAIN;
        while reap() && Instant::now() < again {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    true
}

/// Waits for children that have ended already. Whether others are left.
pub(crate) fn reap() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_time_too() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        assert!(id.is_alive() && children_of(std::process::id() as i32).contains(&id.pid));
        let own = std::process::id() as i32;
        assert!(descends(id.pid, own) && !descends(own, id.pid) && !descends(1, own));
        let other = ProcessId { started: id.started + 1, ..id };
        assert!(!other.is_alive());
        other.kill();
        assert!(id.is_alive());
        id.kill();
        assert!(id.wait_gone(Duration::from_secs(5)));
        child.wait().unwrap();
        assert!(ProcessId::of(id.pid).is_none());
    }
}
