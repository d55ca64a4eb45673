//! `qemu-img map`.

use super::getopt::Args;
use super::node::Context;
use super::size::size;
use super::{Outcome, output_form};
use crate::map::print;

pub(super) fn run(args: Args) -> Outcome {
    let form = output_form(&args)?;
    let start = args.text("start-offset").map(|text| size("start offset", &text)).transpose()?;
    let most = args.text("max-length").map(|text| size("max length", &text)).transpose()?;
    let file = args.one_file()?;
    let (node, image) = Context::of(&args, "format")?.open(file)?;
    print(&image, node.name(), start.unwrap_or(0), most, form)?;
    Ok(0)
}
