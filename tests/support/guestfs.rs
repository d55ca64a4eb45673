//! What the tests of `diskmill fs` share.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmill_guestfs::{Command, Disk, Options, Session, WatchdogCommand};
use diskmill_testkit::{Cmd, Outcome, Tool, require_program, skip};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};

/// The program with an appliance that boots everywhere (KVM may be there and not work), in a folder with run-time and
/// temporary folders of its own; its sessions end with it.
pub(crate) struct Fs {
    dir: PathBuf,
    /// The cache folder with the prepared appliance.
    cache: Option<PathBuf>,
}

impl Fs {
    /// Works in this folder, with the prepared appliance that tests share. `None`, and a line that says so, without
    /// libguestfs.
    pub(crate) fn new(dir: &Path) -> Option<Self> {
        let mut fs = Self::plain(dir)?;
        fs.cache = prepared();
        Some(fs)
    }

    /// The same with the appliance that libguestfs makes itself.
    pub(crate) fn plain(dir: &Path) -> Option<Self> {
        require_program("guestfish")?;
        require_program("qemu-system-x86_64")?;
        let kernels = fs::read_dir("/boot").into_iter().flatten().flatten();
        if !kernels.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz")) {
            skip("no kernel in /boot for libguestfs' appliance");
            return None;
        }
        for name in ["run", "tmp"] {
            DirBuilder::new().mode(0o700).create(dir.join(name)).unwrap();
        }
        Some(Self { dir: dir.to_owned(), cache: None })
    }

    fn environment(&self, cmd: Cmd) -> Cmd {
        let cmd = cmd.dir(&self.dir).limit(Duration::from_secs(600));
        let cmd = cmd.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
        let cmd = cmd.env("XDG_RUNTIME_DIR", self.run_dir()).env("TMPDIR", self.dir.join("tmp"));
        match &self.cache {
            Some(cache) => cmd.env("XDG_CACHE_HOME", cache),
            None => cmd,
        }
    }

    /// The run-time folder.
    pub(crate) fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// `diskmill` with these words.
    pub(crate) fn program(&self, words: &[&str]) -> Cmd {
        self.environment(Tool::under_test(env!("CARGO_BIN_EXE_diskmill")).cmd(words))
    }

    /// A program of libguestfs', with its arguments and its own appliance.
    pub(crate) fn peer(&self, words: &[&str]) -> Cmd {
        let (program, words) = words.split_first().unwrap();
        self.environment(Cmd::new(program).args(words))
    }

    /// `diskmill fs` with these words.
    pub(crate) fn cmd(&self, words: &[&str]) -> Cmd {
        self.program(&["fs"]).args(words)
    }

    /// The same, which must succeed.
    pub(crate) fn ok(&self, words: &[&str]) -> Outcome {
        self.cmd(words).ok()
    }

    /// Ends all sessions that are kept.
    pub(crate) fn stop(&self) {
        let _ = self.program(&["session", "stop", "--all"]).ok();
    }

    /// A session on raw disks that may be written: how test images are made.
    pub(crate) fn maker(&self, disks: &[&str]) -> Maker {
        let keeper = WatchdogCommand::new(env!("CARGO_BIN_EXE_diskmill"), ["guestfs-keeper"]);
        let mut options = Options::new(keeper).unwrap();
        let settings = &mut options.settings;
        settings.backend = "direct".to_owned();
        settings.backend_settings = Some("force_tcg".to_owned());
        if let Some(cache) = &self.cache {
            let appliance = cache.join(APPLIANCE);
            settings.hypervisor = Some(appliance.join("hv"));
            settings.appliance = Some(appliance);
        }
        let disks: Vec<Disk> =
            disks.iter().map(|name| Disk::file(self.dir.join(name), "raw").writable()).collect();
        Maker(Session::open(&disks, options).unwrap())
    }

    /// The processes of this folder's sessions whose command line has `word` in it.
    pub(crate) fn processes(&self, word: &str) -> Vec<i32> {
        let ours = self.run_dir().to_string_lossy().into_owned();
        let pids = fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let has = |pid: &i32| {
            let read = |name| fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
            let text = [read("cmdline"), read("environ")].concat();
            String::from_utf8_lossy(&text).contains(&ours)
                && String::from_utf8_lossy(&read("cmdline")).contains(word)
        };
        pids.filter(has).collect()
    }
}

/// Nothing is left, whatever becomes of the test.
impl Drop for Fs {
    fn drop(&mut self) {
        if !std::thread::panicking() && !self.processes("guestf").is_empty() {
            self.stop();
        }
        for pid in [self.processes("guestf"), self.processes("qemu-system")].concat() {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
    }
}

/// Where `fs prepare` puts the appliance, below the cache folder.
const APPLIANCE: &str = "diskmill/appliance";

/// A cache folder with a prepared appliance, made by the first test that asks and for all of one build of the program.
/// `None` where none can be made or another one is named.
fn prepared() -> Option<PathBuf> {
    if std::env::var_os("LIBGUESTFS_PATH").is_some() || std::env::var_os("LIBGUESTFS_HV").is_some() {
        return None;
    }
    require_program("supermin")?;
    let cache = Path::new(env!("CARGO_TARGET_TMPDIR")).join("appliance");
    fs::create_dir_all(&cache).unwrap();
    // Each test is a process of its own.
    let lock = File::create(cache.join("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let program = env!("CARGO_BIN_EXE_diskmill");
    // Whether it fits what is installed is for the program to say; that it was made by another program, for us.
    let time = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
    let older = time(&cache.join(APPLIANCE)) < time(program.as_ref());
    let force: &[&str] = if older { &["--force"] } else { &[] };
    let prepare = Tool::under_test(program).cmd(["fs", "prepare", "-q", "--no-start"]).args(force);
    let _ = prepare.env("XDG_CACHE_HOME", &cache).limit(Duration::from_secs(300)).ok();
    Some(cache)
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
