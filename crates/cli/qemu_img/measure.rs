//! `qemu-img measure`.

use std::io::{Write, stdout};

use diskmill::convert::TargetFormat;
use diskmill::measure::{Disk, measure};
use diskmill::{Kind, OpenOptions};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::Context;
use super::object::Secrets;
use super::opts::{Dict, join};
use super::size::size;
use super::target::check_geometry;
use super::{Fail, Outcome, output_form};
use crate::args::{OutputForm, snapshot_ref};
use crate::measure::{as_json, lines};

/// Options that have no influence on the size.
const WITHOUT_INFLUENCE: [&str; 9] = [
    "size",
    "backing_fmt",
    "data_file",
    "data_file_raw",
    "lazy_refcounts",
    "compression_type",
    "encryption",
    "nocow",
    "extent_size_hint",
];

pub(super) fn run(args: Args) -> Outcome {
    let form = output_form(&args)?;
    let lists = join(args.all("options"))?;
    let wanted = args.text("size").map(|text| size("image size", &text)).transpose()?;
    let context = Context::of(&args, "format")?;
    let snapshot = args.text("snapshot").map(|text| snapshot_ref(&text));
    let file = match args.operands.as_slice() {
        [] => None,
        [file] => Some(file),
        _ => return Err(Fail::new("At most one filename argument is allowed.")),
    };
    if file.is_none() && (context.image_opts || context.format.is_some() || snapshot.is_some()) {
        return Err(Fail::new("--image-opts, -f, and -l require a filename argument."));
    }
    if file.is_some() && wanted.is_some() {
        return Err(Fail::new("--size N cannot be used together with a filename."));
    }
    if file.is_none() && wanted.is_none() {
        return Err(Fail::new("Either --size N or one filename must be specified."));
    }
    let name = args.text("target-format").unwrap_or_else(|| "raw".to_owned());
    let driver = Driver::creating(&name).map_err(Fail::new)?;
    let dict = driver.check(&Dict::from_list(lists.as_deref().unwrap_or_default())).map_err(|reason| {
        Fail::new(format!("{reason}\nqemu-img: Invalid options for file format '{name}'"))
    })?;
    let image = match file {
        Some(file) => {
            let node = context.node(file)?;
            let open = OpenOptions { snapshot: snapshot.clone(), ..node.options() };
            Some(node.open_or(&open, |error| match error.kind() {
                Kind::Invalid if snapshot.is_some() => {
                    Fail::new("Failed to load snapshot: Can't find snapshot")
                }
                _ => node.cannot_open(error),
            })?)
        }
        None => None,
    };
    if driver.name == "vmdk" {
        return Err(Fail::new("Block driver 'vmdk' does not support size measurement"));
    }
    let format = target(driver, &dict, &context.secrets).map_err(Fail::new)?;
    let disk = image.as_ref().map_or(Disk::Empty(wanted.unwrap_or_default()), Disk::Of);
    let measured = measure(disk, &format).map_err(|error| match error.kind() {
        Kind::Limit => Fail::new("The image size is too large (try using a larger cluster size)"),
        _ => Fail::new(error.to_string()),
    })?;
    let text = match form {
        OutputForm::Json => as_json(&measured),
        OutputForm::Human => lines(&measured, |bytes| bytes.to_string()),
    };
    stdout().write_all(text.as_bytes())?;
    Ok(0)
}

/// The options that have an influence, with the words that this command has for them. Unlike `create` it does not
/// mind what does not go together.
fn target(driver: Driver, dict: &Dict, secrets: &Secrets) -> Result<TargetFormat, String> {
    let mut format = TargetFormat::named(driver.name).map_err(|error| error.to_string())?;
    let TargetFormat::Qcow2(_) = format else { return Ok(format) };
    check_geometry(dict)?;
    if let Some(level) = dict.get("compat")
        && !matches!(level, "0.10" | "1.1")
    {
        return Err(format!("Invalid compatibility level: '{level}'"));
    }
    let bits = dict.get("refcount_bits").unwrap_or("16");
    if !matches!(bits, "1" | "2" | "4" | "8" | "16" | "32" | "64") {
        return Err("Refcount width must be a power of two and may not exceed 64 bits".to_owned());
    }
    if bits != "16" && dict.get("compat") == Some("0.10") {
        return Err("Different refcount widths than 16 bits require compatibility level 1.1 or above \
                    (use compat=1.1 or greater)"
            .to_owned());
    }
    let luks = dict.get("encrypt.format") == Some("luks");
    if luks {
        let id =
            dict.get("encrypt.key-secret").ok_or("Parameter 'encrypt.key-secret' is required for cipher")?;
        secrets.get(id)?;
    }
    for (name, value) in dict.iter() {
        if WITHOUT_INFLUENCE.contains(&name) || (name.starts_with("encrypt.") && !luks) {
            continue;
        }
        format.set(name, value).map_err(|_| match name.strip_prefix("encrypt.") {
            Some(name) => format!("Parameter '{name}' does not accept value '{value}'"),
            None => format!("invalid parameter value: {value}"),
        })?;
    }
    Ok(format)
}
