//! `qemu-img commit`.

use std::io::{Write, stdout};
use std::path::PathBuf;

use diskmill::edit::{Commit, CommitOptions};
use diskmill::{Kind, OpenOptions};

use super::getopt::Args;
use super::node::Context;
use super::size::size;
use super::{Fail, Outcome, cache_mode, messages, watched};

pub(super) fn run(args: Args) -> Outcome {
    if let Some(text) = args.text("rate") {
        size("rate limit", &text)?;
    }
    let context = Context::of(&args, "format")?;
    let file = args.one_file()?;
    cache_mode(&args, "cache", "cache")?;
    let node = context.node(file)?;
    node.check_named_backing()?;
    let options = CommitOptions {
        open: OpenOptions { force_share: false, ..node.options() },
        base: args.last("base").map(PathBuf::from),
        keep_overlay: args.has("drop"),
    };
    let commit = Commit::open(&node.path, &options).map_err(|error| match error.kind() {
        Kind::Invalid if error.path().is_none() => Fail::new(error.to_string()),
        _ => node.cannot_open(&error),
    })?;
    let result = watched(&args, |monitor| commit.run(monitor))?;
    result.map_err(|error| match error.kind() {
        // A base that would have to grow and cannot.
        Kind::Unsupported => Fail::new("Block job failed: Operation not supported"),
        _ => Fail::new(messages::while_working(&error)),
    })?;
    if !args.has("quiet") {
        writeln!(stdout(), "Image committed.")?;
    }
    Ok(0)
}
