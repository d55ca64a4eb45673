//! `sparsify`: blocks that no file system uses go back to the host.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use diskmill::convert::{ConvertOptions, TargetFormat, convert_unnamed};
use diskmill::{Format, Image};
use diskmill_guestfs::Command;
use serde_json::json;

use super::args::ImageArgs;
use super::copy::host_failure;
use super::guest::{Access, Guest};
use super::output::print_json;
use super::reply::{pairs, texts};
use super::watch;
use crate::args::ProgressArgs;
use crate::exit::{Exit, Failure};
use crate::job;
use crate::size::human_size;
use crate::{names, say};

/// Bytes of a swap area that are kept: its header takes a page, and Linux has none larger.
const SWAP_HEADER: u64 = 64 << 10;
/// The logical volume that takes what is free in its group.
const UNUSED: &str = "diskmill-unused";

#[derive(Debug, Args)]
#[command(override_usage = "diskmill fs sparsify [OPTIONS] <IMAGE> <TARGET>\n       \
                            diskmill fs sparsify [OPTIONS] --in-place <IMAGE>")]
pub(crate) struct SparsifyArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// The image
    #[arg(value_name = "IMAGE")]
    pub(crate) file: PathBuf,

    /// Make a sparse copy, which is not encrypted, and leave IMAGE as it is
    #[arg(value_name = "TARGET", required_unless_present = "in_place", conflicts_with = "in_place")]
    pub(crate) target: Option<PathBuf>,

    /// Change IMAGE itself
    #[arg(long)]
    pub(crate) in_place: bool,

    /// Replace TARGET if it exists
    #[arg(long, conflicts_with = "in_place")]
    pub(crate) force: bool,

    /// Format of TARGET [default: that of IMAGE]
    #[arg(short = 'O', long, value_name = "FMT", conflicts_with = "in_place")]
    pub(crate) target_format: Option<String>,
}

pub(crate) fn sparsify(args: &SparsifyArgs) -> Result<Exit, Failure> {
    args.image.check(Access::Write)?;
    let before = allocated(&args.file)?;
    let (trimmed, after) = match &args.target {
        None => (trim(&args.image, &args.file)?, allocated(&args.file)?),
        Some(target) => copy(args, target)?,
    };
    if args.image.json {
        return print_json(
            &json!({ "allocated-before": before, "allocated": after, "trimmed": trimmed.as_slice() }),
        );
    }
    if !args.image.quiet {
        eprintln!("diskmill: {} before, {} now", human_size(before), human_size(after));
    }
    Ok(Exit::Done)
}

/// Bytes that the file takes on its disk.
fn allocated(file: &Path) -> Result<u64, Failure> {
    let meta = std::fs::metadata(file).map_err(|error| host_failure(file, &error))?;
    Ok(meta.blocks().saturating_mul(512))
}

/// Discards what file systems, swap areas and volume groups do not use, and tells of which. What takes no discards, such as
/// what is encrypted inside the image, stays as it is.
fn trim(args: &ImageArgs, file: &Path) -> Result<Vec<String>, Failure> {
    let mut guest = Guest::unmounted(args, file, Access::Write)?;
    let mut trimmed = Vec::new();
    for (device, content) in pairs(&guest.call(Command::new("list-filesystems"))?) {
        let done = match content.as_str() {
            "unknown" | "crypto_LUKS" | "LVM2_member" => continue,
            _ if device.starts_with("btrfsvol:") => continue,
            "swap" => trim_swap(&mut guest, &device)?,
            _ => trim_filesystem(&mut guest, &device)?,
        };
        if done {
            trimmed.push(device);
        } else {
            let (device, content) = (names::shown(&device), names::shown(&content));
            guest.remark(&format!("{device} ({content}) is left as it is: it takes no discards"));
        }
    }
    for group in texts(&guest.call(Command::new("vgs"))?) {
        if trim_group(&mut guest, &group)? {
            trimmed.push(group);
        }
    }
    guest.finish()?;
    Ok(trimmed)
}

