//! qemu-img and diskmill under its name, side by side.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use diskmill_testkit::{Cmd, Oracle, scratch};
use tempfile::TempDir;

/// Two folders with the same images: one for qemu-img, one for diskmill under its name.
pub(crate) struct Pair {
    pub(crate) oracle: Oracle,
    pub(crate) program: PathBuf,
    pub(crate) theirs: TempDir,
    pub(crate) ours: TempDir,
    _link: TempDir,
}

/// What a run printed, and its exit code.
pub(crate) type Printed = (String, String, Option<i32>);

impl Pair {
    /// `None`, said loudly, without qemu-img.
    pub(crate) fn new(fill: impl Fn(&Oracle)) -> Option<Self> {
        let (theirs, ours, link) = (scratch(), scratch(), scratch());
        let oracle = Oracle::find(theirs.path())?;
        fill(&oracle);
        // Copies: dates and random ids must be the same too.
        let from = theirs.path().join(".");
        Cmd::new("cp").arg("-a").arg(from).arg(ours.path()).ok();
        let program = link.path().join("qemu-img");
        symlink(env!("CARGO_BIN_EXE_diskmill"), &program).unwrap();
        Some(Self { oracle, program, theirs, ours, _link: link })
    }

    /// Runs the command line, split at blanks, in both folders.
    pub(crate) fn run(&self, line: &str) -> [Printed; 2] {
        let args = || line.split(' ').filter(|arg| !arg.is_empty());
        let theirs = self.oracle.img(args()).run();
        let ours = Cmd::new(&self.program).args(args()).dir(self.ours.path()).run();
        [theirs, ours].map(|run| (without_disk_size(&run.out()), run.err(), run.code))
    }

    /// Both must print the same and end the same.
    pub(crate) fn same(&self, line: &str) {
        let [theirs, ours] = self.run(line);
        assert_eq!(theirs, ours, "qemu-img {line}");
    }

    /// The same, but for the line of a usage error that points to the help, where distributions differ.
    pub(crate) fn same_but_hint(&self, line: &str) {
        let [theirs, ours] = self.run(line).map(|(out, err, code)| {
            let lines = err.lines().filter(|line| !line.starts_with("Try '"));
            (out, lines.collect::<Vec<_>>().join("\n"), code)
        });
        assert_eq!(theirs, ours, "qemu-img {line}");
    }

    pub(crate) fn path(&self, name: &str) -> [PathBuf; 2] {
        [&self.theirs, &self.ours].map(|dir: &TempDir| dir.path().join(name))
    }

    /// Both left an image of this name with the same guest content.
    pub(crate) fn same_disk(&self, name: &str, format: &str) {
        let [theirs, ours] = self.path(name);
        self.oracle.identical((format, theirs), (format, ours));
    }

    /// Both left an internal snapshot with the same guest content.
    pub(crate) fn same_snapshot(&self, name: &str, snapshot: &str) {
        let [theirs, ours] = self.path(name).map(|path| {
            let raw = path.with_extension("snapshot");
            let cmd = self.oracle.img(["convert", "-l", snapshot, "-f", "qcow2", "-O", "raw"]);
            cmd.arg(&path).arg(&raw).ok();
            std::fs::read(raw).unwrap()
        });
        assert!(theirs == ours, "{name}, snapshot {snapshot}: {} and {} bytes", theirs.len(), ours.len());
    }

    /// Ours has neither damage nor leaks.
    pub(crate) fn clean(&self, name: &str) {
        let [_, ours] = self.path(name);
        self.oracle.at(self.ours.path()).check_clean(ours);
    }
}

/// How much of a file is allocated is the file system's affair, and a copy's may differ.
pub(crate) fn without_disk_size(text: &str) -> String {
    let is_size = |line: &&str| line.contains("disk size:") || line.contains("\"actual-size\":");
    text.split_inclusive('\n').filter(|line| !is_size(line)).collect()
}
