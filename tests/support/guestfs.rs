//! What the tests of `diskmill fs` share.

use std::path::Path;
use std::time::Duration;

use diskmill_testkit::{Cmd, Outcome, Tool, require_program, skip};

/// The program with an appliance that boots everywhere: KVM may be there and not work.
pub(crate) struct Fs {
    dir: std::path::PathBuf,
}

impl Fs {
    /// Works in this folder. `None`, and a line that says so, without libguestfs.
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        require_program("guestfish")?;
        let kernels = std::fs::read_dir("/boot").into_iter().flatten().flatten();
        if !kernels.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz")) {
            skip("no kernel in /boot for libguestfs' appliance");
            return None;
        }
        Some(Self { dir: dir.to_owned() })
    }

    fn environment(&self, cmd: Cmd) -> Cmd {
        let cmd = cmd.dir(&self.dir).limit(Duration::from_secs(600));
        cmd.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg")
    }

    /// `diskmill fs` with these words.
    pub(crate) fn cmd(&self, words: &[&str]) -> Cmd {
        let tool = Tool::under_test(env!("CARGO_BIN_EXE_diskmill"));
        self.environment(tool.cmd(["fs"]).args(words))
    }

    /// The same, which must succeed.
    pub(crate) fn ok(&self, words: &[&str]) -> Outcome {
        self.cmd(words).ok()
    }

    /// guestfish on disks that may be written, with these commands: how test images are made.
    pub(crate) fn guestfish(&self, disks: &[&str], commands: &str) {
        let mut cmd = Cmd::new("guestfish").args(["--rw", "--format=raw", "--keys-from-stdin"]);
        for disk in disks {
            cmd = cmd.args(["-a", disk]);
        }
        std::fs::write(self.dir.join("commands.fish"), commands).unwrap();
        let cmd = cmd.args(["-f", "commands.fish"]).stdin_bytes(b"secret\nsecret\n".to_vec());
        let _ = self.environment(cmd).ok();
    }
}
