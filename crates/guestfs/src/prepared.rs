//! A prepared appliance: built once into the cache folder and used as it is (guestfs(3), "FIXED APPLIANCE"), with the
//! kernel unpacked, a processor that is cheap to emulate, and less to do for udev. It starts in about half the time and
//! needs no supermin.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::SystemTime;

use crate::kvm::{cache_dir, qemu};
use crate::messages::one_line;
use crate::place::uid;
use crate::{Error, Kind, Result, Settings, bzimage, initrd, parts};

/// What it was made of; written last.
const RECORD: &str = "diskmill.json";
/// Where kernels are.
const BOOT: &str = "/boot";
/// The wrapper for QEMU.
const WRAPPER: &str = "hv";

/// An appliance in the cache folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    folder: PathBuf,
    /// Why the kernel is still packed, if it is.
    packed: Option<String>,
}

/// Whether there is a prepared appliance, and whether it is of use.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Preparation {
    /// There is none.
    Missing,
    /// It is in this folder and not used, for this reason.
    Unfit {
        /// Where it is.
        folder: PathBuf,
        /// What has changed, or who else could have written to it.
        reason: String,
    },
    /// It is used.
    Fit(Prepared),
}

/// What an appliance fits: each file with its size and time of change.
#[derive(Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Record {
    made_of: BTreeMap<PathBuf, String>,
    packed: Option<String>,
}

impl Prepared {
    /// The prepared appliance, if there is one that is of use: see [`look`](Self::look).
    #[must_use]
    pub fn find() -> Option<Self> {
        match Self::look() {
            Preparation::Fit(prepared) => Some(prepared),
            Preparation::Missing | Preparation::Unfit { .. } => None,
        }
    }

    /// Whether there is a prepared appliance that is whole and was made of the kernels, the libguestfs and the QEMU that are
    /// there now.
    #[must_use]
    pub fn look() -> Preparation {
        let Some(folder) = folder() else { return Preparation::Missing };
        let Ok(found) = fs::symlink_metadata(&folder) else { return Preparation::Missing };
        let unfit = |folder, reason: &str| Preparation::Unfit { folder, reason: reason.to_owned() };
        // It runs with our rights and sees our images.
        if !found.is_dir() || found.uid() != uid() || found.mode() & 0o022 != 0 {
            return unfit(folder, "it is not a folder that only this user may write to");
        }
        let record = fs::read(folder.join(RECORD)).ok();
        let Some(record) = record.and_then(|text| serde_json::from_slice::<Record>(&text).ok()) else {
            return unfit(folder, "it is not whole");
        };
        match record.made_of.iter().find(|(path, was)| **was != identity(path)) {
            Some((path, _)) => unfit(folder, &format!("{} has changed since", path.display())),
            None => Preparation::Fit(Self { folder, packed: record.packed }),
        }
    }

    /// When it was built.
    #[must_use]
    pub fn built(&self) -> Option<SystemTime> {
        fs::metadata(self.folder.join(RECORD)).and_then(|found| found.modified()).ok()
    }

    /// Builds it anew with these settings, in the place of an older one. Sessions that use that one are not disturbed.
    ///
    /// # Errors
    /// `NotInstalled` without guestfish, supermin or QEMU, `NoKernel`, `Start` when supermin fails, `Io`.
    pub fn build(settings: &Settings) -> Result<Self> {
        let folder = folder().ok_or_else(|| {
            Error::new(Kind::Io, "there is no cache folder").hint("set HOME or XDG_CACHE_HOME")
        })?;
        Self::build_at(settings, folder)
    }

    /// Builds one in another folder, where only those find it whose settings [`apply`](Self::apply) has changed.
    ///
    /// # Errors
    /// As [`build`](Self::build); `Invalid` if the folder is there and no appliance.
    pub fn build_into(settings: &Settings, folder: &Path) -> Result<Self> {
        let failed = |e| Error::io(format!("cannot find {}", folder.display()), e);
        let folder = std::path::absolute(folder).map_err(failed)?;
        if folder.exists() && !folder.join(RECORD).exists() {
            return Err(Error::invalid(format!(
                "{} is there already, and no prepared appliance",
                folder.display()
            )));
        }
        Self::build_at(settings, folder)
    }

