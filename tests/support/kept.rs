//! A program whose sessions are kept, and what is left of them.

#[path = "guestfs.rs"]
mod guestfs;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill_testkit::{Cmd, require_program};
use guestfs::Fs;
use rustix::process::{Pid, Signal, kill_process};

/// The program in a folder with an image; its sessions end with it.
pub(crate) struct Kept {
    pub(crate) dir: PathBuf,
    fs: Fs,
}

impl Kept {
    /// With the prepared appliance that tests share.
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        Self::with(dir, Fs::new(dir)?)
    }

    /// With the appliance that libguestfs makes itself.
    pub(crate) fn plain(dir: &Path) -> Option<Self> {
        Self::with(dir, Fs::plain(dir)?)
    }

    fn with(dir: &Path, fs: Fs) -> Option<Self> {
        for program in ["sfdisk", "mke2fs", "debugfs"] {
            require_program(program)?;
        }
        fs::create_dir_all(dir.join("root/etc")).unwrap();
        fs::write(dir.join("root/etc/hostname"), "kept\n").unwrap();
        for (target, link) in [("/etc", "s2/etc"), ("/var", "s2/var")] {
            fs::create_dir_all(dir.join("root/s2")).unwrap();
            fs::create_dir_all(dir.join("root/var")).unwrap();
            std::os::unix::fs::symlink(target, dir.join("root").join(link)).unwrap();
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.join("root/s2/fifo"), rustix::fs::Mode::RWXU).unwrap();
        fs::write(dir.join("root/linked"), "linked").unwrap();
        fs::hard_link(dir.join("root/linked"), dir.join("root/other")).unwrap();
        File::create(dir.join("disk.raw")).unwrap().set_len(64 << 20).unwrap();
        let table = b"label: gpt\nstart=2048, type=linux\n".to_vec();
        let _ = Cmd::new("sfdisk").args(["-q", "disk.raw"]).stdin_bytes(table).dir(dir).ok();
        let words = ["-q", "-t", "ext4", "-d", "root", "-E", "offset=1048576", "disk.raw", "60M"];
        let _ = Cmd::new("mke2fs").args(words).dir(dir).ok();
        Some(Self { dir: dir.to_owned(), fs })
    }

    pub(crate) fn run(&self, words: &[&str]) -> Cmd {
        self.fs.program(words).limit(Duration::from_secs(300))
    }

    pub(crate) fn list(&self) -> Vec<serde_json::Value> {
        self.run(&["session", "list", "--json"]).ok().json().as_array().unwrap().clone()
    }

    /// See [`Fs::processes`].
    pub(crate) fn processes(&self, word: &str) -> Vec<i32> {
        self.fs.processes(word)
    }

    pub(crate) fn kill(&self, word: &str) {
        let found = self.processes(word);
        assert!(!found.is_empty(), "no process of {word}");
        for pid in found {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }

    /// Has the appliances go on no more.
    pub(crate) fn stop_qemu(&self) {
        for pid in self.processes("-kernel") {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
        }
    }

    /// Waits until nothing of a session is left.
    pub(crate) fn assert_gone(&self, limit: Duration) {
        let end = Instant::now() + limit;
        loop {
            let left = [self.processes("guestf"), self.processes("qemu-system")].concat();
            let sockets = self.sockets();
            // Which sweeps.
            let listed = self.list();
            if left.is_empty() && sockets.is_empty() && listed.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "still there: {left:?} {sockets:?} {listed:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
        let folders = fs::read_dir(self.fs.run_dir().join("diskmill"));
        assert_eq!(folders.map_or(0, Iterator::count), 0);
    }

    /// The sockets of images' servers, and the folders that some of them have.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.fs.run_dir().join("diskmill-nbd")).into_iter().flatten().flatten();
        entries.filter(|entry| !entry.file_type().unwrap().is_file()).map(|entry| entry.path()).collect()
    }
}