fn trim_filesystem(guest: &mut Guest, device: &str) -> Result<bool, Failure> {
    if guest.try_call(Command::new("mount").arg(device).arg("/"))?.is_none() {
        return Ok(false);
    }
    let done = guest.try_call(Command::new("fstrim").arg("/"))?.is_some();
    guest.call(Command::new("umount-all"))?;
    Ok(done)
}

/// Discards all of a swap area but its header, with the label and the UUID that fstab may name.
fn trim_swap(guest: &mut Guest, device: &str) -> Result<bool, Failure> {
    let mut header = Vec::new();
    let read = Command::new("download-offset").arg(device).output().arg("0").arg(SWAP_HEADER.to_string());
    guest.send(&read, None, &mut header)?;
    let done = guest.try_call(Command::new("blkdiscard").arg(device))?.is_some();
    let write = Command::new("upload-offset").input().arg(device).arg("0");
    guest.send(&write, Some(&mut header.as_slice()), &mut io::sink())?;
    Ok(done)
}

/// Discards what no logical volume of the group has, through one that takes all of it for a moment.
fn trim_group(guest: &mut Guest, group: &str) -> Result<bool, Failure> {
    let volume = format!("/dev/{group}/{UNUSED}");
    if texts(&guest.call(Command::new("lvs"))?).contains(&volume) {
        // A run that was killed has left it.
        guest.call(Command::new("lvremove").arg(&volume))?;
    }
    if guest.try_call(Command::new("lvcreate-free").arg(UNUSED).arg(group).arg("100"))?.is_none() {
        // Nothing is free.
        return Ok(false);
    }
    let done = guest.try_call(Command::new("blkdiscard").arg(&volume))?.is_some();
    guest.call(Command::new("lvremove").arg(&volume))?;
    Ok(done)
}

/// Copies by our own engine, which leaves zeros out, then trims the copy, which gets its name when it is done.
fn copy(args: &SparsifyArgs, target: &Path) -> Result<(Vec<String>, u64), Failure> {
    if args.image.keep {
        return Err(Failure::usage(
            "--keep is not supported with a TARGET, which is new: only with --in-place",
        ));
    }
    if target.exists() && !args.force {
        return Err(Failure::failed(format!("{target:?} exists: --force replaces it")));
    }
    let source = Image::open(&args.file, &args.image.open.options(args.image.format))?;
    let name = match &args.target_format {
        Some(format) => format.clone(),
        None => source.info().format.name().to_owned(),
    };
    let target_format = TargetFormat::named(&name).map_err(|error| Failure::usage(error.to_string()))?;
    let format = name.parse().ok().filter(|format| *format != Format::Ova);
    let Some(format) = format else {
        return Err(Failure::failed(format!(
            "sparsifying into {name} is not supported: use -O raw, -O qcow2 or -O vmdk"
        )));
    };
    if source.info().is_encrypted() && !args.image.quiet {
        say::warning(format_args!("{:?} is encrypted, its copy is not (--in-place keeps it so)", args.file));
    }
    let options = ConvertOptions { format: target_format, ..ConvertOptions::default() };
    let progress = ProgressArgs { show: false, mode: None, quiet: args.image.quiet };
    // A signal between the copy and the appliance counts, too.
    watch::install()?;
    let (_, fresh) = job::run(
        &progress,
        args.image.json,
        |_| Exit::Failed,
        |monitor| convert_unnamed(&[source], target, &options, monitor),
    )?;
    let trimmed = trim(&ImageArgs { format: Some(format), ..args.image.clone() }, fresh.path());
    // Until it is done it has a name of its own, which nobody knows.
    let trimmed = trimmed.map_err(|mut failure| {
        let [own, known] =
            [fresh.path(), target].map(|path| names::shown(&path.to_string_lossy()).into_owned());
        failure.message = failure.message.map(|message| message.replace(&own, &known));
        failure
    })?;
    fresh.publish(true)?;
    Ok((trimmed, allocated(target)?))
}
