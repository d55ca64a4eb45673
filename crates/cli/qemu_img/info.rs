//! `qemu-img info`.

use std::io::{Write, stdout};

use diskmill::{Image, OpenOptions};

use super::getopt::Args;
use super::node::{Context, Node};
use super::{Outcome, output_form};
use crate::info::describe;

pub(super) fn run(args: Args) -> Outcome {
    let form = output_form(&args)?;
    let file = args.one_file()?;
    let context = Context::of(&args, "format")?;
    let context = Context { secrets: context.secrets.optional(), ..context };
    let node = context.node(file)?;
    let chain = args.has("backing-chain");
    let options = OpenOptions { metadata_only: !chain, ..node.options() };
    // qemu-img opens the images of a chain one after the other, so each one is named by itself.
    let image = Image::open(&node.path, &options).map_err(|error| match error.path() {
        Some(other) if other != node.path => Node::named(other).cannot_open(&error),
        _ => node.cannot_open(&error),
    })?;
    stdout().write_all(describe(&image, node.name(), chain, form)?.as_bytes())?;
    Ok(0)
}
