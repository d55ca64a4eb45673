//! `diskmill amend`.

use std::path::PathBuf;

use clap::Args;
use diskmill::edit::Amendment;
use diskmill::{Format, Image, OpenOptions, Secret};

use crate::args::OpenArgs;
use crate::exit::{Exit, Failure};
use crate::options::split;
use crate::secrets;

const EXAMPLES: &str = "\
Examples:
  diskmill amend -o compat=1.1 disk.qcow2
  diskmill amend -o refcount_bits=64,lazy_refcounts=on disk.qcow2
  diskmill amend --key-file old.key --new-key-file new.key disk.qcow2     both passphrases open the image
  diskmill amend --key-file new.key --erase-key-file old.key disk.qcow2   the old one does not any more";

const NOTES: &str = "\
Options: compat (0.10 or 1.1), refcount_bits (1 to 64), lazy_refcounts (on or off), size, data_file (another name for the \
external data file), data_file_raw (off); for LUKS encrypt.state (active adds a passphrase, inactive erases), \
encrypt.keyslot (0 to 7), encrypt.iter-time (milliseconds), encrypt.new-secret and encrypt.old-secret (ids of --object). The guest's data stays as it is. For the backing file see `diskmill rebase`.
Exit codes: 0 done; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
pub(crate) struct AmendArgs {
    /// Format of the image: only qcow2 can be amended [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// What is to change: NAME=VALUE, several with commas
    #[arg(short = 'o', long, value_name = "LIST", required_unless_present_any = ["new_key_file", "erase_key_file"])]
    options: Vec<String>,

    /// qemu-img's switches for progress, silence and force: accepted and ignored, it takes no time and asks nothing
    #[arg(short = 'p', long, hide = true)]
    _progress: bool,

    /// Print nothing but errors: the default
    #[arg(short = 'q', long, hide = true)]
    _quiet: bool,

    /// Overwrite a key slot that is in use, or erase the last one, with which all data is lost
    #[arg(long)]
    force: bool,

    /// Add this passphrase of a LUKS image, from this file (encrypt.state=active); --key-file has one that opens it
    #[arg(long, value_name = "FILE", value_parser = secrets::from_file, conflicts_with = "erase_key_file")]
    new_key_file: Option<Secret>,

    /// Erase the key slots that this passphrase opens, from this file (encrypt.state=inactive)
    #[arg(long, value_name = "FILE", value_parser = secrets::from_file)]
    erase_key_file: Option<Secret>,

    #[command(flatten)]
    open: OpenArgs,

    /// The image
    file: PathBuf,
}

pub(crate) fn run(args: &AmendArgs) -> Result<Exit, Failure> {
    let mut changes = Amendment::default();
    for (name, value) in args.options.iter().flat_map(|list| split(list)) {
        changes.set(&name, value.as_deref().unwrap_or("on")).map_err(Failure::of_request)?;
    }
    let options = OpenOptions { writable: true, ..args.open.options(args.format) };
    if args.new_key_file.is_some() || args.erase_key_file.is_some() {
        let keys = changes.keys.get_or_insert_default();
        keys.active.get_or_insert(args.new_key_file.is_some());
        (keys.new, keys.old) = (args.new_key_file.clone(), args.erase_key_file.clone());
    }
    if let Some(keys) = &mut changes.keys {
        for (name, secret) in [(&keys.new_secret, &mut keys.new), (&keys.old_secret, &mut keys.old)] {
            if let Some(id) = name {
                let found = args.open.secret(id);
                *secret =
                    Some(found.ok_or_else(|| Failure::usage(format!("there is no --object of id {id:?}")))?);
            }
        }
        keys.keys.clone_from(&options.keys);
        keys.force = args.force;
    }
    let mut image = Image::open(&args.file, &options)?;
    image.amend(&changes)?;
    image.close()?;
    Ok(Exit::Done)
}
