//! `prepare`: builds the appliance that later commands use.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use diskmill_guestfs::{Disk, Prepared, Session};
use serde_json::json;

use super::output::print_json;
use super::settings::{SettingsArgs, asked_for};
use super::watch::Watch;
use crate::exit::{Exit, Failure};
use crate::names;

/// Bytes of the disk that the appliance is tried with.
const DISK: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(crate) struct PrepareArgs {
    /// Build it anew, even if there is one that fits
    #[arg(long, conflicts_with = "remove")]
    force: bool,

    /// Remove it
    #[arg(long)]
    remove: bool,

    /// Build it in this folder, for others too: LIBGUESTFS_PATH=DIR and LIBGUESTFS_HV=DIR/hv use it
    #[arg(long, value_name = "DIR", conflicts_with_all = ["force", "remove"])]
    into: Option<PathBuf>,

    /// Do not try whether it starts
    #[arg(long, conflicts_with = "remove")]
    no_start: bool,

    #[command(flatten)]
    settings: SettingsArgs,

    /// Print one JSON value
    #[arg(long)]
    json: bool,

    /// No remarks: only errors
    #[arg(short = 'q', long)]
    quiet: bool,
}

pub(crate) fn prepare(args: &PrepareArgs) -> Result<Exit, Failure> {
    let watch = Watch::start(args.quiet)?;
    let failed = |error| watch.failure(error);
    if args.remove {
        let removed = Prepared::remove().map_err(failed)?;
        if args.json {
            return print_json(&json!({ "removed": removed }));
        }
        if !removed && !args.quiet {
            eprintln!("diskmill: there is no prepared appliance");
        }
        return Ok(Exit::Done);
    }
    let settings = || asked_for(&args.settings).map(|(settings, _)| settings);
    let there = Prepared::find().filter(|_| !args.force && args.into.is_none());
    let built = there.is_none();
    let prepared = match (there, &args.into) {
        (Some(prepared), _) => prepared,
        (None, Some(folder)) => Prepared::build_into(&settings()?, folder).map_err(failed)?,
        (None, None) => Prepared::build(&settings()?).map_err(failed)?,
    };
    // What does not start is worse than none.
    let seconds = if built && !args.no_start {
        let tried = try_out(args, &prepared, &watch);
        Some(tried.inspect_err(|_| drop(std::fs::remove_dir_all(prepared.folder())))?)
    } else {
        None
    };
    let folder = prepared.folder().to_string_lossy();
    if args.json {
        return print_json(&json!({
            "folder": folder,
            "built": built,
            "kernel-unpacked": prepared.packed().is_none(),
            "start-seconds": seconds,
        }));
    }
    if !args.quiet {
        let start = match seconds {
            Some(seconds) => format!(", starts in {seconds:.1} s"),
            None if built => "; it was not tried".to_owned(),
            None => "; it was there already".to_owned(),
        };
        eprintln!("diskmill: the appliance in {} is ready{start}", names::shown(&folder));
        if let Some(reason) = prepared.packed() {
            eprintln!("diskmill: its kernel is unpacked by each start: {reason}");
        }
    }
    Ok(Exit::Done)
}

/// Starts it; how many seconds that takes.
fn try_out(args: &PrepareArgs, prepared: &Prepared, watch: &Watch) -> Result<f64, Failure> {
    let no_disk = |error: std::io::Error| Failure::failed(format!("cannot make a disk: {error}"));
    let disk = tempfile::NamedTempFile::new().map_err(no_disk)?;
    disk.as_file().set_len(DISK).map_err(no_disk)?;
    let mut options = watch.options(&args.settings, DISK)?;
    if args.into.is_some() {
        (options.settings.appliance, options.settings.hypervisor) = (None, None);
        prepared.apply(&mut options.settings);
    }
    let began = Instant::now();
    let session = Session::open(&[Disk::file(disk.path(), "raw")], options);
    let session = session.map_err(|error| watch.failure(error.of("the appliance that was built")))?;
    let seconds = began.elapsed().as_secs_f64();
    watch.clear();
    session.close().map_err(|error| watch.failure(error))?;
    Ok(seconds)
}