    fn build_at(settings: &Settings, folder: PathBuf) -> Result<Self> {
        let base = folder.parent().unwrap_or(Path::new("/"));
        let doing = |what: &str| format!("cannot {what} in {}", base.display());
        fs::create_dir_all(base).map_err(|e| Error::io(doing("make a folder"), e))?;
        let lock = folder.with_extension("lock");
        let lock = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(lock);
        let lock = lock.map_err(|e| Error::io(doing("write"), e))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| Error::new(Kind::Busy, "another program is preparing the appliance"))?;
        let fresh = folder.with_extension("new");
        // Of a killed run.
        let _ = fs::remove_dir_all(&fresh);
        DirBuilder::new().mode(0o700).create(&fresh).map_err(|e| Error::io(doing("make a folder"), e))?;
        let built = Self::build_in(settings, &fresh).and_then(|record| {
            let old = folder.with_extension("old");
            let _ = fs::remove_dir_all(&old);
            let _ = fs::rename(&folder, &old);
            fs::rename(&fresh, &folder).map_err(|e| Error::io(doing("rename"), e))?;
            let _ = fs::remove_dir_all(&old);
            Ok(Self { folder: folder.clone(), packed: record.packed })
        });
        built.inspect_err(|_| drop(fs::remove_dir_all(&fresh)))
    }

    fn build_in(settings: &Settings, fresh: &Path) -> Result<Record> {
        let qemu = qemu(settings).ok_or_else(|| missing("QEMU"))?;
        let guestfish = on_path(&settings.guestfish).ok_or_else(|| missing("guestfish"))?;
        let parts = supermin_parts(&guestfish)?;
        let failed = |e| Error::io(format!("cannot write to {}", fresh.display()), e);
        let work = fresh.with_extension("parts");
        let _ = fs::remove_dir_all(&work);
        let tuned = work.join("supermin.d");
        let ran = DirBuilder::new()
            .mode(0o700)
            .create(&work)
            .and_then(|()| parts::tune(&parts, &tuned, &work.join("scratch")))
            .map_err(|e| Error::io(format!("cannot write to {}", work.display()), e))
            .and_then(|()| run_supermin(&tuned, fresh));
        let _ = fs::remove_dir_all(&work);
        ran?;
        // supermin makes the folder as everybody may read it.
        fs::set_permissions(fresh, Permissions::from_mode(0o700)).map_err(failed)?;
        let packed = unpack_kernel(&fresh.join("kernel")).map_err(failed)?;
        shorten_modules(&fresh.join("initrd")).map_err(failed)?;
        let wrapper = wrapper(&qemu);
        let mut made_of: BTreeMap<PathBuf, String> = BTreeMap::new();
        let files = fs::read_dir(&parts).map_err(failed)?.flatten().map(|entry| entry.path());
        for path in files.chain([guestfish, qemu, BOOT.into()]) {
            let identity = identity(&path);
            made_of.insert(path, identity);
        }
        let record = Record { made_of, packed };
        let write = || -> io::Result<()> {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o700)
                .open(fresh.join(WRAPPER))?;
            file.write_all(&wrapper)?;
            fs::write(
                fresh.join("README.fixed"),
                "A fixed appliance for libguestfs, made by `diskmill fs prepare`.\n",
            )?;
            fs::write(fresh.join(RECORD), serde_json::to_vec_pretty(&record)?)
        };
        write().map_err(failed)?;
        Ok(record)
    }

    /// Removes it. Whether there was one.
    ///
    /// # Errors
    /// `Io`.
    pub fn remove() -> Result<bool> {
        let Some(folder) = folder() else { return Ok(false) };
        match fs::remove_dir_all(&folder) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(format!("cannot remove {}", folder.display()), e)),
        }
    }

    /// Its folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The program that runs it: QEMU with a processor that is cheap to emulate.
    #[must_use]
    pub fn hypervisor(&self) -> PathBuf {
        self.folder.join(WRAPPER)
    }

    /// Why its kernel is still packed, which makes the start slower; `None` if it is not.
    #[must_use]
    pub fn packed(&self) -> Option<&str> {
        self.packed.as_deref()
    }

    /// Makes the settings use it, unless they name another appliance, program or backend.
    pub fn apply(&self, settings: &mut Settings) {
        if settings.appliance.is_none() && settings.hypervisor.is_none() && settings.backend == "direct" {
            settings.appliance = Some(self.folder.clone());
            settings.hypervisor = Some(self.hypervisor());
        }
    }
}

fn folder() -> Option<PathBuf> {
    Some(cache_dir()?.join("appliance"))
}

fn missing(what: &str) -> Error {
    Error::new(Kind::NotInstalled, format!("{what} is not installed"))
        .hint("`diskmill doctor` tells what is missing")
}

/// Size and time of change; of `/boot` the kernels with theirs.
fn identity(path: &Path) -> String {
    if path == Path::new(BOOT) {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        let mut kernels: Vec<String> = entries
            .map(|entry| entry.path())
            .filter(|path| path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"vmlinuz")))
            .map(|path| format!("{} {}", path.display(), identity(&path)))
            .collect();
        kernels.sort_unstable();
        return kernels.join("; ");
    }
    fs::metadata(path).map_or_else(|_| "none".to_owned(), |meta| format!("{} {}", meta.size(), meta.mtime()))
}

