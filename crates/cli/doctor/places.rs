//! Folders: the appliance and its cache, temporary files, and what killed runs have left there.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use super::Machine;
use super::report::{Check, Topic, size};
use crate::fs::drive::run_folder;

/// What an appliance takes in the cache, in bytes.
const APPLIANCE: u64 = 512 << 20;
/// What the temporary folder should have for the changes that a read-only session makes, in bytes.
const OVERLAYS: u64 = 256 << 20;

pub(super) fn appliance(machine: &Machine) -> Check {
    if let Some(fixed) = machine.fixed_appliance() {
        return Check::ok(Topic::Appliance, format!("fixed, in {}", fixed.display()));
    }
    if let Some(path) = &machine.settings.appliance {
        return Check::problem(
            Topic::Appliance,
            format!("LIBGUESTFS_PATH={}: neither supermin.d nor a fixed appliance there", path.display()),
            "unset it, or make one: `libguestfs-make-fixed-appliance DIR`",
        )
        .or_ok(has_supermin(path).then(|| format!("built by supermin from {}", path.display())));
    }
    let built = cache(machine).join(format!(".guestfs-{}/appliance.d/root", geteuid().as_raw()));
    match built.metadata() {
        Ok(_) => Check::ok(Topic::Appliance, format!("built, {}", built.display())),
        Err(_) => Check::ok(
            Topic::Appliance,
            "not built yet: the first command builds it, which takes some seconds",
        ),
    }
}

impl Check {
    /// This finding, unless all is well.
    fn or_ok(self, well: Option<String>) -> Self {
        well.map_or(self.clone(), |found| Self::ok(self.check, found))
    }
}

fn has_supermin(path: &Path) -> bool {
    std::env::split_paths(path.as_os_str()).any(|dir| dir.join("supermin.d").is_dir())
}

/// guestfs(3), "guestfs_set_cachedir".
fn cache(machine: &Machine) -> PathBuf {
    machine.settings.cache_dir.clone().or_else(|| variable("TMPDIR")).unwrap_or_else(|| "/var/tmp".into())
}

/// guestfs(3), "guestfs_set_tmpdir".
fn tmp(machine: &Machine) -> PathBuf {
    machine.settings.tmp_dir.clone().or_else(|| variable("TMPDIR")).unwrap_or_else(|| "/tmp".into())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

pub(super) fn cache_space(machine: &Machine) -> Check {
    let dir = cache(machine);
    if machine.fixed_appliance().is_some() {
        return Check::ok(Topic::Cache, "not needed: the appliance is complete");
    }
    // libguestfs refuses a folder that others could have put an appliance into.
    let own = dir.join(format!(".guestfs-{}", geteuid().as_raw()));
    if let Ok(found) = own.symlink_metadata() {
        if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Check::problem(
                Topic::Cache,
                format!(
                    "{} is not a folder that only you may write to: libguestfs refuses it",
                    own.display()
                ),
                format!(
                    "look what it is, then `rm -r {}`; or name another place with LIBGUESTFS_CACHEDIR",
                    own.display()
                ),
            );
        }
        if own.join("appliance.d/root").exists() {
            return Check::ok(Topic::Cache, format!("{} has the appliance", own.display()));
        }
    }
    room(Topic::Cache, &dir, APPLIANCE, "LIBGUESTFS_CACHEDIR")
}

pub(super) fn tmp_space(machine: &Machine) -> Check {
    room(Topic::Tmp, &tmp(machine), OVERLAYS, "LIBGUESTFS_TMPDIR")
}

fn room(topic: Topic, dir: &Path, least: u64, variable: &str) -> Check {
    let elsewhere = format!("name another folder with {variable}");
    // Rights, read-only mounts and quotas all show when it is done.
    if let Err(error) = tempfile::tempfile_in(dir) {
        return Check::problem(topic, format!("cannot write to {}: {error}", dir.display()), elsewhere);
    }
    let free = rustix::fs::statvfs(dir).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize));
    let found = format!("{} free in {}", size(free), dir.display());
    match free >= least {
        true => Check::ok(topic, found),
        false => Check::problem(
            topic,
            format!("only {found}, {} are needed", size(least)),
            format!("make room, or {elsewhere}"),
        ),
    }
}

