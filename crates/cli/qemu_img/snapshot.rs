//! `qemu-img snapshot`.

use std::io::{Write, stdout};
use std::time::SystemTime;

use diskmill::qcow2::feature;
use diskmill::{Error, Format, FormatInfo, Image, Kind, SnapshotRef};

use super::getopt::Args;
use super::node::Context;
use super::{Fail, Outcome, messages};
use crate::snapshots::table;

const NOT_FOUND: &str = "snapshot not found";
/// Bytes; what is longer is cut.
const LONGEST_NAME: usize = 255;

pub(super) fn run(args: Args) -> Outcome {
    const ACTIONS: [&str; 4] = ["list", "apply", "create", "delete"];
    let mut actions = args.options.iter().filter(|(option, _)| ACTIONS.contains(option));
    let action = actions.next();
    if actions.next().is_some() {
        return Err(Fail::usage("Cannot mix '-l', '-a', '-c', '-d'"));
    }
    let file = args.one_file()?;
    let context = Context::of(&args, "format")?;
    let Some((action, name)) = action.filter(|(action, _)| *action != "list") else {
        let (_, image) = context.open(file)?;
        if !image.snapshots().is_empty() {
            stdout().write_all(table(image.snapshots()).as_bytes())?;
        }
        return Ok(0);
    };
    let name = name.to_string_lossy();
    let failed = |reason: &str| Fail::new(format!("Could not {action} snapshot '{name}': {reason}"));
    let Some((_, mut image)) = context.open_writable(file)? else {
        return Err(failed(without_snapshots(action)));
    };
    change(&mut image, action, &name).and_then(|()| image.close().map_err(Refusal::Error)).map_err(
        |refusal| match refusal {
            Refusal::Words(words) => failed(words),
            Refusal::Error(error) => failed(&reason(&error, action)),
        },
    )?;
    Ok(0)
}

enum Refusal {
    /// What qemu-img finds before it tries.
    Words(&'static str),
    Error(Error),
}

/// What qemu-img says of an image that cannot have snapshots.
fn without_snapshots(action: &str) -> &'static str {
    match action {
        "create" => "Operation not supported",
        "apply" => "Block driver does not support snapshots",
        _ => NOT_FOUND,
    }
}

fn change(image: &mut Image, action: &str, name: &str) -> Result<(), Refusal> {
    if image.info().format != Format::Qcow2 {
        return Err(Refusal::Words(without_snapshots(action)));
    }
    let external =
        matches!(&image.info().specific, FormatInfo::Qcow2(info) if info.area.header.has(feature::DATA_FILE));
    match action {
        "apply" if external => {
            return Err(Refusal::Words("Failed to load snapshot: Operation not supported"));
        }
        "create" => {
            let end = (0..=LONGEST_NAME).rev().find(|&end| name.is_char_boundary(end)).unwrap_or(0);
            let name = name.get(..end).unwrap_or(name);
            image.create_snapshot(name, SystemTime::now()).map(drop)
        }
        "apply" => image.apply_snapshot(&SnapshotRef::Any(name.to_owned())),
        // Unlike for `-a`, an id does not do.
        _ if !image.snapshots().iter().any(|snapshot| snapshot.name == name.as_bytes()) => {
            return Err(Refusal::Words(NOT_FOUND));
        }
        _ => image.delete_snapshot(&SnapshotRef::Exact { id: None, name: Some(name.to_owned()) }),
    }
    .map_err(Refusal::Error)
}

fn reason(error: &Error, action: &str) -> String {
    let words = match (error.kind(), action) {
        (Kind::Invalid, "apply") => "Failed to load snapshot: No such file or directory",
        (Kind::Unsupported, "apply") if error.to_string().contains("bitmap") => {
            "Device has active dirty bitmaps"
        }
        (Kind::Unsupported, "apply") => "Failed to load snapshot: Operation not supported",
        (Kind::Unsupported, _) => "Operation not supported",
        (Kind::Limit, "create") => "Invalid argument",
        _ => return messages::while_working(error),
    };
    words.to_owned()
}
