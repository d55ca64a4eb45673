//! Whether KVM is of use here. That `/dev/kvm` opens proves nothing: inside some virtual machines it makes a machine
//! that never boots, or boots a hundred times slower than emulation. Only a timed boot tells; its verdict is remembered.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What `isa-debug-exit` makes of the value that [`boot_sector`] writes: twice that, plus one.
const DONE: i32 = 85;
/// A boot under KVM takes a tenth of a second or two where it works.
const LEAST_LIMIT: Duration = Duration::from_secs(2);
/// On a busy machine the same boot under emulation is slow as well: KVM may take so many times as long.
const FACTOR: u32 = 10;
/// Emulation always works, sooner or later.
const EMULATION_LIMIT: Duration = Duration::from_secs(30);

/// What a machine's KVM is worth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "verdict")]
#[non_exhaustive]
pub enum Verdict {
    /// It boots.
    Works {
        /// In so many milliseconds.
        millis: u64,
    },
    /// It does not boot in time: emulation is faster.
    TooSlow {
        /// What it was given, in milliseconds.
        limit_millis: u64,
    },
    /// There is none, or no right to use it.
    Unusable {
        /// What the system says.
        reason: String,
    },
    /// It cannot be told: QEMU itself does not run.
    Unknown {
        /// Why.
        reason: String,
    },
}

impl Verdict {
    /// Whether KVM should be used.
    #[must_use]
    pub fn works(&self) -> bool {
        matches!(self, Self::Works { .. })
    }

    /// Whether libguestfs, which takes KVM wherever it opens, must be told not to.
    #[must_use]
    pub fn hangs(&self) -> bool {
        matches!(self, Self::TooSlow { .. })
    }
}

/// A verdict and what it holds for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Remembered {
    #[serde(flatten)]
    verdict: Verdict,
    /// Changes with each start of the machine.
    boot_id: String,
    kernel: String,
    /// Path, size and time of change: another one after each upgrade.
    qemu: String,
}

impl Remembered {
    /// What holds for this machine, as it is now.
    fn new(verdict: Verdict, qemu: &Path) -> Self {
        Self {
            verdict,
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            kernel: read("/proc/sys/kernel/osrelease"),
            qemu: identity(qemu),
        }
    }
}

/// The verdict on KVM with the QEMU program at `qemu`: the remembered one if machine, kernel and QEMU are the same since,
/// else after a timed boot (which takes up to 20 seconds where KVM hangs). `again` tries in any case.
///
/// Remembered in `kvm.json` in [`cache_dir`]; where that cannot be written, each call tries anew.
#[must_use]
pub fn verdict(qemu: &Path, again: bool) -> Verdict {
    if let Err(reason) = opens() {
        return Verdict::Unusable { reason };
    }
    if let Some(verdict) = known(qemu).filter(|_| !again) {
        return verdict;
    }
    let verdict = probe(qemu);
    if let (Some(file), false) = (file(), matches!(verdict, Verdict::Unknown { .. })) {
        // Only the next call is slower without it.
        let _ = remember(&file, &Remembered::new(verdict.clone(), qemu));
    }
    verdict
}

/// The verdict, if it takes no boot to tell.
#[must_use]
pub fn known(qemu: &Path) -> Option<Verdict> {
    if let Err(reason) = opens() {
        return Some(Verdict::Unusable { reason });
    }
    let found = file().as_deref().and_then(recall)?;
    (found == Remembered::new(found.verdict.clone(), qemu)).then_some(found.verdict)
}

/// Rights change without notice, and looking costs nothing.
fn opens() -> Result<(), String> {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|error| format!("/dev/kvm: {error}"))
}

fn file() -> Option<PathBuf> {
    Some(cache_dir()?.join("kvm.json"))
}

/// The QEMU that libguestfs takes with these settings: `LIBGUESTFS_HV`, else the one for this architecture on `PATH`.
#[must_use]
pub fn qemu(settings: &crate::Settings) -> Option<PathBuf> {
    let name = match &settings.hypervisor {
        Some(path) => path.clone(),
        None => format!("qemu-system-{}", std::env::consts::ARCH).into(),
    };
    if name.components().count() > 1 {
        return name.is_file().then_some(name);
    }
    let path = std::env::var_os("PATH")?;
    let found = std::env::split_paths(&path).map(|dir| dir.join(&name)).find(|path| path.is_file());
    // Where RHEL keeps it.
    found.or_else(|| Some(PathBuf::from("/usr/libexec/qemu-kvm")).filter(|path| path.is_file()))
}

/// `$XDG_CACHE_HOME/diskmill`, by default `~/.cache/diskmill`; `None` without a home.
#[must_use]
pub fn cache_dir() -> Option<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")))?;
    Some(base.join("diskmill"))
}

