//! `diskmill resize`.

use std::io::{self, Write};
use std::path::PathBuf;

use clap::Args;
use diskmill::edit::Preallocation;
use diskmill::{Format, Image, OpenOptions, parse_size};

use crate::args::OpenArgs;
use crate::exit::{Exit, Failure};
use crate::size::human_size;

const EXAMPLES: &str = "\
Examples:
  diskmill resize disk.qcow2 40G
  diskmill resize disk.qcow2 +10G
  diskmill resize --shrink disk.raw -512M";

const NOTES: &str = "\
Partitions and file systems on the disk stay as they are: shrink them before the disk, and grow them after it \
(`diskmill fs grow` does both in one go for a disk that grows). Exit codes: 0 done; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
pub(crate) struct ResizeArgs {
    /// Format of the image: raw or qcow2 [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// Let the disk become shorter: what lies behind its new end is lost
    #[arg(long)]
    shrink: bool,

    /// What the new area gets: off, metadata (places in a qcow2 image's tables), falloc (reserved blocks), full (zeros)
    #[arg(long, value_name = "MODE", default_value = "off")]
    preallocation: Preallocation,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    quiet: bool,

    #[command(flatten)]
    open: OpenArgs,

    /// The image
    file: PathBuf,

    /// The new size of the disk in bytes or with a letter of kMGTPE, or +SIZE or -SIZE for a difference
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: Wanted,
}

/// A size, or a difference to the present one.
#[derive(Debug, Clone, Copy)]
enum Wanted {
    Exactly(u64),
    More(u64),
    Less(u64),
}

impl std::str::FromStr for Wanted {
    type Err = diskmill::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match (text.strip_prefix('+'), text.strip_prefix('-')) {
            (Some(more), _) => Self::More(parse_size(more)?),
            (_, Some(less)) => Self::Less(parse_size(less)?),
            _ => Self::Exactly(parse_size(text)?),
        })
    }
}

pub(crate) fn run(args: &ResizeArgs) -> Result<Exit, Failure> {
    let options = OpenOptions { writable: true, ..args.open.options(args.format) };
    let mut image = Image::open(&args.file, &options)?;
    let old = image.size();
    let size = match args.size {
        Wanted::Exactly(size) => Some(size),
        Wanted::More(more) => old.checked_add(more),
        Wanted::Less(less) => old.checked_sub(less),
    };
    let Some(size) = size.filter(|&size| size > 0) else {
        return Err(Failure::failed(format!("the disk has {old} bytes: no bytes would be left")));
    };
    if size < old && !args.shrink {
        return Err(Failure::failed(format!(
            "the disk has {old} bytes, and what lies behind its first {size} would be lost: --shrink allows that"
        )));
    }
    if args.preallocation != Preallocation::Off && size <= old {
        return Err(Failure::failed(format!(
            "--preallocation is for disks that grow, and this one has {old} bytes"
        )));
    }
    image.resize(size, args.preallocation)?;
    let now = image.size();
    image.close()?;
    if !args.quiet {
        let (old, new) = (human_size(old), human_size(now));
        writeln!(io::stdout(), "{old} -> {new} ({now} bytes)")?;
    }
    Ok(Exit::Done)
}
