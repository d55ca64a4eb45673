//! `diskmill bitmap`: persistent bitmaps of qcow2 images.

use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::Args;
use diskmill::qcow2::Bitmap;
use diskmill::{Format, Image, OpenOptions, parse_size};
use serde_json::{Value, json};

use crate::args::{OpenArgs, OutputArgs, OutputForm};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::names::shown;
use crate::size::human_size;

const EXAMPLES: &str = "\
Examples:
  diskmill bitmap disk.qcow2                        # list them
  diskmill bitmap disk.qcow2 backup-1               # what was written since
  diskmill bitmap --add -g 64k disk.qcow2 backup-1
  diskmill bitmap --merge delta -b overlay.qcow2 disk.qcow2 backup-1
Changes are made in this order: remove, add, clear, merge, enable or disable.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES)]
pub(crate) struct BitmapArgs {
    /// Add the bitmap, enabled unless --disable is given too
    #[arg(long)]
    add: bool,

    /// Remove the bitmap
    #[arg(long)]
    remove: bool,

    /// Take all marks out of the bitmap
    #[arg(long)]
    clear: bool,

    /// Record the guest's writes in the bitmap
    #[arg(long, conflicts_with = "disable")]
    enable: bool,

    /// Do not record the guest's writes
    #[arg(long)]
    disable: bool,

    /// Add the marks of this bitmap
    #[arg(long, value_name = "BITMAP")]
    merge: Vec<String>,

    /// Image that has the bitmaps of --merge [default: FILE]
    #[arg(short = 'b', long, value_name = "SOURCE", requires = "merge")]
    source_file: Option<PathBuf>,

    /// Format of that image
    #[arg(short = 'F', long, value_name = "FMT", requires = "source_file")]
    source_format: Option<Format>,

    /// Guest bytes that one bit of a new bitmap stands for, a power of 2 from 512 to 2G [default: the cluster size, from
    /// 4k to 64k]
    #[arg(short = 'g', long, value_name = "SIZE", value_parser = parse_size, requires = "add")]
    granularity: Option<u64>,

    /// Format of the image: qcow2 [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    #[command(flatten)]
    open: OpenArgs,

    #[command(flatten)]
    output: OutputArgs,

    /// The image
    file: PathBuf,

    /// The bitmap
    bitmap: Option<String>,
}

impl BitmapArgs {
    fn changes(&self) -> bool {
        self.add || self.remove || self.clear || self.enable || self.disable || !self.merge.is_empty()
    }
}

pub(crate) fn run(args: &BitmapArgs) -> Result<Exit, Failure> {
    let options = args.open.options(args.format);
    let text = match &args.bitmap {
        Some(bitmap) if args.changes() => {
            change(args, bitmap, &options)?;
            return Ok(Exit::Done);
        }
        Some(bitmap) => ranges(&Image::open(&args.file, &options)?, bitmap, args.output.form())?,
        None if args.changes() => return Err(Failure::usage("the name of the bitmap is missing")),
        None => list(&Image::open(&args.file, &options)?, args.output.form())?,
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(Exit::Done)
}

fn change(args: &BitmapArgs, bitmap: &str, options: &OpenOptions) -> Result<(), Failure> {
    let mut image = Image::open(&args.file, &OpenOptions { writable: true, ..options.clone() })?;
    if args.remove {
        image.remove_bitmap(bitmap)?;
    }
    if args.add {
        image.add_bitmap(bitmap, args.granularity, !args.disable)?;
    }
    if args.clear {
        image.clear_bitmap(bitmap)?;
    }
    if !args.merge.is_empty() {
        let source = match &args.source_file {
            Some(file) => Some(Image::open(file, &args.open.options(args.source_format))?),
            None => None,
        };
        for other in &args.merge {
            let bits = source.as_ref().unwrap_or(&image).dirty_bits(other)?;
            image.merge_bitmap(bitmap, &bits)?;
        }
    }
    if args.enable || (args.disable && !args.add) {
        image.enable_bitmap(bitmap, args.enable)?;
    }
    Ok(image.close()?)
}

/// Guest bytes that are marked; `None` for a bitmap that was not saved or is damaged.
fn marked(image: &Image, bitmap: &Bitmap) -> Option<u64> {
    let bits = image.dirty_bits_of(bitmap).ok()?;
    Some(bits.ranges().map(|range| range.end - range.start).sum())
}

fn list(image: &Image, form: OutputForm) -> Result<String, Failure> {
    let bitmaps = image.bitmaps()?;
    if form == OutputForm::Json {
        let all: Value = bitmaps
            .iter()
            .map(|bitmap| {
                json!({
                    "name": String::from_utf8_lossy(&bitmap.name),
                    "granularity": bitmap.granularity(),
                    "enabled": bitmap.auto,
                    "in-use": bitmap.in_use,
                    "dirty-bytes": marked(image, bitmap),
                })
            })
            .collect();
        return Ok(qemu_style(&all) + "\n");
    }
    if bitmaps.is_empty() {
        return Ok("The image has no bitmaps.\n".to_owned());
    }
    let mut out = format!("{:>11} {:>12} {:<9} NAME\n", "GRANULARITY", "DIRTY", "STATE");
    for bitmap in &bitmaps {
        let state = match bitmap {
            Bitmap { in_use: true, .. } => "not saved",
            Bitmap { auto: true, .. } => "enabled",
            _ => "disabled",
        };
        let dirty = marked(image, bitmap).map_or_else(|| "unknown".to_owned(), human_size);
        let (granularity, name) = (human_size(bitmap.granularity()), String::from_utf8_lossy(&bitmap.name));
        out += &format!("{granularity:>11} {dirty:>12} {state:<9} {}\n", shown(&name));
    }
    Ok(out)
}

fn ranges(image: &Image, bitmap: &str, form: OutputForm) -> Result<String, Failure> {
    let bits = image.dirty_bits(bitmap)?;
    Ok(match form {
        OutputForm::Json => {
            let all: Value = bits
                .ranges()
                .map(|range| json!({ "start": range.start, "length": range.end - range.start }))
                .collect();
            qemu_style(&all) + "\n"
        }
        OutputForm::Human => {
            let rows =
                bits.ranges().map(|range| format!("{:>16} {:>16}\n", range.start, range.end - range.start));
            std::iter::once(format!("{:>16} {:>16}\n", "START", "LENGTH")).chain(rows).collect()
        }
    })
}
