//! `diskmill convert`.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill::convert::{
    BadRange, BadRanges, CarryBitmaps, Compression, ConvertOptions, Input, Monitor, Output, RawOptions,
    Reflink, Summary, TargetFormat,
};
use diskmill::vmdk::VmdkStream;
use diskmill::{Error, Format, Image, Kind, Limits, OpenOptions, PipeReader, PipeWriter};
use serde_json::json;

use crate::args::{CacheMode, ConvertArgs, snapshot_ref};
use crate::exit::{Exit, Failure};
use crate::names;
use crate::options;
use crate::progress::Progress;
use crate::say;
use crate::signals::Watch;
use crate::verify::verify;

/// Bad ranges that are listed on standard error; all that the library keeps stand in the JSON result.
const LISTED_RANGES: usize = 20;

pub(crate) fn run(args: &ConvertArgs) -> Result<Exit, Failure> {
    if args.options.iter().any(|list| options::asks_for_help(list)) {
        io::stdout().write_all(options::help(&target_format(args)).as_bytes())?;
        return Ok(Exit::Done);
    }
    let Some((target, sources)) = args.files.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Err(Failure::usage(
            "convert takes at least one SOURCE, and a TARGET; see diskmill convert --help",
        ));
    };
    let to_stdout = is_stream(target);
    let from_stdin = sources.iter().any(|source| is_stream(source));
    if to_stdout && args.json {
        return Err(Failure::usage(
            "--json and a TARGET on standard output (-) exclude each other: both want it",
        ));
    }
    if args.copy_range && (args.sparse_size.is_some() || args.compress) {
        let other = if args.compress { "-c" } else { "-S" };
        return Err(Failure::usage(format!("Cannot enable copy offloading when {other} is used")));
    }
    let convert = convert_options(args)?;
    let output = if to_stdout {
        Output::Stream(PipeWriter::stdout().map_err(|error| stream_failure("output", &error))?)
    } else {
        Output::Path(target.clone())
    };
    convert.check(&output).map_err(Failure::of_request)?;
    warn_of_name(args, target);
    let mut images = Vec::new();
    let input = if from_stdin {
        check_stdin(args, sources)?;
        let pipe = PipeReader::stdin().map_err(|error| stream_failure("input", &error))?;
        match args.source_format {
            Some(Format::Vmdk) => Input::VmdkStream(Box::new(VmdkStream::new(pipe, &Limits::default())?)),
            _ => Input::Stream(pipe),
        }
    } else {
        if args.verify {
            sources.iter().try_for_each(|source| verify(source))?;
        }
        let open = open_options(args);
        images = sources.iter().map(|path| Image::open(path, &open)).collect::<Result<_, _>>()?;
        Input::Images(&images)
    };

    let monitor = Arc::new(Monitor::new());
    let watch = Watch::start(&monitor, to_stdout || from_stdin)
        .map_err(|error| Failure::failed(format!("cannot watch for signals: {error}")))?;
    let progress = Progress::start(&args.progress, to_stdout || args.json, &monitor);
    let result = diskmill::convert::convert(input, output, &convert, &monitor);
    progress.finish(result.is_ok());
    if !args.progress.quiet {
        for warning in images.iter().flat_map(Image::warnings) {
            say::warning(warning);
        }
    }
    let summary = result.map_err(|error| match watch.received() {
        Some(signal) if error.kind() == Kind::Cancelled => interrupted(signal, args, target),
        _ => with_hint(error),
    })?;

    if !summary.bad_ranges.is_empty() {
        list_bad_ranges(&summary.bad_ranges);
    }
    for name in &summary.skipped_bitmaps {
        say::warning(format_args!("bitmap {name:?} was not saved: it is left out"));
    }
    if args.json {
        writeln!(io::stdout(), "{}", report(&summary, sources, target))?;
    }
    Ok(if summary.bad_ranges.is_empty() { Exit::Done } else { Exit::BadRanges })
}

