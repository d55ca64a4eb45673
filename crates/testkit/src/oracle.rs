//! qemu-img and qemu-io as witnesses.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use crate::content::Pattern;
use crate::model::{Op, Step};
use crate::{Cmd, Outcome, require_program, scratch};

/// The installed qemu-img and qemu-io, run in one folder.
///
/// The folder matters: QEMU resolves the name of an external data file against it.
#[derive(Clone)]
pub struct Oracle {
    img: PathBuf,
    io: PathBuf,
    dir: PathBuf,
}

impl Oracle {
    /// The oracle, with relative names meant in `dir`; `None`, said loudly, where QEMU's tools are missing.
    pub fn find(dir: &Path) -> Option<Self> {
        Some(Self { img: require_program("qemu-img")?, io: require_program("qemu-io")?, dir: dir.to_owned() })
    }

    /// The same programs in another folder.
    #[must_use]
    pub fn at(&self, dir: &Path) -> Self {
        Self { dir: dir.to_owned(), ..self.clone() }
    }

    /// The folder in which relative names are meant.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The installed version, such as (10, 0).
    pub fn version(&self) -> (u32, u32) {
        let text = self.img(["--version"]).ok().out();
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
        (numbers.next().expect("a version"), numbers.next().expect("a version"))
    }

    /// A run of qemu-img.
    pub fn img<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        Cmd::new(&self.img).args(args).dir(&self.dir)
    }

    /// A run of qemu-io, without waiting for the disk.
    pub fn io<A: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = A>) -> Cmd {
        let cmd = Cmd::new(&self.io).args(["-t", "unsafe"]);
        cmd.args(args).dir(&self.dir)
    }

    /// Creates a qcow2 image; `options` as for `-o`, may be empty.
    pub fn create(&self, image: &str, options: &str, size: u64) {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        self.img(args).arg(image).arg(size.to_string()).ok();
    }

    /// Creates a qcow2 image over a backing file.
    pub fn create_over(&self, image: &str, options: &str, size: u64, backing: (&str, &str)) {
        let mut args = vec!["create", "-q", "-f", "qcow2", "-b", backing.0, "-F", backing.1];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        self.img(args).arg(image).arg(size.to_string()).ok();
    }

    /// Does these steps on an image with qemu-io, and fails if one of them fails.
    pub fn write(&self, image: impl AsRef<OsStr>, format: &str, steps: &[Step]) {
        let refused = self.try_write(image, format, steps).err();
        assert!(refused.is_none(), "{}", refused.unwrap_or_default());
    }

    /// Does these steps on an image with qemu-io. The error is what qemu-io said of a step that it refused: QEMU 10 fails
    /// with EIO at some compressed writes after compressed clusters were discarded.
    pub fn try_write(&self, image: impl AsRef<OsStr>, format: &str, steps: &[Step]) -> Result<(), String> {
        if steps.is_empty() {
            return Ok(());
        }
        let script = Script::new(steps);
        let out = self.io(["-f", format]).args(script.args()).arg(image).run();
        let done = out.code == Some(0) && !out.out().contains("failed");
        if done { Ok(()) } else { Err(out.to_string()) }
    }

    /// Takes an internal snapshot.
    pub fn snapshot(&self, image: &str, name: &str) {
        self.img(["snapshot", "-c", name, image]).ok();
    }

    /// Panics unless `qemu-img check` finds neither damage nor leaks.
    pub fn check_clean(&self, image: impl AsRef<OsStr>) {
        let out = self.img(["check", "-f", "qcow2"]).arg(image).run();
        assert!(out.code == Some(0), "not clean: {out}");
    }

    /// Panics unless both images hold the same guest content.
    pub fn identical(&self, a: (&str, impl AsRef<OsStr>), b: (&str, impl AsRef<OsStr>)) {
        let cmd = self.img(["compare", "-f", a.0, "-F", b.0]);
        cmd.arg(a.1).arg(b.1).ok();
    }

    /// The guest content, as qemu-img reads it.
    pub fn content(&self, image: impl AsRef<OsStr>, format: &str) -> Vec<u8> {
        let dir = scratch();
        let raw = dir.path().join("raw");
        let cmd = self.img(["convert", "-f", format, "-O", "raw"]);
        cmd.arg(image).arg(&raw).ok();
        std::fs::read(raw).expect("the converted image")
    }

    /// `qemu-img info` as JSON.
    pub fn info(&self, image: impl AsRef<OsStr>) -> serde_json::Value {
        let cmd = self.img(["info", "--output=json", "-U"]);
        cmd.arg(image).ok().json()
    }

    /// `qemu-img map` as it prints its JSON.
    pub fn map(&self, image: impl AsRef<OsStr>, format: &str) -> Outcome {
        self.img(["map", "--output=json", "-f", format]).arg(image).ok()
    }
}

/// Steps as arguments of qemu-io. Content that is not one repeated byte comes from files that live as
/// long as the script.
pub struct Script {
    lines: Vec<String>,
    _files: tempfile::TempDir,
}

impl Script {
    /// The script for `steps`.
    pub fn new(steps: &[Step]) -> Self {
        let files = scratch();
        let line = |(i, step): (usize, &Step)| {
            let Step { start, len, .. } = step;
            let content = |flag: &str, pattern| match pattern {
                Pattern::Byte(b) => format!("write {flag} -P {b} {start} {len}"),
                Pattern::Zero => format!("write {flag} -P 0 {start} {len}"),
                Pattern::Text | Pattern::Random => {
                    let file = files.path().join(i.to_string());
                    std::fs::write(&file, step.bytes()).expect("write the content");
                    format!("write {flag} -s {} {start} {len}", file.display())
                }
            };
            match step.op {
                Op::Write(pattern) => content("", pattern),
                Op::Compressed(pattern) => content("-c", pattern),
                Op::Zero { unmap: false } => format!("write -z {start} {len}"),
                Op::Zero { unmap: true } => format!("write -z -u {start} {len}"),
                Op::Discard => format!("discard {start} {len}"),
            }
        };
        Self { lines: steps.iter().enumerate().map(line).collect(), _files: files }
    }

    /// `-c LINE` for every step.
    pub fn args(&self) -> Vec<String> {
        let pairs = self.lines.iter().map(|l| ["-c".to_owned(), l.clone()]);
        pairs.flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ModelDisk;

    #[test]
    fn the_script_does_what_the_model_does() {
        let dir = scratch();
        let Some(q) = Oracle::find(dir.path()) else {
            return;
        };
        assert!(q.version() >= (5, 0));
        let step = |op, start, len| Step { op, start, len, seed: 5 };
        let steps = [
            step(Op::Write(Pattern::Text), 1000, 70_000),
            step(Op::Compressed(Pattern::Text), 131_072, 65_536),
            step(Op::Write(Pattern::Byte(7)), 196_608, 131_072),
            step(Op::Discard, 190_000 / 512 * 512, 100_000 / 512 * 512),
            step(Op::Zero { unmap: true }, 300_000, 5),
        ];
        q.create("a.qcow2", "", 400_384);
        q.write("a.qcow2", "qcow2", &steps);
        let mut model = ModelDisk::new(400_384, 65_536);
        for step in &steps {
            model.apply(step);
        }
        assert!(q.content("a.qcow2", "qcow2") == model.bytes());
        q.check_clean("a.qcow2");
    }
}
