//! `diskmill check`, with qemu-img's JSON and exit codes.

use std::fmt::Write as _;
use std::io::Write as _;

use diskmill::check::{CheckOptions, Finding, Repair, Report, Verdict, check};
use diskmill::{Format, Kind, OpenOptions};
use serde_json::{Map, Value, json};

use crate::args::{CheckArgs, OutputForm, RepairWhat};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::say::{self, BAD, GOOD, NOTE};

/// Findings that are listed unless all are asked for.
const SHOWN: u64 = 20;

pub(crate) fn run(args: &CheckArgs) -> Result<Exit, Failure> {
    let OpenOptions { format, policy, limits, force_share, .. } = args.open.options(args.format);
    let options = CheckOptions {
        format,
        repair: match args.repair {
            None => Repair::Nothing,
            Some(RepairWhat::Leaks) => Repair::Leaks,
            Some(RepairWhat::All) => Repair::All,
        },
        policy,
        limits,
        force_share,
    };
    let mut count = 0u64;
    let mut list = |verdict: Verdict, finding: &Finding| {
        count += 1;
        if !args.quiet && (args.verbose || count <= SHOWN) {
            eprintln!("{}", finding.qemu_line(verdict));
        }
    };
    let report = check(&args.file, &options, &mut list).map_err(|error| {
        let unsupported = error.kind() == Kind::Unsupported && error.structure().is_none();
        let failure = Failure::from(error);
        if unsupported { failure.or_exit(Exit::NoCheck) } else { failure }
    })?;
    if count > SHOWN && !args.verbose && !args.quiet {
        eprintln!("… and {} more (--verbose lists all)", count - SHOWN);
    }
    for warning in report.warnings.iter().filter(|_| !args.quiet) {
        say::warning(warning);
    }
    let text = match args.output.form() {
        OutputForm::Json => qemu_style(&as_json(&report, args.format, &args.file.to_string_lossy())) + "\n",
        OutputForm::Human if args.quiet => String::new(),
        OutputForm::Human => human(&report, options.repair),
    };
    anstream::stdout().write_all(text.as_bytes())?;
    Ok(match report.exit_code() {
        0 => Exit::Done,
        2 => Exit::Corrupt,
        3 => Exit::Leaks,
        _ => Exit::Failed,
    })
}

/// The keys are those of QEMU's `ImageCheck`, and their order that of its hash table.
pub(crate) fn as_json(report: &Report, format: Option<Format>, name: &str) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    // Fields that are 0 are left out.
    let some = |value: u64| (value != 0).then(|| json!(value));
    let format = format.unwrap_or(if report.total_clusters > 0 { Format::Qcow2 } else { Format::Vmdk });
    let fields = [
        ("image-end-offset", some(report.image_end_offset)),
        ("compressed-clusters", some(report.compressed_clusters)),
        ("total-clusters", some(report.total_clusters)),
        ("corruptions", some(report.corruptions)),
        ("corruptions-fixed", some(report.corruptions_fixed)),
        ("check-errors", Some(json!(report.check_errors))),
        ("leaks-fixed", some(report.leaks_fixed)),
        ("leaks", some(report.leaks)),
        ("allocated-clusters", some(report.allocated_clusters)),
        ("filename", Some(json!(name))),
        ("format", Some(json!(format.name()))),
        ("fragmented-clusters", some(report.fragmented_clusters)),
    ];
    for (key, value) in fields {
        if let Some(value) = value {
            put(key, value);
        }
    }
    Value::Object(out)
}

fn human(report: &Report, repair: Repair) -> String {
    let mut out = String::new();
    let Report { corruptions, leaks, check_errors, corruptions_fixed, leaks_fixed, .. } = *report;
    if corruptions_fixed > 0 || leaks_fixed > 0 {
        let _ =
            writeln!(out, "Repaired: {leaks_fixed} leaked clusters, {corruptions_fixed} corruptions. Now:");
    }
    if corruptions == 0 && leaks == 0 && check_errors == 0 {
        let _ = writeln!(out, "{GOOD}No errors were found on the image.{GOOD:#}");
    }
    if corruptions > 0 {
        let _ = writeln!(
            out,
            "{BAD}{corruptions} errors were found on the image{BAD:#}: data may be corrupted, or further writes may corrupt it."
        );
    }
    if leaks > 0 {
        let _ = writeln!(
            out,
            "{NOTE}{leaks} leaked clusters were found{NOTE:#}: a waste of space, but no harm to data."
        );
    }
    if report.leaks_kept > 0 {
        out.push_str("They were kept, because a damaged table may still refer to them.\n");
    }
    if check_errors > 0 {
        let _ = writeln!(out, "{check_errors} internal errors have occurred during the check.");
    }
    let hint = match repair {
        // No clusters: a VMDK, which is not repaired.
        _ if corruptions > 0 && report.total_clusters == 0 => {
            "`diskmill convert --salvage` copies what can be read of it.\n"
        }
        Repair::Nothing if corruptions > 0 => "Repair it (after a backup) with: diskmill check -r all FILE\n",
        Repair::Nothing | Repair::Leaks if corruptions > 0 => "-r all repairs more.\n",
        Repair::Nothing if leaks > 0 => "Free the space with: diskmill check -r leaks FILE\n",
        _ => "",
    };
    out.push_str(hint);
    add_statistics(&mut out, report);
    out
}

/// The last lines of the text: how full the image is.
pub(crate) fn add_statistics(out: &mut String, report: &Report) {
    if report.total_clusters > 0 && report.allocated_clusters > 0 {
        let share = |part: u64, all: u64| part as f64 * 100.0 / all as f64;
        let _ = writeln!(
            out,
            "{}/{} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            report.allocated_clusters,
            report.total_clusters,
            share(report.allocated_clusters, report.total_clusters),
            share(report.fragmented_clusters, report.allocated_clusters),
            share(report.compressed_clusters, report.allocated_clusters),
        );
    }
    if report.image_end_offset > 0 {
        let _ = writeln!(out, "Image end offset: {}", report.image_end_offset);
    }
}
