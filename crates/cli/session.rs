//! `diskmill session`: appliances that are kept between commands.

use std::io::{self, Write as _};

use clap::{Args, Subcommand};
use diskmill_guestfs::Kept;
use serde_json::{Value, json};

use crate::exit::{Exit, Failure};
use crate::fs::args::GuestArgs;
use crate::fs::failure::failure;
use crate::fs::guest::{Access, Guest};
use crate::fs::headings::arranged;
use crate::fs::kept::{closed, is_writable};
use crate::fs::leftovers;
use crate::fs::output::print_json;
use crate::fs::table::Table;
use crate::{names, say};

const EXAMPLES: &str = "\
Examples:
  diskmill session start disk.qcow2
  diskmill fs ls disk.qcow2 /etc          finds the session by the image, and takes milliseconds
  diskmill session list
  diskmill session stop --all";

const NOTES: &str = "\
A session is found by the image's file, its state, format and options, by commands of the same user. It ends when nobody has \
used it for a while (--idle-timeout), when the image was changed, and when a command writes to an image that it reads. \
One on an encrypted image is open to those commands without the passphrase.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES, mut_subcommands(arranged))]
pub(crate) struct SessionArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Start an appliance on an image and keep it for the next commands
    Start(Box<StartArgs>),
    /// Show the sessions that are kept
    List(ListArgs),
    /// End sessions that are kept, after everything written is in the image
    Stop(StopArgs),
}

#[derive(Debug, Args)]
struct StartArgs {
    #[command(flatten)]
    guest: GuestArgs,

    /// Let commands change the image: nobody else can open it meanwhile
    #[arg(short = 'w', long)]
    write: bool,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// Print one JSON value
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
#[command(
    override_usage = "diskmill session stop [OPTIONS] <ID>...\n       diskmill session stop [OPTIONS] --all"
)]
struct StopArgs {
    /// Names of sessions, as `session list` shows them
    #[arg(value_name = "ID", required_unless_present = "all", conflicts_with = "all")]
    ids: Vec<String>,

    /// All of them
    #[arg(long)]
    all: bool,

    /// Print one JSON value
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: SessionArgs) -> Result<Exit, Failure> {
    leftovers::sweep();
    match args.verb {
        Verb::Start(args) => start(*args),
        Verb::List(args) => list(&args),
        Verb::Stop(args) => stop(&args),
    }
}

fn start(mut args: StartArgs) -> Result<Exit, Failure> {
    // Appliances outlive us.
    let _ = diskmill::inherit_nothing();
    let json = args.guest.image.json;
    args.guest.image.keep = true;
    // What it says is our output.
    args.guest.image.quiet |= json;
    let access = if args.write { Access::Write } else { Access::Read };
    let guest = Guest::mounted(&args.guest, access)?;
    let (id, started) = (guest.session_id(), !guest.is_attached());
    if !started && !args.guest.image.quiet {
        guest.remark(&format!("session {id} is there already"));
    }
    guest.finish()?;
    if !json {
        return Ok(Exit::Done);
    }
    let kept = Kept::list().into_iter().find(|kept| kept.id() == id);
    let kept = kept.ok_or_else(|| Failure::failed(format!("session {id} has ended at once")))?;
    let mut value = described(&kept);
    if let Some(object) = value.as_object_mut() {
        object.insert("started".to_owned(), started.into());
    }
    print_json(&value)
}

fn list(args: &ListArgs) -> Result<Exit, Failure> {
    let all = Kept::list();
    if args.json {
        return print_json(&all.iter().map(described).collect());
    }
    if all.is_empty() {
        eprintln!("diskmill: no session is kept");
        return Ok(Exit::Done);
    }
    let mut table = Table::new(&["ID", "ACCESS", ">IDLE", ">ENDS AFTER", "IMAGE"]);
    for kept in &all {
        let access = if is_writable(kept) { "write" } else { "read" };
        let [idle, limit] = [kept.idle(), kept.idle_limit()].map(|time| format!("{} s", time.as_secs()));
        table.row([kept.id(), access.to_owned(), idle, limit, names::shown(kept.label()).into_owned()]);
    }
    io::stdout().write_all(table.text().as_bytes())?;
    Ok(Exit::Done)
}

fn stop(args: &StopArgs) -> Result<Exit, Failure> {
    let all = Kept::list();
    let wanted: Vec<&Kept> = match args.all {
        true => all.iter().collect(),
        false => {
            let named = |id: &String| {
                let missing = || Failure::failed(format!("there is no session {}", names::shown(id)));
                all.iter().find(|kept| kept.id() == *id).ok_or_else(missing)
            };
            args.ids.iter().map(named).collect::<Result<_, _>>()?
        }
    };
    let mut exit = Exit::Done;
    let mut stopped = Vec::new();
    for kept in wanted {
        match kept.stop().map_err(|error| failure(&error)).and_then(|()| closed(kept)) {
            Ok(()) => stopped.push(kept.id()),
            Err(failure) => {
                exit = Exit::Failed;
                say::failure(&failure);
            }
        }
    }
    if args.json {
        print_json(&json!({ "stopped": stopped }))?;
    }
    Ok(exit)
}

/// Times in seconds.
fn described(kept: &Kept) -> Value {
    json!({
        "id": kept.id(),
        "image": kept.label(),
        "writable": is_writable(kept),
        "idle": kept.idle().as_secs(),
        "idle-timeout": kept.idle_limit().as_secs(),
        "pid": kept.pid(),
    })
}
