//! `sparsify`: blocks that no file system uses go back to the host.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use diskmill::convert::{ConvertOptions, Monitor, TargetFormat};
use diskmill::{Format, Image};
use serde_json::json;

use super::args::ImageArgs;
use super::copy::host_failure;
use super::drive::Drive;
use super::external::Tool;
use super::output::print_json;
use crate::exit::{Exit, Failure};
use crate::size::human_size;

#[derive(Debug, Args)]
pub(crate) struct SparsifyArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// The image
    #[arg(value_name = "IMAGE")]
    pub(crate) file: PathBuf,

    /// Make a sparse copy and leave IMAGE as it is
    #[arg(value_name = "TARGET", required_unless_present = "in_place", conflicts_with = "in_place")]
    pub(crate) target: Option<PathBuf>,

    /// Change IMAGE itself
    #[arg(long)]
    pub(crate) in_place: bool,

    /// Format of TARGET [default: that of IMAGE]
    #[arg(short = 'O', long, value_name = "FMT", conflicts_with = "in_place")]
    pub(crate) target_format: Option<String>,
}

pub(crate) fn sparsify(args: &SparsifyArgs) -> Result<Exit, Failure> {
    if args.image.keep {
        return Err(Failure::usage(
            "--keep is not supported by sparsify: virt-sparsify has an appliance of its own",
        ));
    }
    let before = allocated(&args.file)?;
    let after = match &args.target {
        None => {
            in_place(args, &args.file, args.image.format)?;
            allocated(&args.file)?
        }
        Some(target) => copy(args, target)?,
    };
    if args.image.json {
        return print_json(&json!({ "allocated-before": before, "allocated": after }));
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

/// virt-sparsify trims the file systems, and QEMU gives the blocks back.
fn in_place(args: &SparsifyArgs, file: &Path, format: Option<Format>) -> Result<(), Failure> {
    let drive = Drive::for_writing(&args.image.open, format, file)?;
    let mut tool = Tool::new("virt-sparsify", &args.image.settings)?;
    tool.arg("--in-place").arg(drive.format_argument()).keys(&args.image.key)?;
    if args.image.quiet || args.image.json {
        tool.arg("--quiet");
        tool.process().stdout(std::process::Stdio::null());
    }
    tool.arg("--").arg(std::path::absolute(file).map_err(|error| host_failure(file, &error))?);
    tool.run_well()
}

/// Copies by our own engine, which leaves zeros out, then sparsifies the copy, which gets its name when it is done.
fn copy(args: &SparsifyArgs, target: &Path) -> Result<u64, Failure> {
    let source = Image::open(&args.file, &args.image.open.options(args.image.format))?;
    let format = match &args.target_format {
        Some(format) => format.clone(),
        None => source.info().format.name().to_owned(),
    };
    let target_format = TargetFormat::named(&format).map_err(|error| Failure::usage(error.to_string()))?;
    let read_as = match format.as_str() {
        "raw" => Format::Raw,
        "qcow2" => Format::Qcow2,
        other => {
            return Err(Failure::failed(format!(
                "sparsifying into {other} is not supported: use -O raw or -O qcow2"
            )));
        }
    };
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let work = tempfile::Builder::new().prefix(".diskmill-").tempdir_in(folder);
    let work = work.map_err(|error| host_failure(folder, &error))?;
    let fresh = work.path().join("copy");
    let options = ConvertOptions { format: target_format, ..ConvertOptions::default() };
    diskmill::convert::convert(&[source], fresh.clone().into(), &options, &Monitor::new())?;
    in_place(args, &fresh, Some(read_as))?;
    std::fs::rename(&fresh, target).map_err(|error| host_failure(target, &error))?;
    allocated(target)
}
