//! Folders: the appliance and its cache, temporary files, and what killed runs have left.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use diskmill_guestfs::{Builder, Preparation};
use rustix::process::geteuid;

use super::Machine;
use super::report::{Check, Topic, size};
use crate::fs::leftovers::Leftovers;

/// What an appliance takes in the cache, in bytes.
const APPLIANCE: u64 = 512 << 20;
/// What the temporary folder should have for the changes that a read-only session makes, in bytes.
const OVERLAYS: u64 = 256 << 20;

pub(super) fn appliance(machine: &Machine) -> Check {
    if let Some(prepared) = machine.prepared() {
        let age = prepared.built().and_then(|at| at.elapsed().ok());
        let age = age.map_or(String::new(), |age| format!(", {} days ago", age.as_secs() / (24 * 3600)));
        let found = format!("prepared{age}, in {}", prepared.folder().display());
        return match prepared.packed() {
            None => Check::ok(Topic::Appliance, found),
            Some(reason) => Check::note(
                Topic::Appliance,
                format!("{found}: each start unpacks its kernel: {reason}"),
                "nothing: it starts a little slower",
            ),
        };
    }
    if let Some(fixed) = machine.fixed_appliance() {
        return Check::ok(Topic::Appliance, format!("fixed, in {}", fixed.display()));
    }
    if let Some(path) = &machine.settings.appliance {
        return Check::problem(
            Topic::Appliance,
            format!("LIBGUESTFS_PATH={}: neither supermin.d nor a fixed appliance there", path.display()),
            "unset it, or make one: `diskmill fs prepare --into DIR`",
        )
        .or_ok(has_supermin(path).then(|| format!("built by supermin from {}", path.display())));
    }
    let built = machine.settings.appliance_cache().join("appliance.d/root");
    let found = match built.metadata() {
        Ok(_) => format!("built, {}", built.display()),
        Err(_) => "not built yet: the first command builds it, which takes some seconds".to_owned(),
    };
    match &machine.prepared {
        Preparation::Unfit { folder, reason } => Check::note(
            Topic::Appliance,
            format!("{found}; the prepared one in {} is not used: {reason}", folder.display()),
            "`diskmill fs prepare` builds it anew, and `fs prepare --remove` removes it",
        ),
        _ => Check::ok(
            Topic::Appliance,
            format!("{found}; `diskmill fs prepare` makes one that starts faster"),
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

/// guestfs(3), "guestfs_set_tmpdir".
fn tmp(machine: &Machine) -> PathBuf {
    let variable = || std::env::var_os("TMPDIR").filter(|value| !value.is_empty()).map(PathBuf::from);
    machine.settings.tmp_dir.clone().or_else(variable).unwrap_or_else(|| "/tmp".into())
}

pub(super) fn cache_space(machine: &Machine) -> Check {
    if machine.fixed_appliance().is_some() {
        return Check::ok(Topic::Cache, "not needed: the appliance is complete");
    }
    if let Some(builder) = Builder::find(&machine.settings) {
        return Check::note(
            Topic::Cache,
            builder.to_string(),
            "wait until it is done: all others do; end it if it hangs",
        );
    }
    // libguestfs refuses a folder that others could have put an appliance into.
    let own = machine.settings.appliance_cache();
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
    room(Topic::Cache, own.parent().unwrap_or(&own), APPLIANCE, "LIBGUESTFS_CACHEDIR")
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

pub(super) fn leftovers(fix: bool) -> Check {
    let found = Leftovers::find();
    let names = found.names();
    if names.is_empty() {
        return Check::ok(Topic::Leftovers, "none");
    }
    if !fix {
        return Check::note(
            Topic::Leftovers,
            format!("of killed runs: {}", names.join(", ")),
            "`diskmill doctor --fix`, and the next `fs` command, removes them and ends what still runs for them",
        );
    }
    match found.remove() {
        Ok(()) => Check::ok(Topic::Leftovers, format!("removed: {}", names.join(", "))),
        Err(error) => {
            Check::note(Topic::Leftovers, format!("cannot be removed: {error}"), "remove them by hand")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

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
