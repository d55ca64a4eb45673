//! `diff`: how the files of two images differ.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::io::{self, Write as _};
use std::path::PathBuf;

use clap::Args;
use diskmill::Format;
use diskmill_guestfs::Command;
use serde_json::{Map, Value, json};

use super::args::{FileType, GuestArgs};
use super::guest::{Access, Guest};
use super::meta::Entry;
use super::name::{self, guest_path, join, shown};
use super::output::print_json;
use crate::exit::{Exit, Failure};

#[derive(Debug, Args)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The other image
    #[arg(value_name = "OTHER")]
    pub(crate) other: PathBuf,

    /// Format of the other image
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) other_format: Option<Format>,

    /// Compare below this folder
    #[arg(value_name = "PATH", default_value = "/")]
    pub(crate) path: OsString,

    /// Compare the content of all files, not only of those whose times differ
    #[arg(long)]
    pub(crate) checksum: bool,

    /// Times that differ count as a difference
    #[arg(long)]
    pub(crate) times: bool,
}

pub(crate) fn diff(args: &DiffArgs) -> Result<Exit, Failure> {
    let root = guest_path(&args.path);
    let mut left = Guest::mounted(&args.guest, Access::Read)?;
    let mut right = Guest::beside(&args.guest, &args.other, args.other_format)?;
    let [old, new] = [&mut left, &mut right].map(|guest| tree(guest, &root));
    let (old, new) = (old?, new?);
    let mut changes = Vec::new();
    let names: BTreeSet<&Vec<u8>> = old.keys().chain(new.keys()).collect();
    for name in names {
        let what = match (old.get(name), new.get(name)) {
            (Some(_), None) => vec!["removed"],
            (None, Some(_)) => vec!["added"],
            (Some(a), Some(b)) => {
                let mut what = metadata(a, b, args.times);
                let suspect =
                    args.checksum || a.meta.map(|meta| meta.modified) != b.meta.map(|meta| meta.modified);
                let files = [a, b].iter().all(|entry| entry.meta.is_some_and(|meta| meta.is(FileType::File)));
                if files && !what.contains(&"size") && suspect {
                    let path = join(&root, name);
                    if checksum(&mut left, &path)? != checksum(&mut right, &path)? {
                        what.push("content");
                    }
                }
                what
            }
            (None, None) => continue,
        };
        if !what.is_empty() {
            changes.push((name, what));
        }
    }
    left.finish()?;
    right.finish()?;
    if args.guest.image.json {
        let values = changes.iter().map(|(name, what)| {
            let mut object = Map::new();
            name::put(&mut object, "path", &join(&root, name));
            object.insert("changes".to_owned(), json!(what));
            Value::from(object)
        });
        print_json(&values.collect())?;
    } else {
        let mut out = String::new();
        for (name, what) in &changes {
            let path = shown(&join(&root, name));
            out.push_str(&match what.as_slice() {
                ["removed"] => format!("- {path}\n"),
                ["added"] => format!("+ {path}\n"),
                several => format!("= {path}: {}\n", several.join(", ")),
            });
        }
        io::stdout().write_all(out.as_bytes())?;
    }
    Ok(if changes.is_empty() { Exit::Done } else { Exit::Differ })
}

fn tree(guest: &mut Guest, root: &[u8]) -> Result<BTreeMap<Vec<u8>, Entry>, Failure> {
    let names = guest.walk(root)?;
    Ok(guest.entries(root, names)?.into_iter().map(|entry| (entry.path.clone(), entry)).collect())
}

/// What differs of two files of one name without a look at their content.
fn metadata(a: &Entry, b: &Entry, times: bool) -> Vec<&'static str> {
    let (Some(x), Some(y)) = (a.meta, b.meta) else { return vec!["metadata"] };
    let same_kind = x.kind() == y.kind();
    let file = x.is(FileType::File);
    let differ = [
        ("type", !same_kind),
        ("mode", x.permissions() != y.permissions()),
        ("owner", (x.user, x.group) != (y.user, y.group)),
        ("size", same_kind && file && x.size != y.size),
        ("target", same_kind && a.target != b.target),
        ("device", same_kind && x.rdev != y.rdev && (x.is(FileType::Block) || x.is(FileType::Char))),
        ("time", times && x.modified != y.modified),
    ];
    differ.into_iter().filter(|(_, differs)| *differs).map(|(what, _)| what).collect()
}

/// Made in the appliance: the file's bytes stay there.
fn checksum(guest: &mut Guest, path: &[u8]) -> Result<String, Failure> {
    guest.text(Command::new("checksum").arg("sha256").arg(path))
}
