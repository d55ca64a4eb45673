//! `diskmill compare`, with qemu-img's texts and exit codes.

use std::io::{self, Write};
use std::path::Path;

use diskmill::compare::{CompareOptions, Comparison, compare};
use diskmill::{Error, Format, Image, OpenOptions};
use serde_json::json;

use crate::args::{CacheMode, CompareArgs, OutputForm};
use crate::exit::{Exit, Failure};
use crate::job;
use crate::json::qemu_style;

/// qemu-img speaks of the sector in which the first difference is.
const SECTOR: u64 = 512;

pub(crate) fn run(args: &CompareArgs) -> Result<Exit, Failure> {
    let a = open(args, &args.a, args.a_format)?;
    let b = open(args, &args.b, args.b_format)?;
    let json = args.output.form() == OutputForm::Json;
    let options = CompareOptions { strict: args.strict, threads: args.threads };
    let result = job::run(&args.progress, json, exit_for, |monitor| compare(&a, &b, &options, monitor))?;
    let sizes = (a.size(), b.size());
    if json {
        writeln!(io::stdout(), "{}", qemu_style(&report(result, sizes)))?;
    } else if !args.progress.quiet {
        io::stdout().write_all(text(result, sizes).as_bytes())?;
    }
    Ok(if matches!(result, Comparison::Identical { .. }) { Exit::Done } else { Exit::Differ })
}

fn open(args: &CompareArgs, path: &Path, format: Option<Format>) -> Result<Image, Failure> {
    let options =
        OpenOptions { direct: args.cache.is_some_and(CacheMode::is_direct), ..args.open.options(format) };
    Image::open(path, &options).map_err(|error| Failure::from(error).or_exit(Exit::CannotOpen))
}

/// Damage of the tables that tell where data is, or of the data.
pub(crate) fn exit_for(error: &Error) -> Exit {
    let table = error.structure().is_some_and(|structure| structure.contains("table"));
    if table { Exit::CannotMap } else { Exit::CannotRead }
}

/// The result in qemu-img's words, for images of these sizes.
pub(crate) fn text(result: Comparison, (a, b): (u64, u64)) -> String {
    let warning = |mismatch| if mismatch { "Warning: Image size mismatch!\n" } else { "" };
    match result {
        Comparison::Identical { sizes_differ } => format!("{}Images are identical.\n", warning(sizes_differ)),
        Comparison::SizesDiffer => "Strict mode: Image size mismatch!\n".to_owned(),
        Comparison::StatusDiffers { at } => format!("Strict mode: Offset {at} block status mismatch!\n"),
        Comparison::ContentDiffers { at } => {
            let sector = at - at % SECTOR;
            format!("{}Content mismatch at offset {sector}!\n", warning(at >= a.min(b)))
        }
        // `Comparison` may grow.
        _ => "Images differ.\n".to_owned(),
    }
}

fn report(result: Comparison, (a, b): (u64, u64)) -> serde_json::Value {
    let (difference, at) = match result {
        Comparison::Identical { .. } => (None, None),
        Comparison::SizesDiffer => (Some("size"), None),
        Comparison::StatusDiffers { at } => (Some("allocation"), Some(at)),
        Comparison::ContentDiffers { at } => (Some("content"), Some(at)),
        _ => (Some("other"), None),
    };
    json!({ "identical": difference.is_none(), "difference": difference, "offset": at, "virtual-sizes": [a, b] })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_qemu_imgs() {
        let differs = |at| text(Comparison::ContentDiffers { at }, (1024, 2048));
        assert_eq!(differs(1000), "Content mismatch at offset 512!\n");
        assert_eq!(differs(1024), "Warning: Image size mismatch!\nContent mismatch at offset 1024!\n");
    }
}
