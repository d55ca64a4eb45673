//! `qemu-img resize`.

use std::ffi::OsString;
use std::io::{Write, stdout};

use diskmill::edit::Preallocation;
use diskmill::{Error, Format, Kind};

use super::getopt::Args;
use super::node::Context;
use super::size::{bytes, is_out_of_range};
use super::{Fail, Outcome, messages};

const OPERANDS: &str = "Expecting image file name and size";
const MUST_SHRINK: &str = "Use the --shrink option to perform a shrink operation.\n\
    qemu-img: warning: Shrinking an image will delete all data beyond the shrunken image's end. Before performing \
    such an operation, make sure there is no important data there.";
const NOT_POSITIVE: &str = "New image size must be positive";

/// Takes a negative size off the end of the command line, before it is read as an option.
pub(super) fn take_size(args: &mut Vec<OsString>) -> Option<OsString> {
    let digits = args.last()?.to_str()?.strip_prefix('-')?;
    if digits.starts_with(|first: char| first.is_ascii_digit()) { args.pop() } else { None }
}

pub(super) fn run(args: Args) -> Outcome {
    let [file, wanted] = args.operands.as_slice() else { return Err(Fail::usage(OPERANDS)) };
    let preallocation = match args.text("preallocation") {
        Some(mode) => mode.parse().map_err(|_| Fail::new(format!("Invalid preallocation mode '{mode}'")))?,
        None => Preallocation::Off,
    };
    let wanted = Wanted::parse(&wanted.to_string_lossy())?;
    let Some((_, mut image)) = Context::of(&args, "format")?.open_writable(file)? else {
        return Err(Fail::new("Image format driver does not support resize"));
    };
    let old = image.size();
    let size = wanted.size(old)?;
    if size <= old && preallocation != Preallocation::Off {
        return Err(Fail::new("Preallocation can only be used for growing images"));
    }
    if size < old && !args.has("shrink") {
        return Err(Fail::new(MUST_SHRINK));
    }
    let format = image.info().format;
    image
        .resize(size, preallocation)
        .and_then(|()| image.close())
        .map_err(|error| Fail::new(reason(&error, size, format, preallocation)))?;
    if !args.has("quiet") {
        writeln!(stdout(), "Image resized.")?;
    }
    Ok(0)
}

pub(super) fn reason(error: &Error, size: u64, format: Format, preallocation: Preallocation) -> String {
    match (error.kind(), format) {
        (Kind::Invalid, Format::Qcow2) if !size.is_multiple_of(512) => {
            "The new size must be a multiple of 512".to_owned()
        }
        (Kind::Limit, Format::Qcow2) => "Failed to grow the L1 table: File too large".to_owned(),
        (Kind::Unsupported, Format::Qcow2) if error.to_string().contains("version 2") => {
            "Can't resize a v2 image which has snapshots".to_owned()
        }
        (Kind::Unsupported, Format::Vmdk) => "Image format driver does not support resize".to_owned(),
        (Kind::Unsupported, Format::Raw) if preallocation == Preallocation::Metadata => {
            "Unsupported preallocation mode: metadata".to_owned()
        }
        _ => messages::while_working(error),
    }
}

/// A size, or a difference to the present one.
enum Wanted {
    Exactly(u64),
    More(u64),
    Less(u64),
}

impl Wanted {
    fn parse(text: &str) -> Outcome<Self> {
        let (sign, number) = match text.split_at_checked(1) {
            Some((sign @ ("+" | "-"), number)) => (sign, number),
            _ => ("", text),
        };
        let size = bytes(number).map_err(|_| {
            Fail::new(if is_out_of_range(number) {
                NOT_POSITIVE.to_owned()
            } else {
                "Parameter 'size' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
                    .to_owned()
            })
        })?;
        Ok(match sign {
            "+" => Self::More(size),
            "-" => Self::Less(size),
            _ => Self::Exactly(size),
        })
    }

    fn size(&self, old: u64) -> Outcome<u64> {
        let size = match self {
            Self::Exactly(size) => Some(*size),
            Self::More(size) => old.checked_add(*size).filter(|&size| size <= i64::MAX as u64),
            Self::Less(size) => old.checked_sub(*size),
        };
        size.filter(|&size| size > 0).ok_or_else(|| Fail::new(NOT_POSITIVE))
    }
}
