//! `qemu-img bitmap`.

use diskmill::{Error, Format, FormatInfo, Image, Kind, OpenOptions};

use super::getopt::{Args, not_text};
use super::node::{Context, Node};
use super::size::size;
use super::{Fail, Outcome};

/// What is done to the bitmap, in the words of qemu-img's messages.
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// Of this bitmap.
    Merge(String),
}

impl Action {
    fn named((option, value): &(&'static str, std::ffi::OsString)) -> Option<Self> {
        Some(match *option {
            "add" => Self::Add,
            "remove" => Self::Remove,
            "clear" => Self::Clear,
            "enable" => Self::Enable,
            "disable" => Self::Disable,
            "merge" => Self::Merge(value.to_string_lossy().into_owned()),
            _ => return None,
        })
    }

    const fn name(&self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Remove => "remove",
            Self::Clear => "clear",
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Merge(_) => "merge",
        }
    }
}

pub(super) fn run(args: Args) -> Outcome {
    let granularity = args.text("granularity").map(|text| size("granularity", &text)).transpose()?;
    // 0 stands for the default.
    let granularity = granularity.filter(|&granularity| granularity > 0);
    let actions: Vec<Action> = args.options.iter().filter_map(Action::named).collect();
    if actions.is_empty() {
        return Err(Fail::new(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        ));
    }
    let [file, bitmap] = args.operands.as_slice() else {
        return Err(Fail::new("Expecting filename and bitmap name"));
    };
    let bitmap = bitmap.to_str().ok_or_else(|| Fail::usage(not_text("the name of the bitmap", bitmap)))?;
    let adds = actions.iter().any(|action| matches!(action, Action::Add));
    if args.has("granularity") && !adds {
        return Err(Fail::new("granularity only supported with --add"));
    }
    let source = args.last("source-file");
    if args.has("source-format") && source.is_none() {
        return Err(Fail::new("-F only supported with -b"));
    }
    if source.is_some() && !actions.iter().any(|action| matches!(action, Action::Merge(_))) {
        return Err(Fail::new("Merge bitmap source file only supported with --merge"));
    }
    let mut context = Context::of(&args, "format")?;
    let node = context.node(file)?;
    let mut image = open(&node)?;
    let source = source
        .map(|source| {
            // --image-opts and -f are for the image alone.
            (context.image_opts, context.format) = (false, args.text("source-format"));
            context.open(source).map(|(_, image)| image)
        })
        .transpose()?;
    for action in actions {
        let done = act(&mut image, source.as_ref(), &action, bitmap, granularity);
        done.map_err(|reason| {
            Fail::new(format!("Operation {} on bitmap {bitmap} failed: {reason}", action.name()))
        })?;
    }
    image.close().map_err(|error| Fail::new(error.to_string()))?;
    Ok(0)
}

/// Opens the image for writing, or as it can be if its format has no bitmaps anyway.
fn open(node: &Node) -> Outcome<Image> {
    node.open(&OpenOptions { writable: true, ..node.options() }).or_else(|fail| {
        let image = node.open(&node.options());
        image.ok().filter(|image| image.info().format == Format::Vmdk).ok_or(fail)
    })
}

fn act(
    image: &mut Image,
    source: Option<&Image>,
    action: &Action,
    bitmap: &str,
    granularity: Option<u64>,
) -> Result<(), String> {
    match action {
        Action::Add => {
            let unpersistent = format!("Can't make bitmap '{bitmap}' persistent in '#block0'");
            match &image.info().specific {
                FormatInfo::Qcow2(info) if info.area.header.version < 3 => {
                    return Err(format!("{unpersistent}: Cannot store dirty bitmaps in qcow2 v2 files"));
                }
                FormatInfo::Qcow2(_) => {}
                _ => {
                    return Err(
                        "Can't store persistent bitmaps to #block0: Operation not supported".to_owned()
                    );
                }
            }
            image.add_bitmap(bitmap, granularity, true).map_err(|error| match error.kind() {
                Kind::Limit => format!("{unpersistent}: {}", error.message()),
                _ => reason(&error),
            })
        }
        _ if image.info().format != Format::Qcow2 => Err(format!("Dirty bitmap '{bitmap}' not found")),
        Action::Remove => image.remove_bitmap(bitmap).map_err(|error| reason(&error)),
        Action::Clear => image.clear_bitmap(bitmap).map_err(|error| reason(&error)),
        Action::Enable => image.enable_bitmap(bitmap, true).map_err(|error| reason(&error)),
        Action::Disable => image.enable_bitmap(bitmap, false).map_err(|error| reason(&error)),
        Action::Merge(name) => {
            // The target first: that is the one whose absence is told.
            image.dirty_bits(bitmap).map_err(|error| reason(&error))?;
            let bits = source.unwrap_or(image).dirty_bits(name).map_err(|error| reason(&error))?;
            image.merge_bitmap(bitmap, &bits).map_err(|error| reason(&error))
        }
    }
}

fn reason(error: &Error) -> String {
    let inconsistent = error.kind() == Kind::Corrupt && error.message().ends_with("cannot be used");
    let hint =
        if inconsistent { "\nTry block-dirty-bitmap-remove to delete this bitmap from disk" } else { "" };
    format!("{}{hint}", error.message())
}
