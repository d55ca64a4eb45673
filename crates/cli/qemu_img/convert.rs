//! `qemu-img convert`.

use std::ffi::OsStr;
use std::io::{Write, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use diskmill::convert::{
    BadRange, BadRanges, CarryBitmaps, Compression, ConvertOptions, Input, Output, TargetFormat,
};
use diskmill::vmdk::Subformat;
use diskmill::{Allow, Kind, OpenOptions, OpenPolicy};

use super::drivers::Driver;
use super::getopt::Args;
use super::node::{Context, Node, local_path};
use super::object::Secrets;
use super::opts::{Dict, join};
use super::size::{number, size};
use super::target::target_format;
use super::{Fail, Outcome, cache_mode, messages, report, watched};
use crate::args::{CacheMode, snapshot_ref};
use crate::names::shown;
use crate::options::asks_for_help;

/// The largest `-S`.
const MAX_SPARSE: u64 = 16 << 20;
const COMMANDED_ZERO: &str = "Cannot use --target-is-zero when the destination image has a backing file";

pub(super) fn run(args: Args) -> Outcome {
    let request = Request::parse(&args)?;
    let Some(request) = request else { return Ok(0) };
    request.run(&args)
}

/// A command line that makes sense so far.
struct Request {
    options: ConvertOptions,
    context: Context,
    target: Option<Context>,
}

impl Request {
    /// `None`: the user asked for help and got it.
    fn parse(args: &Args) -> Outcome<Option<Self>> {
        let context = Context::of(args, "source-format")?;
        let lists = join(args.all("target-options"))?;
        let sparse = args.text("sparse-size").map(|text| sparse_size(&text)).transpose()?;
        if let Some(text) = args.text("parallel") {
            number("number of coroutines", &text, 1, 16)?;
        }
        if let Some(text) = args.text("rate") {
            size("rate limit", &text)?;
        }
        check_flags(args)?;
        let format = args.text("target-format").unwrap_or_else(|| "raw".to_owned());
        if lists.as_deref().is_some_and(asks_for_help) {
            let driver = Driver::creating(&format).map_err(Fail::new)?;
            stdout().write_all(driver.help(args.operands.len() > 1).as_bytes())?;
            return Ok(None);
        }
        if args.operands.len() < 2 {
            return Err(Fail::usage("Must specify image file name"));
        }
        let target_cache = cache_mode(args, "target-cache", "cache")?;
        let mut options = ConvertOptions {
            compress: args.has("compress").then_some(Compression::default()),
            create: !args.has("no-create"),
            target_is_zero: args.has("target-is-zero"),
            existing: OpenOptions {
                policy: OpenPolicy { allow: Allow::Backing, paths: Vec::new() },
                ..OpenOptions::default()
            },
            direct: target_cache.is_some_and(CacheMode::is_direct),
            sync: target_cache.is_some_and(CacheMode::is_durable),
            salvage: args.has("salvage"),
            bitmaps: match (args.has("bitmaps"), args.has("skip-broken-bitmaps")) {
                (false, _) => CarryBitmaps::None,
                (true, false) => CarryBitmaps::All,
                (true, true) => CarryBitmaps::Sound,
            },
            ..ConvertOptions::default()
        };
        if let Some(sparse) = sparse {
            options.sparse_size = sparse;
        }
        let target = match args.has("target-image-opts") {
            true => Some(Context {
                image_opts: true,
                format: None,
                force_share: false,
                cache: None,
                secrets: Secrets::of(args)?,
            }),
            false => None,
        };
        let mut request = Self { options, context, target };
        request.context.cache = cache_mode(args, "source-cache", "source cache")?;
        if request.options.create {
            request.options.format = fresh(args, &format, lists.as_deref(), &request.context.secrets)?;
            // As in QEMU: one kind of VMDK is packed, and the others that grow are written all the same.
            if let TargetFormat::Vmdk(vmdk) = &request.options.format
                && vmdk.subformat != Subformat::StreamOptimized
            {
                request.options.compress = None;
            }
        } else {
            let driver = Driver::creating(&format).map_err(Fail::new)?;
            request.options.format =
                target_format(driver, &Dict::default(), &Secrets::default()).map_err(Fail::new)?;
        }
        Ok(Some(request))
    }

    fn run(self, args: &Args) -> Outcome {
        let Some((target, sources)) = args.operands.split_last() else { return Ok(1) };
        let Self { mut options, context, target: target_context } = self;
        let snapshot = args.text("source-snapshot").map(|text| snapshot_ref(&text));
        let mut images = Vec::new();
        let mut nodes = Vec::new();
        for source in sources {
            let node = context.node(source)?;
            let open = OpenOptions { snapshot: snapshot.clone(), ..node.options() };
            images.push(node.open_or(&open, |error| match error.kind() {
                Kind::Invalid if snapshot.is_some() => {
                    Fail::new("Failed to load snapshot: Can't find snapshot")
                }
                _ => node.cannot_open(error),
            })?);
            nodes.push(node);
        }
        let path = match &target_context {
            Some(context) => {
                let node = context.node(target)?;
                if let Some(format) = node.format {
                    let driver = Driver::creating(format.name()).map_err(Fail::new)?;
                    options.format =
                        target_format(driver, &Dict::default(), &Secrets::default()).map_err(Fail::new)?;
                }
                options.existing = node.options();
                node.path
            }
            None => local_path(target)
                .map_err(|reason| Fail::new(format!("{}: {reason}", target.to_string_lossy())))?,
        };
        if !options.create && !path.exists() {
            let name = target.to_string_lossy();
            return Err(Fail::new(format!(
                "Could not open '{name}': Could not open '{}': No such file or directory",
                path.display()
            )));
        }
        if images.iter().any(|image| image.files().iter().any(|file| is_same(&file.path, &path))) {
            let (name, format) = (target.to_string_lossy(), options.format.name());
            return Err(Fail::new(format!(
                "{name}: error while converting {format}: {}",
                messages::lock_message("\"write\" lock", &path)
            )));
        }
        let quiet = args.has("quiet");
        let result = watched(args, |monitor| {
            diskmill::convert::convert(Input::Images(&images), Output::Path(path.clone()), &options, monitor)
        })?;
        let summary = result.map_err(|error| failure(&error, &nodes, target, &path, &options))?;
        if !quiet {
            summary.bad_ranges.listed.iter().for_each(warn);
            let BadRanges { more, more_bytes, .. } = summary.bad_ranges;
            if more > 0 {
                report(&format!("warning: error while reading {more_bytes} bytes in {more} more places"));
            }
        }
        for name in &summary.skipped_bitmaps {
            report(&format!("warning: Skipping inconsistent bitmap '{}'", shown(name)));
        }
        Ok(0)
    }
}

/// What excludes or needs something else.
fn check_flags(args: &Args) -> Outcome<()> {
    let wrong = if args.has("skip-broken-bitmaps") && !args.has("bitmaps") {
        "Use of --skip-broken-bitmaps requires --bitmaps"
    } else if args.has("copy-range-offloading") && args.has("compress") {
        "Cannot enable copy offloading when -c is used"
    } else if args.has("copy-range-offloading") && args.has("sparse-size") {
        "Cannot enable copy offloading when -S is used"
    } else if args.has("copy-range-offloading") && args.has("salvage") {
        "Cannot use copy offloading in salvaging mode"
    } else if args.has("target-image-opts") && !args.has("no-create") {
        "--target-image-opts requires use of -n flag"
    } else if args.has("target-image-opts") && args.has("target-format") {
        "-O and --target-image-opts are mutually exclusive"
    } else if args.has("target-is-zero") && !args.has("no-create") {
        "--target-is-zero requires use of -n flag"
    } else if args.has("target-is-zero") && args.has("backing") {
        COMMANDED_ZERO
    } else if args.has("no-create") && args.has("target-options") {
        "-o has no effect when skipping image creation"
    } else {
        return Ok(());
    };
    Err(Fail::new(wrong))
}

fn sparse_size(text: &str) -> Outcome<u64> {
    let size = size("buffer size for sparse output", text)?;
    if !size.is_multiple_of(512) || size > MAX_SPARSE {
        return Err(Fail::new(format!(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to {MAX_SPARSE}. \
             Select 0 to disable sparse detection (fully allocates output)."
        )));
    }
    Ok(size)
}

/// The options of the image that is to be made.
fn fresh(args: &Args, format: &str, lists: Option<&str>, secrets: &Secrets) -> Outcome<TargetFormat> {
    let driver = Driver::creating(format).map_err(Fail::new)?;
    let mut dict = driver.check(&Dict::from_list(lists.unwrap_or_default())).map_err(Fail::new)?;
    for (option, name) in [("backing", "backing_file"), ("backing-format", "backing_fmt")] {
        if let Some(value) = args.text(option) {
            if !driver.has_backing_files() {
                return Err(Fail::new(format!("Backing file not supported for file format '{format}'")));
            }
            dict.set(name, value);
        }
    }
    let sources = args.operands.len().saturating_sub(1);
    if dict.get("backing_file").is_some() {
        if sources > 1 {
            return Err(Fail::new(
                "Having a backing file for the target makes no sense when concatenating multiple input images",
            ));
        }
        if dict.get("backing_fmt").is_none() {
            return Err(Fail::new("Use of backing file requires explicit backing format"));
        }
    }
    if args.has("compress") {
        let flat = dict.get("subformat").is_some_and(|subformat| subformat.ends_with("Flat"));
        if driver.name == "raw" || flat {
            return Err(Fail::new("Compression not supported for this file format"));
        }
        if dict.get("preallocation").is_some_and(|mode| mode != "off") {
            return Err(Fail::new("Compression and preallocation not supported at the same time"));
        }
        if dict.get("encryption") == Some("on") || dict.get("encrypt.format").is_some() {
            return Err(Fail::new("Compression and encryption not supported at the same time"));
        }
    }
    let name = args.operands.last().map(|name| name.to_string_lossy()).unwrap_or_default();
    target_format(driver, &dict, secrets)
        .map_err(|reason| Fail::new(format!("{name}: error while converting {format}: {reason}")))
}

fn failure(
    error: &diskmill::Error,
    nodes: &[Node],
    target: &OsStr,
    path: &Path,
    options: &ConvertOptions,
) -> Fail {
    let name = target.to_string_lossy();
    let format = options.format.name();
    if options.bitmaps != CarryBitmaps::None
        && let Some(message) = bitmap_failure(error.message())
    {
        return Fail::new(message);
    }
    let message = match (error.kind(), error.path()) {
        (Kind::Busy, _) => messages::cannot_open(error, path, None),
        (Kind::Io, Some(at)) if nodes.iter().any(|node| node.path == at) => {
            return Fail::new(format!("error while reading: {}", messages::while_working(error)));
        }
        (Kind::Io, Some(at)) if at != path => {
            let reason = messages::cannot_open(error, path, None);
            return Fail::new(format!("Could not open '{name}': {reason}"));
        }
        (Kind::Io, Some(_)) => format!(
            "error while converting {format}: Could not create '{}': {}",
            path.display(),
            messages::while_working(error)
        ),
        _ => return Fail::new(format!("{name}: {error}")),
    };
    Fail::new(format!("{name}: {message}"))
}

/// The message for what went wrong with bitmaps.
fn bitmap_failure(message: &str) -> Option<String> {
    if message.starts_with("Cannot copy inconsistent bitmap") {
        let hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it";
        return Some(format!("{message}\n{hint}"));
    }
    if let Some(name) = message.strip_prefix("Bitmap already exists: ") {
        return Some(format!("Failed to create bitmap {name}: {message}"));
    }
    let plain =
        ["Copying bitmaps only", "Source lacks bitmap", "Format driver", "Bitmaps are of different sizes"];
    plain.iter().any(|start| message.starts_with(start)).then(|| message.to_owned())
}

/// Whether both are one file.
fn is_same(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| std::fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    identity(one).is_some_and(|one| Some(one) == identity(other))
}

fn warn(range: &BadRange) {
    report(&format!("warning: error while reading offset {}: {}", range.start, range.reason));
}