/// What killed runs have left.
struct Leftovers {
    /// Folders of sessions, with whatever may still run for them.
    sessions: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Leftovers {
    fn find() -> Self {
        let listening = listening();
        let mut files =
            dead_guestfish_sockets(&PathBuf::from(format!("/tmp/.guestfish-{}", geteuid().as_raw())));
        if let Ok(folder) = run_folder() {
            let sockets = ours(&folder).filter(|(path, kind)| kind.is_socket() && !listening.contains(path));
            files.extend(sockets.map(|(path, _)| path));
        }
        for (path, kind) in ours(&std::env::temp_dir()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            // The folders of images served to an appliance; the disks of boot tests.
            let served = kind.is_dir() && name.starts_with("diskmill-nbd-");
            if served && path.join("disk").exists() && !listening.contains(&path.join("disk")) {
                files.push(path.join("disk"));
                files.push(path);
            } else if kind.is_file() && name.starts_with("diskmill-boot-") && is_old(&path) {
                files.push(path);
            }
        }
        Self { sessions: diskmill_guestfs::leftovers(), files }
    }

    fn all(&self) -> Vec<String> {
        self.sessions.iter().chain(&self.files).map(|path| path.display().to_string()).collect()
    }
}

pub(super) fn leftovers(fix: bool) -> Check {
    let found = Leftovers::find();
    let names = found.all();
    if names.is_empty() {
        return Check::ok(Topic::Leftovers, "none");
    }
    if !fix {
        return Check::note(
            Topic::Leftovers,
            format!("of killed runs: {}", names.join(", ")),
            "`diskmill doctor --fix` removes them, and ends what still runs for them",
        );
    }
    diskmill_guestfs::sweep();
    let removed = found.files.iter().map(|path| match path.is_dir() {
        true => fs::remove_dir(path),
        false => fs::remove_file(path),
    });
    let failed = removed.filter_map(Result::err).find(|error| error.kind() != io::ErrorKind::NotFound);
    match failed {
        None => Check::ok(Topic::Leftovers, format!("removed: {}", names.join(", "))),
        Some(error) => {
            Check::note(Topic::Leftovers, format!("cannot be removed: {error}"), "remove them by hand")
        }
    }
}

/// The entries of `dir` that belong to this user, with what they are.
fn ours(dir: &Path) -> impl Iterator<Item = (PathBuf, fs::FileType)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let found = entry.path().symlink_metadata().ok()?;
        (found.uid() == geteuid().as_raw()).then(|| (entry.path(), found.file_type()))
    })
}

/// `socket-PID` of guestfish processes that are gone. Not tried by connecting: that would end a server that lives.
fn dead_guestfish_sockets(folder: &Path) -> Vec<PathBuf> {
    let dead = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        let pid: u32 = name.strip_prefix("socket-")?.parse().ok()?;
        (!Path::new("/proc").join(pid.to_string()).exists()).then_some(())
    };
    ours(folder)
        .filter(|(path, kind)| kind.is_socket() && dead(path).is_some())
        .map(|(path, _)| path)
        .collect()
}

/// The names of all Unix sockets that exist in the kernel (proc(5), `/proc/net/unix`).
fn listening() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // Seven columns, then the name, which may have spaces.
    table
        .lines()
        .filter_map(|line| line.find(" /").and_then(|at| line.get(at + 1..)))
        .map(PathBuf::from)
        .collect()
}

fn is_old(path: &Path) -> bool {
    let age = path.metadata().and_then(|found| found.modified()).ok().and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age > std::time::Duration::from_secs(300))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::super::report::Status;
    use super::*;

    #[test]
    fn sockets_of_dead_processes_are_told_from_those_of_the_living() {
        let dir = tempfile::tempdir().unwrap();
        let socket = |name: &str| UnixListener::bind(dir.path().join(name)).unwrap();
        let _kept = (socket(&format!("socket-{}", std::process::id())), socket("socket-x"));
        // No process has such a number (proc(5), pid_max).
        drop(socket("socket-99999999"));
        fs::write(dir.path().join("socket-99999998"), "").unwrap();
        assert_eq!(dead_guestfish_sockets(dir.path()), [dir.path().join("socket-99999999")]);
        assert!(listening().contains(&dir.path().join("socket-x")));
        assert!(!listening().contains(&dir.path().join("socket-99999999")));
    }

    #[test]
    fn room_is_measured_where_it_can_be_used() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(room(Topic::Tmp, dir.path(), 1, "X").status, Status::Ok);
        let full = room(Topic::Tmp, dir.path(), u64::MAX, "X");
        assert!(full.status == Status::Problem && full.found.contains("are needed"), "{full:?}");
        let gone = room(Topic::Tmp, &dir.path().join("gone"), 1, "X");
        assert!(gone.status == Status::Problem && gone.remedy.unwrap().contains('X'));
    }
}
