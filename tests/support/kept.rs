//! A program whose sessions are kept, and what is left of them.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use diskmill_testkit::{Cmd, Tool, require_program, skip};
use rustix::process::{Pid, Signal, kill_process};

/// The program in a folder with an image and run-time folders of its own; its sessions end with it.
pub(crate) struct Kept {
    pub(crate) dir: PathBuf,
}

impl Kept {
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        for program in ["guestfish", "qemu-system-x86_64", "sfdisk", "mke2fs", "debugfs"] {
            require_program(program)?;
        }
        let kernels = fs::read_dir("/boot").into_iter().flatten().flatten();
        if !kernels.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz")) {
            skip("no kernel in /boot for libguestfs' appliance");
            return None;
        }
        fs::create_dir(dir.join("run")).unwrap();
        fs::set_permissions(dir.join("run"), Permissions::from_mode(0o700)).unwrap();
        fs::create_dir_all(dir.join("root/etc")).unwrap();
        fs::write(dir.join("root/etc/hostname"), "kept\n").unwrap();
        File::create(dir.join("disk.raw")).unwrap().set_len(64 << 20).unwrap();
        let table = b"label: gpt\nstart=2048, type=linux\n".to_vec();
        let _ = Cmd::new("sfdisk").args(["-q", "disk.raw"]).stdin_bytes(table).dir(dir).ok();
        let words = ["-q", "-t", "ext4", "-d", "root", "-E", "offset=1048576", "disk.raw", "60M"];
        let _ = Cmd::new("mke2fs").args(words).dir(dir).ok();
        Some(Self { dir: dir.to_owned() })
    }

    pub(crate) fn run(&self, words: &[&str]) -> Cmd {
        let cmd = Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words);
        cmd.dir(&self.dir)
            .limit(Duration::from_secs(300))
            .env("LIBGUESTFS_BACKEND", "direct")
            .env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
            .env("XDG_RUNTIME_DIR", self.dir.join("run"))
    }

    pub(crate) fn list(&self) -> Vec<serde_json::Value> {
        self.run(&["session", "list", "--json"]).ok().json().as_array().unwrap().clone()
    }

    /// The processes of this folder's sessions whose command line has `word` in it.
    pub(crate) fn processes(&self, word: &str) -> Vec<i32> {
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let has = |pid: &i32| {
            let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let text = [read("cmdline"), read("environ")].concat();
            let ours = self.dir.join("run").to_string_lossy().into_owned();
            String::from_utf8_lossy(&text).contains(&ours)
                && String::from_utf8_lossy(&read("cmdline")).contains(word)
        };
        pids.filter(has).collect()
    }

    pub(crate) fn kill(&self, word: &str) {
        let found = self.processes(word);
        assert!(!found.is_empty(), "no process of {word}");
        for pid in found {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
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
        let folders = fs::read_dir(self.dir.join("run/diskmill"));
        assert_eq!(folders.map_or(0, Iterator::count), 0);
    }

    /// The sockets of images' servers, and the folders that some of them have.
    pub(crate) fn sockets(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.join("run/diskmill-nbd")).into_iter().flatten().flatten();
        entries.filter(|entry| !entry.file_type().unwrap().is_file()).map(|entry| entry.path()).collect()
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        for pid in [self.processes("guestf"), self.processes("qemu-system")].concat() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}