fn recall(file: &Path) -> Option<Remembered> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn remember(file: &Path, what: &Remembered) -> io::Result<()> {
    let dir = file.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    // Whole or not at all: another process may read it right now.
    let fresh = dir.join(format!("kvm.json.{}", std::process::id()));
    fs::write(&fresh, serde_json::to_vec(what)?)?;
    fs::rename(&fresh, file)
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn identity(program: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    match fs::metadata(program) {
        Ok(meta) => format!("{} {} {}", program.display(), meta.size(), meta.mtime()),
        Err(_) => program.display().to_string(),
    }
}

/// Boots under emulation, then under KVM with a limit that follows from it.
fn probe(qemu: &Path) -> Verdict {
    if std::env::consts::ARCH != "x86_64" {
        return Verdict::Unknown { reason: format!("there is no boot test for {}", std::env::consts::ARCH) };
    }
    let unknown = |why: &str, error: io::Error| Verdict::Unknown { reason: format!("{why}: {error}") };
    let dir = std::env::temp_dir();
    let name = match crate::place::random_name() {
        Ok(name) => name,
        Err(error) => return unknown("/dev/urandom", error),
    };
    let disk = dir.join(format!("diskmill-boot-{name}"));
    if let Err(error) = fs::write(&disk, boot_sector()) {
        return unknown("cannot write the disk of the boot test", error);
    }
    let emulated = boot(qemu, "tcg", &disk, EMULATION_LIMIT);
    let verdict = match emulated {
        Err(error) => unknown(&qemu.display().to_string(), error),
        Ok(Ended::Late) => Verdict::Unknown { reason: "QEMU does not boot under emulation".to_owned() },
        Ok(Ended::Other(said)) => Verdict::Unknown { reason: said },
        Ok(Ended::Booted(time)) => {
            let limit = LEAST_LIMIT.max(time.saturating_mul(FACTOR));
            match boot(qemu, "kvm", &disk, limit) {
                Err(error) => unknown(&qemu.display().to_string(), error),
                Ok(Ended::Booted(time)) => Verdict::Works { millis: millis(time) },
                Ok(Ended::Late) => Verdict::TooSlow { limit_millis: millis(limit) },
                Ok(Ended::Other(reason)) => Verdict::Unusable { reason },
            }
        }
    };
    // In the temporary folder it harms nobody.
    let _ = fs::remove_file(&disk);
    verdict
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

enum Ended {
    Booted(Duration),
    /// Killed after the limit.
    Late,
    /// By itself, with this message.
    Other(String),
}

fn boot(qemu: &Path, accelerator: &str, disk: &Path, limit: Duration) -> io::Result<Ended> {
    let start = Instant::now();
    let mut child = Command::new(qemu)
        .args(["-accel", accelerator, "-machine", "pc", "-m", "32", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-device", "isa-debug-exit,iobase=0x501,iosize=4", "-drive"])
        // Commas are doubled in QEMU's options.
        .arg(format!("file={},format=raw,if=ide", disk.display().to_string().replace(',', ",,")))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if start.elapsed() > limit {
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let time = start.elapsed();
    let Some(status) = ended else {
        child.kill()?;
        child.wait()?;
        return Ok(Ended::Late);
    };
    if status.code() == Some(DONE) {
        return Ok(Ended::Booted(time));
    }
    Ok(Ended::Other(complaint(&mut child, status)))
}

/// The last thing that QEMU said.
fn complaint(child: &mut std::process::Child, status: ExitStatus) -> String {
    let mut said = Vec::new();
    if let Some(pipe) = child.stderr.take() {
        // What cannot be read is not told.
        let _ = io::Read::read_to_end(&mut io::Read::take(pipe, 4096), &mut said);
    }
    let said = String::from_utf8_lossy(&said);
    said.lines().last().map_or_else(|| format!("QEMU ended with {status}"), str::to_owned)
}

/// A sector that ends QEMU as soon as the firmware starts it: `mov dx, 0x501; mov al, 42; out dx, al; hlt`.
fn boot_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    let code = [0xba, 0x01, 0x05, 0xb0, 0x2a, 0xee, 0xfa, 0xf4, 0xeb, 0xfd];
    for (byte, code) in sector.iter_mut().zip(code) {
        *byte = code;
    }
    let [.., a, b] = &mut sector;
    (*a, *b) = (0x55, 0xaa);
    sector
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn fake(dir: &Path, script: &str) -> PathBuf {
        let path = dir.join("qemu");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn each_end_has_its_verdict() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = |script: &str| probe(&fake(dir.path(), script));
        assert!(verdict("exit 85").works());
        let hangs = verdict("case $2 in tcg) exit 85;; esac; exec sleep 60");
        assert_eq!(hangs, Verdict::TooSlow { limit_millis: 2000 });
        let refused = verdict("case $2 in tcg) exit 85;; esac; echo failed to initialize kvm >&2; exit 1");
        assert_eq!(refused, Verdict::Unusable { reason: "failed to initialize kvm".to_owned() });
        assert!(matches!(verdict("exit 1"), Verdict::Unknown { .. }));
        assert!(matches!(probe(&dir.path().join("gone")), Verdict::Unknown { .. }));
    }

    #[test]
    fn a_verdict_is_recalled_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/kvm.json");
        for verdict in [Verdict::Works { millis: 7 }, Verdict::Unusable { reason: "x".to_owned() }] {
            let what =
                Remembered { verdict, boot_id: "b".to_owned(), kernel: "k".to_owned(), qemu: "q".to_owned() };
            remember(&file, &what).unwrap();
            assert_eq!(recall(&file), Some(what));
        }
        fs::write(&file, "{").unwrap();
        assert_eq!(recall(&file), None);
    }
}
