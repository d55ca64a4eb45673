//! `qemu-img rebase`.

use diskmill::Kind;
use diskmill::edit::{Rebase, RebaseMode};

use super::getopt::Args;
use super::node::{Context, format_named};
use super::{Fail, Outcome, cache_mode, messages, watched};
use crate::names::resolved_path;

pub(super) fn run(args: Args) -> Outcome {
    let context = Context::of(&args, "format")?;
    let file = args.one_file()?;
    let unchecked = args.has("backing-unsafe");
    let named = args.text("backing");
    if named.is_none() && !unchecked {
        return Err(Fail::usage("Must specify backing file (-b) or use unsafe mode (-u)"));
    }
    cache_mode(&args, "cache", "cache")?;
    cache_mode(&args, "backing-cache", "source cache")?;
    let node = context.node(file)?;
    node.check_named_backing()?;
    let format = match args.text("backing-format") {
        Some(name) => {
            Some(format_named(&name).map_err(|_| Fail::new(format!("Invalid format name: '{name}'")))?)
        }
        None => None,
    };
    let backing = named.filter(|name| !name.is_empty());
    let cannot_change = |reason: &str| {
        let name = backing.as_deref().unwrap_or_default();
        Fail::new(format!("Could not change the backing file to '{name}': {reason}"))
    };
    let mode = if unchecked { RebaseMode::Unsafe } else { RebaseMode::Safe };
    let mut rebase = Rebase::open(&node.path, &node.options(), mode).map_err(|error| match error.kind() {
        Kind::Unsupported if error.structure().is_none() && node.path.exists() => {
            cannot_change("Operation not supported")
        }
        _ => node.cannot_open(&error),
    })?;
    if args.has("compress") && !unchecked {
        rebase.compress().map_err(|error| Fail::new(format!("Error while writing to COW image: {error}")))?;
    }
    if let Some(name) = &backing {
        // qemu-img finds that out after it has copied everything.
        if unchecked && format.is_none() {
            return Err(cannot_change("backing format must be specified"));
        }
        rebase.onto(name, format).map_err(|error| {
            let path = resolved_path(&node.path, name);
            let reason = messages::cannot_open(&error, error.path().unwrap_or(&path), format);
            Fail::new(format!("Could not open new backing file '{name}': {reason}"))
        })?;
        if format.is_none() {
            return Err(cannot_change("backing format must be specified"));
        }
    }
    let result = watched(&args, |monitor| rebase.run(monitor))?;
    result.map_err(|error| match error.kind() {
        Kind::Invalid => cannot_change("Invalid argument"),
        Kind::Limit => cannot_change("No space left on device"),
        _ => Fail::new(messages::while_working(&error)),
    })?;
    Ok(0)
}