fn is_stream(path: &Path) -> bool {
    path == Path::new("-")
}

/// The failure, with what helps with a damaged source.
fn with_hint(error: Error) -> Failure {
    let damaged = error.kind() == Kind::Corrupt;
    let failure = Failure::from(error);
    if !damaged {
        return failure;
    }
    failure.hinting("`diskmill check` lists the damage; `convert --salvage` copies what can be read, and zeros for the rest")
}

fn target_format(args: &ConvertArgs) -> TargetFormat {
    args.target_format.clone().unwrap_or(TargetFormat::Raw(RawOptions::default()))
}

/// Warns who has named no format when the target's name tells of one: raw is written, as by qemu-img.
fn warn_of_name(args: &ConvertArgs, target: &Path) {
    let Some(ending) = names::telling_ending(target) else { return };
    if args.target_format.is_some() || args.no_create || args.progress.quiet {
        return;
    }
    if names::is_foreign(&ending) {
        say::warning(format_args!("{target:?} becomes a raw image: writing {ending} is not supported"));
    } else {
        say::warning(format_args!("{target:?} becomes a raw image; -O {ending} makes it what its name says"));
    }
}

fn stream_failure(what: &str, error: &io::Error) -> Failure {
    Failure::failed(format!("cannot use standard {what}: {error}"))
}

fn convert_options(args: &ConvertArgs) -> Result<ConvertOptions, Failure> {
    let cache = |is: fn(CacheMode) -> bool| args.target_cache.is_some_and(is);
    let mut format = target_format(args);
    for list in &args.options {
        options::apply(&mut format, list)?;
    }
    if let Some(backing) = &args.backing {
        format.set("backing_file", backing).map_err(Failure::of_request)?;
    }
    if let Some(backing_format) = args.backing_format {
        format.set("backing_fmt", backing_format.name()).map_err(Failure::of_request)?;
    }
    if let TargetFormat::Qcow2(qcow2) = &mut format
        && let Some(encryption) = &mut qcow2.encryption
    {
        let named = |id: &String| args.open.secret(id).ok_or_else(|| no_secret(id));
        encryption.key = match &args.target_key_file {
            Some(key) => Some(key.clone()),
            None => encryption.key_secret.as_ref().map(named).transpose()?,
        };
        if encryption.key.is_none() {
            return Err(Failure::usage(
                "encryption needs --target-key-file, or --object and encrypt.key-secret",
            ));
        }
    } else if args.target_key_file.is_some() && !args.no_create {
        return Err(Failure::usage("--target-key-file needs -o encrypt.format=luks"));
    }
    let compress = args.compress || (args.level.is_some() && format.always_packs());
    if args.level.is_some() && !compress {
        return Err(Failure::usage(
            "--level is for compressed targets: add -c (qcow2), -o subformat=streamOptimized (vmdk) or -O ova",
        ));
    }
    Ok(ConvertOptions {
        format,
        compress: compress.then_some(Compression { level: args.level }),
        sparse_size: args.sparse_size.unwrap_or(ConvertOptions::default().sparse_size),
        create: !args.no_create,
        target_is_zero: args.target_is_zero,
        existing: existing(args),
        threads: args.threads,
        memory: args.memory,
        engine: args.io.into(),
        direct: args.direct || cache(CacheMode::is_direct),
        sync: args.sync || cache(CacheMode::is_durable),
        salvage: args.salvage,
        bitmaps: match (args.bitmaps, args.skip_broken_bitmaps) {
            (false, _) => CarryBitmaps::None,
            (true, false) => CarryBitmaps::All,
            (true, true) => CarryBitmaps::Sound,
        },
        recompress: args.recompress,
        trust_packed: args.trust_packed,
        // Who asks for zeros to be found wants the data to be looked at.
        reflink: match (args.reflink, args.sparse_size) {
            (Some(when), _) => when.into(),
            (None, Some(_)) => Reflink::Never,
            (None, None) => Reflink::Auto,
        },
        copy_offload: args.copy_range,
        trust_backing: false,
    })
}

