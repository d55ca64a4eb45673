//! `diskmill create`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use diskmill::convert::TargetFormat;
use diskmill::create::{CreateOptions, create};
use diskmill::{Allow, Format, Image, OpenOptions, OpenPolicy, parse_size};

use crate::exit::{Exit, Failure};
use crate::names::telling_ending;
use crate::options::{asks_for_help, help, split};
use crate::signals::Watch;
use crate::size::human_size;

const EXAMPLES: &str = "\
Examples:
  diskmill create disk.qcow2 40G
  diskmill create -b base.qcow2 overlay.qcow2
  diskmill create -f vmdk -o subformat=monolithicFlat disk.vmdk 8G
  diskmill create -f qcow2 -o help";

const NOTES: &str = "\
Exit codes: 0 done; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
pub(crate) struct CreateArgs {
    /// Format of the image: raw, qcow2 or vmdk [default: what the name ends in, else raw]
    #[arg(short = 'f', long, value_name = "FMT", value_parser = TargetFormat::named)]
    format: Option<TargetFormat>,

    /// Options of the format: NAME=VALUE, several with commas, `,,` for a comma in a value; `help` lists them
    #[arg(short = 'o', long, value_name = "LIST")]
    options: Vec<String>,

    /// The image shows this one until it is written to; relative names start in its own folder
    #[arg(short = 'b', long, visible_short_alias = 'B', value_name = "FILE")]
    backing: Option<String>,

    /// Format of that image [default: detected from its first bytes, if it is not raw]
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    backing_format: Option<Format>,

    /// Do not look for the backing file
    #[arg(short = 'u', long, requires = "backing_format")]
    backing_unsafe: bool,

    /// Replace files that exist: the image, its data file, its extents; or write to a device, where a raw disk is cleared
    /// from end to end
    #[arg(long)]
    force: bool,

    /// Print nothing but errors
    #[arg(short = 'q', long)]
    quiet: bool,

    /// The image
    #[arg(required_unless_present = "options")]
    file: Option<PathBuf>,

    /// Size of the disk in bytes or with a letter of kMGTPE; may be left out if there is a backing file
    #[arg(value_parser = parse_size)]
    size: Option<u64>,
}

pub(crate) fn run(args: &CreateArgs) -> Result<Exit, Failure> {
    let mut format = match (&args.format, &args.file) {
        (Some(format), _) => format.clone(),
        (None, Some(file)) => by_name(file)?,
        (None, None) => TargetFormat::named("raw")?,
    };
    if args.options.iter().any(|list| asks_for_help(list)) {
        io::stdout().write_all(help(&format).as_bytes())?;
        return Ok(Exit::Done);
    }
    let Some(file) = &args.file else { return Err(Failure::usage("the name of the image is missing")) };
    if matches!(format, TargetFormat::Ova(_)) {
        return Err(Failure::failed("an empty OVA is not supported: create a disk and convert it"));
    }
    let mut size = args.size;
    for (name, value) in args.options.iter().flat_map(|list| split(list)) {
        let value = value.as_deref().unwrap_or("on");
        match name.as_str() {
            "size" if args.size.is_some() => {
                return Err(Failure::usage("the size is given twice: as an argument and as -o size"));
            }
            "size" => size = Some(parse_size(value).map_err(Failure::of_request)?),
            name => format.set(name, value).map_err(Failure::of_request)?,
        }
    }
    if let Some(backing) = &args.backing {
        let found = Backing::look(args, file, backing)?;
        format.set("backing_file", backing)?;
        format.set("backing_fmt", found.format.name())?;
        size = size.or(found.size);
    }
    let Some(size) = size else {
        return Err(Failure::usage(format!("the size of the disk is missing: diskmill create {file:?} 10G")));
    };
    let name = format.name();
    let options = CreateOptions { format, size, trust_backing: args.backing_unsafe };
    let files = options.files(file).map_err(Failure::of_request)?;
    if let Some(file) = files.iter().find(|file| file.exists() && !args.force) {
        return Err(Failure::failed(format!("{file:?} exists: --force replaces it")));
    }
    let _watch = Watch::ending()?;
    create(file, &options).map_err(Failure::of_request)?;
    if !args.quiet {
        writeln!(io::stdout(), "{name}, {} ({size} bytes)", human_size(size))?;
    }
    Ok(Exit::Done)
}

/// The format that the name of a file tells.
fn by_name(file: &Path) -> Result<TargetFormat, Failure> {
    let ending = telling_ending(file);
    let format = ending.as_deref().unwrap_or("raw");
    TargetFormat::named(format).map_err(|_| {
        Failure::usage(format!(
            "{file:?}: creating {format} images is not supported; -f raw makes a raw one of this name"
        ))
    })
}

struct Backing {
    format: Format,
    size: Option<u64>,
}

impl Backing {
    fn look(args: &CreateArgs, file: &Path, name: &str) -> Result<Self, Failure> {
        if let (true, Some(format)) = (args.backing_unsafe, args.backing_format) {
            return Ok(Self { format, size: None });
        }
        let path = file.parent().unwrap_or(Path::new("")).join(name);
        let options = OpenOptions {
            format: args.backing_format,
            policy: OpenPolicy { allow: Allow::Backing, paths: Vec::new() },
            // A virtual machine may have it open too.
            force_share: true,
            ..OpenOptions::default()
        };
        // Nothing of its data is looked at: a passphrase is not needed.
        let image = match Image::open(&path, &options) {
            Err(error) if error.lacks_passphrase() => {
                Image::open(&path, &OpenOptions { metadata_only: true, ..options })?
            }
            opened => opened?,
        };
        let format = image.info().format;
        if format == Format::Raw && args.backing_format.is_none() {
            return Err(Failure::failed(format!(
                "{path:?} looks like a raw image, but a guest can make it look like anything: say -F raw"
            )));
        }
        Ok(Self { format, size: Some(image.size()) })
    }
}
