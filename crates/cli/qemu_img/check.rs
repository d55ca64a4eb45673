//! `qemu-img check`.

use std::fmt::Write as _;
use std::io::{Write, stdout};

use diskmill::Kind;
use diskmill::check::{CheckOptions, Repair, Report, check};

use super::getopt::Args;
use super::node::Context;
use super::{Fail, Outcome, cache_mode, output_form};
use crate::args::OutputForm;
use crate::check::{add_statistics, as_json};
use crate::json::qemu_style;

/// Exit code for formats that have no check.
const NO_CHECK: u8 = 63;

pub(super) fn run(args: Args) -> Outcome {
    let form = output_form(&args)?;
    let repair = match args.text("repair").as_deref() {
        None => Repair::Nothing,
        Some("leaks") => Repair::Leaks,
        Some("all") => Repair::All,
        Some(other) => {
            return Err(Fail::usage(format!("--repair (-r) expects 'leaks' or 'all' not '{other}'")));
        }
    };
    let file = args.one_file()?;
    cache_mode(&args, "cache", "source cache")?;
    let node = Context::of(&args, "format")?.node(file)?;
    if node.force_share && repair != Repair::Nothing {
        return Err(Fail::new(format!(
            "Could not open '{}': force-share=on can only be used with read-only images",
            file.to_string_lossy()
        )));
    }
    let open = node.options();
    let options = CheckOptions {
        format: open.format,
        repair,
        policy: open.policy,
        limits: open.limits,
        force_share: open.force_share,
    };
    let report = check(&node.path, &options, &mut |verdict, finding| {
        eprintln!("{}", finding.qemu_line(verdict));
    })
    .map_err(|error| match error.kind() {
        Kind::Unsupported if error.structure().is_none() => {
            Fail::new("This image format does not support checks").code(NO_CHECK)
        }
        _ => node.cannot_open(&error),
    })?;
    let text = match form {
        OutputForm::Json => qemu_style(&as_json(&report, open.format, &node.name().to_string_lossy())) + "\n",
        OutputForm::Human if args.has("quiet") => String::new(),
        OutputForm::Human => human(&report),
    };
    stdout().write_all(text.as_bytes())?;
    Ok(report.exit_code())
}

fn human(report: &Report) -> String {
    let Report { corruptions, leaks, check_errors, corruptions_fixed, leaks_fixed, .. } = *report;
    let mut out = String::new();
    if corruptions_fixed > 0 || leaks_fixed > 0 {
        let _ = write!(
            out,
            "The following inconsistencies were found and repaired:\n\n    {leaks_fixed} leaked clusters\n    \
             {corruptions_fixed} corruptions\n\nDouble checking the fixed image now...\n"
        );
    }
    if corruptions == 0 && leaks == 0 && check_errors == 0 {
        out += "No errors were found on the image.\n";
    }
    if corruptions > 0 {
        let _ = write!(
            out,
            "\n{corruptions} errors were found on the image.\n\
             Data may be corrupted, or further writes to the image may corrupt it.\n"
        );
    }
    if leaks > 0 {
        let _ = write!(
            out,
            "\n{leaks} leaked clusters were found on the image.\n\
             This means waste of disk space, but no harm to data.\n"
        );
    }
    if check_errors > 0 {
        let _ = write!(out, "\n{check_errors} internal errors have occurred during the check.\n");
    }
    add_statistics(&mut out, report);
    out
}
