//! `qemu-img create`.

use std::ffi::OsStr;
use std::fs;
use std::io::{Write, stdout};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use diskmill::convert::{ConvertOptions, Monitor, convert};
use diskmill::create::{CreateOptions, create, create_luks};
use diskmill::{Error, Image, Kind, OpenOptions};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::{Node, format_named, local_path};
use super::object::Secrets;
use super::opts::{Dict, join};
use super::size::size;
use super::target::{luks_options, target_format};
use super::{Fail, Outcome, messages};
use crate::names::resolved_path;
use crate::options::asks_for_help;
use crate::signals::Watch;

const SECTOR: u64 = 512;

/// Options that are shown although the user did not give them.
const SHOWN_DEFAULTS: [(&str, &[(&str, &str)]); 2] = [
    (
        "qcow2",
        &[
            ("cluster_size", "65536"),
            ("extended_l2", "off"),
            ("compression_type", "zlib"),
            ("lazy_refcounts", "off"),
            ("refcount_bits", "16"),
        ],
    ),
    ("vmdk", &[("compat6", "off"), ("hwversion", "undefined")]),
];

pub(super) fn run(args: Args) -> Outcome {
    let secrets = Secrets::of(&args)?;
    let lists = join(args.all("options"))?;
    let format = args.text("format").unwrap_or_else(|| "raw".to_owned());
    if lists.as_deref().is_some_and(asks_for_help) {
        let driver = Driver::creating(&format).map_err(Fail::new)?;
        stdout().write_all(driver.help(!args.operands.is_empty()).as_bytes())?;
        return Ok(0);
    }
    let mut operands = args.operands.iter();
    let Some(file) = operands.next() else { return Err(Fail::usage("Expecting image file name")) };
    let wanted = operands.next().map(|text| size("image size", &text.to_string_lossy())).transpose()?;
    if let Some(more) = operands.next() {
        return Err(Fail::usage(format!("Unexpected argument: {}", more.to_string_lossy())));
    }
    let name = file.to_string_lossy().into_owned();
    let failed = |reason: String| Fail::new(format!("{name}: {reason}"));

    let driver = Driver::creating(&format).map_err(failed)?;
    let path = local_path(file).map_err(failed)?;
    let dict = options(&args, driver, lists.as_deref(), wanted).map_err(failed)?;
    let dict = with_backing(&args, file, dict).map_err(failed)?;
    if dict.get("size").is_none() {
        return Err(failed("Image creation needs a size parameter".to_owned()));
    }
    if !args.has("quiet") {
        writeln!(stdout(), "Formatting '{name}', fmt={format}{}", driver.line(&dict))?;
    }
    let _watch = Watch::ending()?;
    make(&path, driver, &dict, &secrets, args.has("backing-unsafe")).map_err(failed)?;
    Ok(0)
}

/// All options, with the defaults that are shown.
fn options(args: &Args, driver: Driver, lists: Option<&str>, size: Option<u64>) -> Result<Dict, String> {
    let mut dict = driver.check(&Dict::from_list(lists.unwrap_or_default()))?;
    let defaults = SHOWN_DEFAULTS.into_iter().find(|(name, _)| *name == driver.name);
    for (name, value) in defaults.map_or(&[][..], |(_, defaults)| defaults) {
        if dict.get(name).is_none() {
            dict.set(name, (*value).to_owned());
        }
    }
    for (option, name, what) in
        [("backing", "backing_file", "file"), ("backing-format", "backing_fmt", "format")]
    {
        if let Some(value) = args.text(option) {
            if !driver.has_backing_files() {
                return Err(format!("Backing {what} not supported for file format '{}'", driver.name));
            }
            dict.set(name, value);
        }
    }
    if let Some(size) = size {
        if dict.get("size").is_some() {
            return Err("The image size must be specified only once".to_owned());
        }
        dict.set("size", size.to_string());
    }
    Ok(dict)
}

/// Looks at the backing file, which gives the size if the user does not.
fn with_backing(args: &Args, file: &OsStr, mut dict: Dict) -> Result<Dict, String> {
    let Some(backing) = dict.get("backing_file").map(str::to_owned) else { return Ok(dict) };
    if backing.is_empty() {
        return Err("Expected backing file name, got empty string".to_owned());
    }
    if file == backing.as_str() {
        return Err("Error: Trying to create an image with the same filename as the backing file".to_owned());
    }
    let named = dict.get("backing_fmt").map(str::to_owned);
    if args.has("backing-unsafe") {
        return match named {
            Some(_) => Ok(dict),
            None => Err("Backing file specified without backing format".to_owned()),
        };
    }
    let image = open_backing(&resolved_path(file.as_ref(), &backing), named.as_deref())
        .map_err(|reason| format!("{reason}\nCould not open backing image."))?;
    if named.is_none() {
        let found = image.info().format.name();
        return Err(format!("Backing file specified without backing format\nDetected format of {found}."));
    }
    if dict.get("size").is_none() {
        dict.set("size", image.size().to_string());
    }
    Ok(dict)
}

fn open_backing(path: &Path, format: Option<&str>) -> Result<Image, String> {
    let mut node = Node::named(path);
    node.format = format.map(format_named).transpose()?;
    let options = OpenOptions { force_share: true, ..node.options() };
    // Nothing of its data is looked at.
    let locked = |error| match Error::lacks_passphrase(&error) {
        true => Image::open(path, &OpenOptions { metadata_only: true, ..options.clone() }),
        false => Err(error),
    };
    Image::open(path, &options)
        .or_else(locked)
        .map_err(|error| messages::cannot_open(&error, path, node.format))
}

/// Makes a raw disk of a device: as QEMU, all but the first sector, which may hold an image's header, stays as it is.
fn clear_start(path: &Path, size: u64) -> Result<(), String> {
    let fill = |len: u64, target_is_zero: bool| {
        let options = ConvertOptions { create: false, target_is_zero, ..ConvertOptions::default() };
        convert(&[Image::zeros(len)], path.into(), &options, &Monitor::new())
    };
    // Nothing is written to what is zero; the sizes are compared.
    fill(size, true).and_then(|_| fill(SECTOR, false)).map(drop).map_err(|error| match error.kind() {
        Kind::Invalid => "Cannot grow device files".to_owned(),
        Kind::Busy => messages::cannot_open(&error, path, None),
        _ => messages::cannot_create(&error, path),
    })
}

fn make(
    path: &Path,
    driver: Driver,
    dict: &Dict,
    secrets: &Secrets,
    trust_backing: bool,
) -> Result<(), String> {
    let size = dict.get("size").and_then(|size| size.parse().ok()).unwrap_or(0);
    if driver.name == "luks" {
        let (encryption, preallocation) = luks_options(dict, secrets)?;
        return create_luks(path, &encryption, size, preallocation)
            .map_err(|error| messages::cannot_create(&error, path));
    }
    let format = target_format(driver, dict, secrets)?;
    if driver.name == "raw" && fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device()) {
        return match dict.get("preallocation") {
            Some(mode) if mode != "off" => Err(format!("Unsupported preallocation mode '{mode}'")),
            _ => clear_start(path, size),
        };
    }
    let options = CreateOptions { format, size, trust_backing };
    create(path, &options).map_err(|error| match error.kind() {
        Kind::Limit => {
            let hint = if driver.name == "qcow2" { " (try using a larger cluster size)" } else { "" };
            format!("The image size is too large for file format '{}'{hint}", driver.name)
        }
        Kind::Busy => messages::cannot_open(&error, path, None),
        _ => messages::cannot_create(&error, path),
    })
}
