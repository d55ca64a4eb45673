//! `diskmill amend`.

use std::path::PathBuf;

use clap::Args;
use diskmill::edit::Amendment;
use diskmill::{Format, Image, OpenOptions};

use crate::args::OpenArgs;
use crate::exit::{Exit, Failure};
use crate::options::split;

const EXAMPLES: &str = "\
Examples:
  diskmill amend -o compat=1.1 disk.qcow2
  diskmill amend -o refcount_bits=64,lazy_refcounts=on disk.qcow2";

const NOTES: &str = "\
Options: compat (0.10 or 1.1), refcount_bits (1 to 64), lazy_refcounts (on or off), size, data_file (another name for the
external data file), data_file_raw (off). The guest's data stays as it is. For the backing file see `diskmill rebase`.
Exit codes: 0 done; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
pub(crate) struct AmendArgs {
    /// Format of the image: only qcow2 can be amended [default: told by its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// What is to change: NAME=VALUE, several with commas
    #[arg(short = 'o', long, value_name = "LIST", required = true)]
    options: Vec<String>,

    /// qemu-img's switches for progress, silence and force: accepted and ignored, it takes no time and asks nothing
    #[arg(short = 'p', long, hide = true)]
    _progress: bool,

    /// Print nothing but errors: the default
    #[arg(short = 'q', long, hide = true)]
    _quiet: bool,

    /// Accepted and ignored
    #[arg(long, hide = true)]
    _force: bool,

    #[command(flatten)]
    open: OpenArgs,

    /// The image
    file: PathBuf,
}

pub(crate) fn run(args: &AmendArgs) -> Result<Exit, Failure> {
    let mut changes = Amendment::default();
    for (name, value) in args.options.iter().flat_map(|list| split(list)) {
        changes.set(&name, value.as_deref().unwrap_or("on"))?;
    }
    let options = OpenOptions { writable: true, ..args.open.options(args.format) };
    let mut image = Image::open(&args.file, &options)?;
    image.amend(&changes)?;
    image.close()?;
    Ok(Exit::Done)
}