/// The program's full path.
fn on_path(program: &Path) -> Option<PathBuf> {
    if program.components().count() > 1 {
        return program.is_file().then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// libguestfs' folder of what supermin makes an appliance of.
fn supermin_parts(guestfish: &Path) -> Result<PathBuf> {
    let out =
        Command::new(guestfish).arg("get-path").env_remove("LIBGUESTFS_PATH").stdin(Stdio::null()).output();
    let out = out.map_err(|e| Error::io(format!("cannot run {}", guestfish.display()), e))?;
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    let found = std::env::split_paths(&text).map(|dir| dir.join("supermin.d")).find(|dir| dir.is_dir());
    found.ok_or_else(|| {
        Error::new(Kind::Start, format!("libguestfs has no supermin.d in {text}"))
            .hint("install libguestfs from the distribution's package")
    })
}

fn run_supermin(parts: &Path, fresh: &Path) -> Result<()> {
    let mut command = Command::new("supermin");
    command.args(["--build", "--copy-kernel", "-f", "ext2", "--host-cpu", std::env::consts::ARCH]);
    let out = command.arg(parts).arg("-o").arg(fresh).stdin(Stdio::null()).output();
    let out = out.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => missing("supermin"),
        _ => Error::io("cannot run supermin", e),
    })?;
    if out.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&out.stderr);
    let kind = if said.contains("kernel") { Kind::NoKernel } else { Kind::Start };
    Err(Error::new(kind, format!("supermin fails: {}", one_line(said.lines().collect())))
        .hint("`diskmill doctor kernel supermin cache` tells what is missing"))
}

/// Makes the initrd load the modules only that are needed, if it is as we know it.
fn shorten_modules(path: &Path) -> io::Result<()> {
    match initrd::shorter_list(&fs::read(path)?) {
        Some(more) => OpenOptions::new().append(true).open(path)?.write_all(&more),
        None => Ok(()),
    }
}

/// Puts the unpacked kernel in its place; why not, if it cannot be unpacked.
fn unpack_kernel(path: &Path) -> io::Result<Option<String>> {
    match bzimage::unpack(&fs::read(path)?) {
        Ok(kernel) => fs::write(path, kernel).map(|()| None),
        Err(reason) => Ok(Some(reason)),
    }
}

/// A script that runs QEMU with the processor `qemu64` where libguestfs asks for `max`, all of whose features would be
/// emulated; not where KVM has them for nothing.
fn wrapper(qemu: &Path) -> Vec<u8> {
    let mut script = br#"#!/bin/sh
cpu=qemu64
case $* in *accel=tcg*) ;; *) test -w /dev/kvm && cpu=max ;; esac
for arg do
  shift
  case $arg in max|max,*) arg=$cpu${arg#max} ;; esac
  set -- "$@" "$arg"
done
exec '"#
        .to_vec();
    for &byte in qemu.as_os_str().as_bytes() {
        if byte == b'\'' {
            script.extend_from_slice(br"'\'");
        }
        script.push(byte);
    }
    script.extend_from_slice(b"' \"$@\"\n");
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_changes_the_processor_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (qemu, hv) = (dir.path().join("it's qemu"), dir.path().join("hv"));
        for (path, text) in [(&qemu, b"#!/bin/sh\nprintf '%s|' \"$@\"".to_vec()), (&hv, wrapper(&qemu))] {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(path).unwrap();
            file.write_all(&text).unwrap();
        }
        let said =
            |args: &[&str]| String::from_utf8(Command::new(&hv).args(args).output().unwrap().stdout).unwrap();
        assert_eq!(
            said(&["-machine", "pc,accel=tcg", "-cpu", "max,la57=off", "a b", "", "maximum"]),
            "-machine|pc,accel=tcg|-cpu|qemu64,la57=off|a b||maximum|"
        );
        assert_eq!(said(&["-cpu", "max", "accel=tcg"]), "-cpu|qemu64|accel=tcg|");
        let kvm = OpenOptions::new().write(true).open("/dev/kvm").is_ok();
        let cpu = if kvm { "max" } else { "qemu64" };
        assert_eq!(
            said(&["-machine", "accel=kvm:tcg", "-cpu", "max"]),
            format!("-machine|accel=kvm:tcg|-cpu|{cpu}|")
        );
        assert_eq!(said(&["-cpu", "host"]), "-cpu|host|");
    }

    #[test]
    fn settings_that_name_another_appliance_are_left_alone() {
        let prepared = Prepared { folder: "/p".into(), packed: None };
        let mut settings = Settings::default();
        prepared.apply(&mut settings);
        assert_eq!((settings.appliance, settings.hypervisor), (Some("/p".into()), Some("/p/hv".into())));
        let mut settings = Settings { appliance: Some("/other".into()), ..Settings::default() };
        prepared.apply(&mut settings);
        assert_eq!((settings.appliance, settings.hypervisor), (Some("/other".into()), None));
    }
}
