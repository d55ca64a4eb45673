//! `qemu-img compare`.

use std::ffi::OsStr;
use std::io::{Write, stdout};

use diskmill::compare::{CompareOptions, Comparison, compare};
use diskmill::{Image, Kind};

use super::getopt::Args;
use super::node::Context;
use super::{Fail, Outcome, cache_mode, messages, watched};
use crate::compare::{exit_for, text};

/// Exit code for an image that cannot be opened.
const CANNOT_OPEN: u8 = 2;

pub(super) fn run(args: Args) -> Outcome {
    let cannot = |fail: Fail| fail.code(CANNOT_OPEN);
    let mut context = Context::of(&args, "a-format").map_err(cannot)?;
    let [one, other] = args.operands.as_slice() else {
        return Err(Fail::usage("Expecting two image file names"));
    };
    context.cache = cache_mode(&args, "cache", "source cache").map_err(cannot)?;
    let open = |context: &Context, file: &OsStr| -> Outcome<Image> { Ok(context.open(file)?.1) };
    let a = open(&context, one).map_err(cannot)?;
    context.format = args.text("b-format");
    let b = open(&context, other).map_err(cannot)?;

    let options = CompareOptions { strict: args.has("strict"), threads: None };
    let result = watched(&args, |monitor| compare(&a, &b, &options, monitor))?;
    let result = result.map_err(|error| {
        let at = error.path().map_or(one.to_string_lossy(), |path| path.to_string_lossy());
        let message = match error.kind() {
            Kind::Io => format!("Error while reading {at}: {}", messages::while_working(&error)),
            _ => error.to_string(),
        };
        Fail::new(message).code(exit_for(&error).code())
    })?;
    if !args.has("quiet") {
        stdout().write_all(text(result, (a.size(), b.size())).as_bytes())?;
    }
    Ok(u8::from(!matches!(result, Comparison::Identical { .. })))
}