fn no_secret(id: &str) -> Failure {
    Failure::usage(format!("there is no --object secret with id={id}"))
}

/// How a target that is there and holds something is opened.
fn existing(args: &ConvertArgs) -> OpenOptions {
    let mut open = args.open.options(None);
    open.keys.extend(args.target_key_file.clone());
    open
}

fn open_options(args: &ConvertArgs) -> OpenOptions {
    OpenOptions {
        snapshot: args.snapshot.as_deref().map(snapshot_ref),
        direct: args.direct || args.source_cache.is_some_and(CacheMode::is_direct),
        ..args.open.options(args.source_format)
    }
}

/// What comes through a pipe is read once, front to back: raw and streamOptimized VMDKs can be.
fn check_stdin(args: &ConvertArgs, sources: &[PathBuf]) -> Result<(), Failure> {
    let wrong = match args.source_format {
        _ if sources.len() > 1 => "it cannot be joined with other sources".to_owned(),
        _ if args.snapshot.is_some() => "it has no snapshots".to_owned(),
        _ if args.verify => "it has no manifest to verify".to_owned(),
        Some(Format::Raw | Format::Vmdk) | None => return Ok(()),
        Some(format) => format!("it is read as raw or vmdk; save {format} to a file first"),
    };
    Err(Failure::usage(format!("SOURCE on standard input (-): {wrong}")))
}

fn interrupted(signal: i32, args: &ConvertArgs, target: &Path) -> Failure {
    use std::os::unix::fs::FileTypeExt;
    let device = std::fs::metadata(target).is_ok_and(|meta| meta.file_type().is_block_device());
    let state = if args.no_create || device {
        format!("{target:?} is incomplete")
    } else {
        "nothing was written under the final name".to_owned()
    };
    Failure::signal(signal, format!("interrupted; {state}"))
}

fn list_bad_ranges(ranges: &BadRanges) {
    for BadRange { start, len, reason } in ranges.listed.iter().take(LISTED_RANGES) {
        eprintln!("diskmill: filled with zeros: {len} bytes at {start}: {reason}");
    }
    let listed = ranges.listed.len();
    let more = ranges.more.saturating_add(listed.saturating_sub(LISTED_RANGES) as u64);
    match ranges.more {
        0 if more == 0 => {}
        0 => eprintln!("diskmill: and {more} more ranges (--json lists all)"),
        _ => eprintln!("diskmill: and {more} more ranges (--json lists the first {listed})"),
    }
    eprintln!("diskmill: {} bytes of the source could not be read", ranges.bytes());
}

/// The result for programs.
fn report(summary: &Summary, sources: &[PathBuf], target: &Path) -> serde_json::Value {
    let bad: Vec<_> = summary.bad_ranges.listed.iter().map(bad_range).collect();
    json!({
        "source": sources.iter().map(|path| path.to_string_lossy()).collect::<Vec<_>>(),
        "target": target.to_string_lossy(),
        "virtual-size": summary.virtual_size,
        "bytes-read": summary.bytes_read,
        "bytes-written": summary.bytes_written,
        "bytes-zero": summary.bytes_zero,
        "bytes-cloned": summary.bytes_cloned,
        "bytes-copied-in-kernel": summary.bytes_copied,
        "bytes-passed-packed": summary.bytes_passed,
        "bytes-packed": summary.bytes_packed,
        "engine": summary.engine,
        "engine-reason": summary.engine_reason,
        "threads": summary.threads,
        "seconds": summary.seconds,
        "bad-ranges": bad,
        "more-bad-ranges": summary.bad_ranges.more,
        "more-bad-bytes": summary.bad_ranges.more_bytes,
    })
}

fn bad_range(range: &BadRange) -> serde_json::Value {
    json!({ "start": range.start, "length": range.len, "reason": range.reason })
}
