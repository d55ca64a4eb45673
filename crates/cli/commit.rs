//! `diskmill commit`.

use std::path::PathBuf;

use clap::Args;
use diskmill::edit::{Commit, CommitOptions};
use diskmill::{Format, parse_size};

use crate::args::{CacheMode, OpenArgs, ProgressArgs};
use crate::exit::{Exit, Failure};
use crate::job;

const EXAMPLES: &str = "\
Examples:
  diskmill commit overlay.qcow2                   the backing file gets what the overlay has; the overlay is emptied
  diskmill commit -b base.qcow2 overlay.qcow2     the same for a file further down; the overlay stays as it is";

const CODES: &str = "\
Neither file may be in use. Other images over the same backing file show something else afterwards. Exit codes: 0 done; \
1 error; 2 wrong usage; 128 + n: ended by signal n. After an error or a signal the overlay is as it was.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = CODES)]
pub(crate) struct CommitArgs {
    /// Format of the overlay [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// Commit to this file of the backing chain, and not only to the overlay's own backing file. Those between show
    /// something else afterwards. Implies -d
    #[arg(short = 'b', long, value_name = "FILE")]
    base: Option<PathBuf>,

    /// Do not empty the overlay: it is thrown away anyway
    #[arg(short = 'd', long)]
    drop: bool,

    /// qemu-img's rate limit: accepted and ignored
    #[arg(short = 'r', long = "rate", value_name = "SIZE", value_parser = parse_size)]
    _rate: Option<u64>,

    /// qemu-img's cache mode: accepted and ignored
    #[arg(short = 't', long = "cache", value_name = "CACHE")]
    _cache: Option<CacheMode>,

    #[command(flatten)]
    progress: ProgressArgs,

    #[command(flatten)]
    open: OpenArgs,

    /// The overlay
    file: PathBuf,
}

pub(crate) fn run(args: &CommitArgs) -> Result<Exit, Failure> {
    let options = CommitOptions {
        open: args.open.options(args.format),
        base: args.base.clone(),
        keep_overlay: args.drop,
    };
    let commit = Commit::open(&args.file, &options)?;
    job::run(&args.progress, false, |_| Exit::Failed, |monitor| commit.run(monitor))?;
    Ok(Exit::Done)
}
