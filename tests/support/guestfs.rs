//! What the tests of `diskmill fs` share.

use std::path::Path;
use std::time::Duration;

use diskmill_guestfs::{Command, Disk, Options, Session, WatchdogCommand};
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

    /// `diskmill` with these words.
    pub(crate) fn program(&self, words: &[&str]) -> Cmd {
        self.environment(Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words))
    }

    /// A program of libguestfs', with its arguments.
    pub(crate) fn peer(&self, words: &[&str]) -> Cmd {
        let (program, words) = words.split_first().unwrap();
        self.environment(Cmd::new(program).args(words))
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

    /// A session on raw disks that may be written: how test images are made.
    pub(crate) fn maker(&self, disks: &[&str]) -> Maker {
        let keeper = WatchdogCommand::new(env!("CARGO_BIN_EXE_diskmill"), ["guestfs-keeper"]);
        let mut options = Options::new(keeper).unwrap();
        options.settings.backend = "direct".to_owned();
        options.settings.backend_settings = Some("force_tcg".to_owned());
        let disks: Vec<Disk> =
            disks.iter().map(|name| Disk::file(self.dir.join(name), "raw").writable()).collect();
        Maker(Session::open(&disks, options).unwrap())
    }
}

/// A session that must do what it is told.
pub(crate) struct Maker(Session);

impl Maker {
    /// A command in words.
    pub(crate) fn run(&mut self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let command = Command::new(words.next().unwrap());
        self.call(words.fold(command, Command::arg))
    }

    pub(crate) fn call(&mut self, command: Command) -> String {
        let output = self.0.call(&command).unwrap_or_else(|error| panic!("{command:?}: {error}"));
        String::from_utf8(output).unwrap().trim_end().to_owned()
    }

    pub(crate) fn upload(&mut self, mut content: &[u8], path: &str) {
        self.0.upload(&mut content, path).unwrap();
    }

    /// What was made is in the images when this returns.
    pub(crate) fn close(self) {
        self.0.close().unwrap();
    }
}
