//! `diskmill snapshot`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{Args, Subcommand};
use diskmill::{Format, Image, OpenOptions, SnapshotRef};
use serde_json::Value;

use crate::args::{OpenArgs, OutputArgs, OutputForm, snapshot_ref};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::names::shown;
use crate::snapshots::{json, table};

const EXAMPLES: &str = "\
Examples:
  diskmill snapshot create disk.qcow2 before-upgrade
  diskmill snapshot list disk.qcow2
  diskmill snapshot apply disk.qcow2 before-upgrade
  diskmill snapshot delete disk.qcow2 before-upgrade";

const NOTES: &str = "\
Snapshots inside a qcow2 image. One is meant by its id or its name, or as snapshot.id=ID,snapshot.name=NAME where several \
share a name. qemu-img's letters are taken too: -l, -c NAME, -a NAME, -d NAME, and then the image.
Exit codes: 0 done; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES, args_conflicts_with_subcommands = true)]
pub(crate) struct SnapshotArgs {
    #[command(subcommand)]
    action: Option<Action>,

    #[command(flatten)]
    letters: Letters,
}

/// The form of qemu-img.
#[derive(Debug, Args)]
struct Letters {
    /// List the snapshots
    #[arg(short = 'l', hide = true)]
    list: bool,

    /// Take one
    #[arg(short = 'c', value_name = "NAME", hide = true, conflicts_with_all = ["list", "apply", "delete"])]
    create: Option<String>,

    /// Apply one
    #[arg(short = 'a', value_name = "NAME", hide = true, conflicts_with_all = ["list", "delete"])]
    apply: Option<String>,

    /// Delete one
    #[arg(short = 'd', value_name = "NAME", hide = true, conflicts_with = "list")]
    delete: Option<String>,

    #[command(flatten)]
    common: Common,

    /// The image
    #[arg(hide = true)]
    file: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Common {
    /// Format of the image; only qcow2 has snapshots [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// Print nothing but errors and lists
    #[arg(short = 'q', long)]
    quiet: bool,

    #[command(flatten)]
    open: OpenArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List an image's snapshots
    List {
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        output: OutputArgs,
        /// The image
        file: PathBuf,
    },
    /// Take a snapshot of the disk as it is
    Create(Named),
    /// Make the disk what it was, its size included: what was written since is lost, the snapshot stays
    Apply(Named),
    /// Delete a snapshot
    Delete(Named),
}

#[derive(Debug, Args)]
struct Named {
    #[command(flatten)]
    common: Common,
    /// The image
    file: PathBuf,
    /// The snapshot
    name: String,
}

#[derive(Clone, Copy)]
enum Change {
    Create,
    Apply,
    Delete,
}

pub(crate) fn run(args: &SnapshotArgs) -> Result<Exit, Failure> {
    match &args.action {
        Some(Action::List { common, output, file }) => list(common, file, output.form()),
        Some(Action::Create(named)) => change(named, Change::Create),
        Some(Action::Apply(named)) => change(named, Change::Apply),
        Some(Action::Delete(named)) => change(named, Change::Delete),
        None => by_letters(&args.letters),
    }
}

fn by_letters(letters: &Letters) -> Result<Exit, Failure> {
    let Letters { create, apply, delete, common, file, .. } = letters;
    let Some(file) = file else {
        return Err(Failure::usage("snapshot wants a command and an image (`diskmill snapshot --help`)"));
    };
    match (create, apply, delete) {
        (Some(name), ..) => apply_change(common, file, name, Change::Create),
        (_, Some(name), _) => apply_change(common, file, name, Change::Apply),
        (.., Some(name)) => apply_change(common, file, name, Change::Delete),
        _ => list(common, file, OutputForm::Human),
    }
}

fn list(common: &Common, file: &Path, form: OutputForm) -> Result<Exit, Failure> {
    let options = OpenOptions { metadata_only: true, ..common.open.options(common.format) };
    let image = Image::open(file, &options)?;
    let text = match form {
        OutputForm::Json => qemu_style(&Value::Array(image.snapshots().iter().map(json).collect())) + "\n",
        OutputForm::Human if image.snapshots().is_empty() => String::new(),
        OutputForm::Human => table(image.snapshots()),
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(Exit::Done)
}

fn change(named: &Named, change: Change) -> Result<Exit, Failure> {
    apply_change(&named.common, &named.file, &named.name, change)
}

fn apply_change(common: &Common, file: &Path, name: &str, change: Change) -> Result<Exit, Failure> {
    let options = OpenOptions { writable: true, ..common.open.options(common.format) };
    let mut image = Image::open(file, &options)?;
    let wanted: SnapshotRef = snapshot_ref(name);
    let done = match change {
        Change::Create => {
            let id = image.create_snapshot(name, SystemTime::now())?;
            format!("snapshot {id} ({}) taken", shown(name))
        }
        Change::Apply => {
            image.apply_snapshot(&wanted)?;
            format!("snapshot {} applied", shown(name))
        }
        Change::Delete => {
            image.delete_snapshot(&wanted)?;
            format!("snapshot {} deleted", shown(name))
        }
    };
    image.close()?;
    if !common.quiet {
        writeln!(io::stdout(), "{done}")?;
    }
    Ok(Exit::Done)
}
