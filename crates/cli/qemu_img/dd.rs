//! `qemu-img dd`: blocks of an image into a fresh one.

use diskmill::convert::{ConvertOptions, Input, Monitor, Output, convert};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::{Context, local_path};
use super::opts::Dict;
use super::size::{size, size_between};
use super::target::target_format;
use super::{Fail, Outcome, messages, report};

/// What stands in front of the file names: `if=`, `of=`, `bs=`, `count=` and `skip=`.
#[derive(Debug, Default)]
struct Operands {
    input: Option<String>,
    output: Option<String>,
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(args: &Args) -> Outcome<Self> {
        let mut operands = Self::default();
        for operand in &args.operands {
            let operand = operand.to_string_lossy();
            let (name, value) = operand.split_once('=').unwrap_or((&operand, ""));
            match name {
                "if" => operands.input = Some(value.to_owned()),
                "of" => operands.output = Some(value.to_owned()),
                "bs" => operands.block = Some(size_between("bs", value, 1, i32::MAX as u64)?),
                "count" => operands.count = Some(size("count", value)?),
                "skip" => operands.skip = size("skip", value)?,
                other => return Err(Fail::new(format!("unrecognized operand {other}"))),
            }
        }
        Ok(operands)
    }
}

pub(super) fn run(args: Args) -> Outcome {
    let operands = Operands::parse(&args)?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(Fail::new("Must specify both input and output files"));
    };
    let context = Context::of(&args, "format")?;
    let (_, image) = context.open(input.as_ref())?;
    let format = args.text("output-format").unwrap_or_else(|| "raw".to_owned());
    let driver = Driver::creating(&format).map_err(Fail::new)?;
    let format = target_format(driver, &Dict::default(), &context.secrets).map_err(Fail::new)?;

    let block = operands.block.unwrap_or(512);
    // As in QEMU, the count is of blocks from the front of the input, those that are skipped included.
    let end = match operands.count {
        Some(count) => count.saturating_mul(block).min(image.size()),
        None => image.size(),
    };
    let start = operands.skip.saturating_mul(block);
    if start > end {
        report(&format!("{input}: cannot skip to specified offset"));
    }
    let start = start.min(end);
    let image = image.into_window(start, end - start).map_err(|error| Fail::new(error.to_string()))?;
    let failed = |reason: String| Fail::new(format!("{output}: error while creating output image: {reason}"));
    let path = local_path(output.as_ref()).map_err(failed)?;
    let options = ConvertOptions { format, ..ConvertOptions::default() };
    convert(Input::Images(&[image]), Output::Path(path.clone()), &options, &Monitor::new())
        .map_err(|error| failed(messages::cannot_create(&error, &path)))?;
    Ok(0)
}
