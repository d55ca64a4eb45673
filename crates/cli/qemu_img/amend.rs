//! `qemu-img amend`.

use std::io::{Write, stdout};

use diskmill::edit::{Amendment, KeySlotChange};
use diskmill::qcow2::{Compat, Qcow2Info, feature};
use diskmill::{Error, FormatInfo, Image, Kind};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::Context;
use super::object::Secrets;
use super::opts::{Dict, join};
use super::{Fail, Outcome, cache_mode, messages, resize};
use crate::options::asks_for_help;

pub(super) fn run(args: Args) -> Outcome {
    let Some(list) = join(args.all("options"))? else {
        return Err(Fail::usage("Must specify options (-o)"));
    };
    if asks_for_help(&list)
        && let Some(format) = args.text("format")
    {
        let driver = Driver::amending(&format).map_err(Fail::new)?;
        stdout().write_all(driver.help(true).as_bytes())?;
        return Ok(0);
    }
    let file = args.one_file()?;
    cache_mode(&args, "cache", "cache")?;
    let context = Context::of(&args, "format")?;
    let Some((node, mut image)) = context.open_writable(file)? else {
        return Err(Fail::new("Format driver 'vmdk' does not support option amendment"));
    };
    let driver = Driver::amending(image.info().format.name()).map_err(Fail::new)?;
    if asks_for_help(&list) {
        stdout().write_all(driver.help(true).as_bytes())?;
        return Ok(0);
    }
    let dict = Dict::from_list(&list);
    if let Some(name) = dict.names().find(|name| !driver.knows(name))
        && Driver::creating("qcow2").is_ok_and(|driver| driver.knows(name))
    {
        let why = "This option is only supported for image creation";
        return Err(Fail::new(format!("Invalid parameter '{name}'\n{why}")));
    }
    let dict = driver.check(&dict).map_err(Fail::new)?;
    let mut changes = changes(&image, &dict).map_err(Fail::new)?;
    if let Some(keys) = &mut changes.keys {
        with_secrets(keys, &context.secrets).map_err(Fail::new)?;
        keys.keys = node.options().keys;
        keys.force = args.has("force");
    }
    let progress = args.has("progress") && !args.has("quiet");
    if progress {
        write!(stdout(), "    (0.00/100%)\r")?;
        stdout().flush()?;
    }
    let size = changes.size.unwrap_or(0);
    image
        .amend(&changes)
        .and_then(|()| image.close())
        .map_err(|error| Fail::new(reason(&error, &changes, size)))?;
    if progress {
        writeln!(stdout(), "    (100.00/100%)\r")?;
    }
    Ok(0)
}

/// The options in the library's terms.
///
/// # Errors
/// In qemu-img's words, what it refuses without a try.
fn changes(image: &Image, dict: &Dict) -> Result<Amendment, String> {
    let FormatInfo::Qcow2(info) = &image.info().specific else {
        return Err("Format driver does not support option amendment".to_owned());
    };
    let header = &info.area.header;
    let mut changes = Amendment::default();
    for (name, value) in dict.iter() {
        match name {
            "compat" if value.parse::<Compat>().is_err() => {
                return Err(format!("Unknown compatibility level {value}"));
            }
            "backing_file" | "backing_fmt" => continue,
            _ => changes.set(name, value).map_err(|error| error.message().to_owned())?,
        }
    }
    let bits = changes.refcount_bits;
    if bits.is_some_and(|bits| !bits.is_power_of_two() || bits > 64) {
        return Err("Refcount width must be a power of two and may not exceed 64 bits".to_owned());
    }
    if changes.data_file.is_some() && !header.has(feature::DATA_FILE) {
        return Err("data-file can only be set for images that use an external data file".to_owned());
    }
    if changes.data_file_raw == Some(true) && header.autoclear & feature::RAW_DATA_FILE == 0 {
        return Err("data-file-raw cannot be set on existing images".to_owned());
    }
    let version = match changes.compat {
        Some(Compat::V2) => 2,
        Some(Compat::V3) => 3,
        None => header.version,
    };
    if version < 3 && bits.is_some_and(|bits| bits != 16) {
        return Err(
            "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or \
             greater)"
                .to_owned(),
        );
    }
    let is = |name: &str, now: Option<&str>| dict.get(name).is_none_or(|wanted| Some(wanted) == now);
    let (name, format) = (image.info().backing_name.as_deref(), image.info().backing_format.as_deref());
    if !is("backing_file", name) || !is("backing_fmt", format) {
        return Err("Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.".to_owned());
    }
    if changes.lazy_refcounts == Some(true) && version.max(header.version) < 3 {
        return Err(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)"
                .to_owned(),
        );
    }
    if version < header.version {
        downgradable(info, bits)?;
    }
    Ok(changes)
}

fn with_secrets(change: &mut KeySlotChange, secrets: &Secrets) -> Result<(), String> {
    let get = |id: &Option<String>| id.as_deref().map(|id| secrets.get(id)).transpose();
    (change.new, change.old) = (get(&change.new_secret)?, get(&change.old_secret)?);
    Ok(())
}

fn downgradable(info: &Qcow2Info, bits: Option<u64>) -> Result<(), String> {
    let header = &info.area.header;
    if header.has(feature::DATA_FILE) {
        return Err("Cannot downgrade an image with a data file".to_owned());
    }
    if header.incompatible != 0 {
        let features = header.incompatible;
        return Err(format!("Cannot downgrade an image with incompatible features {features:#x} set"));
    }
    if bits.unwrap_or(header.refcount_width.bits().into()) != 16 {
        return Err("compat=0.10 requires refcount_bits=16".to_owned());
    }
    Ok(())
}

fn reason(error: &Error, changes: &Amendment, size: u64) -> String {
    let text = error.to_string();
    match error.kind() {
        Kind::Limit if text.contains("has refcount") => {
            let bits = changes.refcount_bits.unwrap_or(16);
            let between = |before: &str| text.split(before).nth(1)?.split([' ', ',']).next();
            let (offset, count) =
                (between("at offset ").unwrap_or("?"), between("has refcount ").unwrap_or("?"));
            format!(
                "Cannot decrease refcount entry width to {bits} bits: Cluster at offset {offset} has a refcount of \
                 {count}"
            )
        }
        Kind::Unsupported if text.contains("a snapshot of another size") => {
            "Internal snapshots prevent downgrade of image".to_owned()
        }
        Kind::Invalid if changes.keys.is_some() => error.message().to_owned(),
        Kind::Invalid | Kind::Limit | Kind::Unsupported if changes.size.is_some() => {
            resize::reason(error, size, diskmill::Format::Qcow2, diskmill::edit::Preallocation::Off)
        }
        _ => messages::while_working(error),
    }
}
