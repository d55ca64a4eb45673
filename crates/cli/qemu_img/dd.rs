//! `qemu-img dd`: blocks of an image into a fresh one.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use diskmill::convert::{ConvertOptions, Input, Output, convert};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::{Context, local_path};
use super::opts::Dict;
use super::size::{size, size_between};
use super::target::target_format;
use super::{Fail, Outcome, messages, report, watched};

/// What stands in front of the file names: `if=`, `of=`, `bs=`, `count=` and `skip=`.
#[derive(Debug, Default)]
struct Operands {
    input: Option<OsString>,
    output: Option<OsString>,
    block: Option<u64>,
    count: Option<u64>,
    skip: u64,
}

impl Operands {
    fn parse(args: &Args) -> Outcome<Self> {
        let mut operands = Self::default();
        for operand in &args.operands {
            let bytes = operand.as_bytes();
            let mut parts = bytes.splitn(2, |&byte| byte == b'=');
            let name = parts.next().unwrap_or_default();
            let value = OsStr::from_bytes(parts.next().unwrap_or_default());
            // What is no number is refused as one.
            let number = value.to_string_lossy();
            match name {
                b"if" => operands.input = Some(value.to_owned()),
                b"of" => operands.output = Some(value.to_owned()),
                b"bs" => operands.block = Some(size_between("bs", &number, 1, i32::MAX as u64)?),
                b"count" => operands.count = Some(size("count", &number)?),
                b"skip" => operands.skip = size("skip", &number)?,
                other => {
                    let other = OsStr::from_bytes(other).to_string_lossy();
                    return Err(Fail::new(format!("unrecognized operand {other}")));
                }
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
    let (_, image) = context.open(input)?;
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
        report(&format!("{}: cannot skip to specified offset", input.to_string_lossy()));
    }
    let start = start.min(end);
    let image = image.into_window(start, end - start).map_err(|error| Fail::new(error.to_string()))?;
    let failed = |reason: String| {
        let output = output.to_string_lossy();
        Fail::new(format!("{output}: error while creating output image: {reason}"))
    };
    let path = local_path(output).map_err(failed)?;
    let options = ConvertOptions { format, ..ConvertOptions::default() };
    let done = watched(&args, |monitor| {
        convert(Input::Images(&[image]), Output::Path(path.clone()), &options, monitor)
    })?;
    done.map_err(|error| failed(messages::cannot_create(&error, &path)))?;
    Ok(0)
}
