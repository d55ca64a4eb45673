//! `diskmill measure`, with qemu-img's figures and JSON.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use diskmill::convert::TargetFormat;
use diskmill::measure::{Disk, Measured, measure};
use diskmill::{Format, Image, OpenOptions, parse_size};
use serde_json::{Map, Value};

use crate::args::{OpenArgs, OutputArgs, OutputForm, snapshot_ref};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::options;
use crate::size::human_size;

const EXAMPLES: &str = "\
Examples:
  diskmill measure -O qcow2 disk.vmdk
  diskmill measure -O qcow2 -o cluster_size=2M --size 1T";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES)]
pub(crate) struct MeasureArgs {
    /// Format of the image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT", requires = "file")]
    format: Option<Format>,

    /// Format that the disk would be stored in: raw or qcow2
    #[arg(short = 'O', long, visible_alias = "output-format", value_name = "FMT", default_value = "raw", value_parser = TargetFormat::named)]
    target_format: TargetFormat,

    /// Options of that format: NAME=VALUE, several with commas
    #[arg(short = 'o', long, value_name = "LIST")]
    options: Vec<String>,

    /// Measure an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, value_name = "SNAPSHOT", requires = "file")]
    snapshot: Option<String>,

    /// Measure an empty disk of this size
    #[arg(short = 's', long, value_name = "SIZE", value_parser = parse_size, required_unless_present = "file", conflicts_with = "file")]
    size: Option<u64>,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    output: OutputArgs,

    /// The image
    file: Option<PathBuf>,
}

pub(crate) fn run(args: &MeasureArgs) -> Result<Exit, Failure> {
    let mut format = args.target_format.clone();
    for list in &args.options {
        options::apply(&mut format, list)?;
    }
    let image = match &args.file {
        Some(file) => {
            let snapshot = args.snapshot.as_deref().map(snapshot_ref);
            Some(Image::open(file, &OpenOptions { snapshot, ..args.open.options(args.format) })?)
        }
        None => None,
    };
    let disk = image.as_ref().map_or(Disk::Empty(args.size.unwrap_or_default()), Disk::Of);
    let measured = measure(disk, &format).map_err(Failure::of_request)?;
    let text = match args.output.form() {
        OutputForm::Json => as_json(&measured),
        OutputForm::Human => lines(&measured, |bytes| format!("{} ({bytes} bytes)", human_size(bytes))),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(Exit::Done)
}

/// The figures as qemu-img's JSON.
pub(crate) fn as_json(measured: &Measured) -> String {
    let mut out = Map::new();
    if let Some(bitmaps) = measured.bitmaps {
        out.insert("bitmaps".to_owned(), bitmaps.into());
    }
    out.insert("required".to_owned(), measured.required.into());
    out.insert("fully-allocated".to_owned(), measured.fully_allocated.into());
    qemu_style(&Value::Object(out)) + "\n"
}

/// The figures as lines of qemu-img's, each with its size as `shown`.
pub(crate) fn lines(measured: &Measured, shown: impl Fn(u64) -> String) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}\n",
        shown(measured.required),
        shown(measured.fully_allocated)
    );
    if let Some(bitmaps) = measured.bitmaps {
        text += &format!("bitmaps size: {}\n", shown(bitmaps));
    }
    text
}
