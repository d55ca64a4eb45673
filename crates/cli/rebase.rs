//! `diskmill rebase`.

use std::path::PathBuf;

use clap::Args;
use diskmill::Format;
use diskmill::edit::{Rebase, RebaseMode};

use crate::args::{CacheMode, OpenArgs, ProgressArgs};
use crate::exit::{Exit, Failure};
use crate::job;

const EXAMPLES: &str = "\
Examples:
  diskmill rebase -b new-base.qcow2 overlay.qcow2     the disk stays the same: what differs is copied into the overlay
  diskmill rebase --flatten overlay.qcow2             the overlay needs no backing file any more
  diskmill rebase --flatten -c overlay.qcow2          the same, and what is copied is compressed
  diskmill rebase -u -b ../moved/base.qcow2 -F qcow2 overlay.qcow2";

const CODES: &str = "\
The image must not be in use. Exit codes: 0 done; 1 error; 2 wrong usage; 128 + n: ended by signal n. After an error or a \
signal the image still has its old backing file, and the disk is as it was.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = CODES)]
pub(crate) struct RebaseArgs {
    /// Format of the image: qcow2 [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// The new backing file, by the name that the image will have for it: relative to the image's folder. An empty name is
    /// --flatten
    #[arg(short = 'b', long, value_name = "FILE", required_unless_present = "flatten")]
    backing: Option<String>,

    /// Format of the new backing file [default: detected from its first bytes]
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    backing_format: Option<Format>,

    /// Copy all that the backing file has into the image, which then stands alone
    #[arg(long, conflicts_with = "backing")]
    flatten: bool,

    /// Unsafe: only change the name, without a look at either backing file; for files that were moved. Needs -F
    #[arg(short = 'u', long)]
    backing_unsafe: bool,

    /// Compress what is copied into the image
    #[arg(short = 'c', long, conflicts_with = "backing_unsafe")]
    compress: bool,

    /// qemu-img's cache mode for the image: accepted and ignored
    #[arg(short = 't', long = "cache", value_name = "CACHE")]
    _cache: Option<CacheMode>,

    /// qemu-img's cache mode for the backing files: accepted and ignored
    #[arg(short = 'T', long = "backing-cache", value_name = "CACHE")]
    _backing_cache: Option<CacheMode>,

    #[command(flatten)]
    progress: ProgressArgs,

    #[command(flatten)]
    open: OpenArgs,

    /// The image
    file: PathBuf,
}

pub(crate) fn run(args: &RebaseArgs) -> Result<Exit, Failure> {
    let mode = if args.backing_unsafe { RebaseMode::Unsafe } else { RebaseMode::Safe };
    let backing = args.backing.as_deref().filter(|name| !name.is_empty());
    if backing.is_some() && args.backing_unsafe && args.backing_format.is_none() {
        return Err(Failure::usage("-u needs the format of the backing file (-F), which is not looked at"));
    }
    let mut rebase = Rebase::open(&args.file, &args.open.options(args.format), mode)?;
    if args.compress {
        rebase.compress()?;
    }
    if let Some(name) = backing {
        rebase.onto(name, args.backing_format)?;
    }
    job::run(&args.progress, false, |_| Exit::Failed, |monitor| rebase.run(monitor))?;
    Ok(Exit::Done)
}
