//! Which options the commands have: the union of what upstream's releases and the distributions' take.

use super::getopt::Opt;

const fn flag(short: char, long: &'static [&'static str]) -> Opt {
    Opt { short: Some(short), long, takes: false }
}

const fn value(short: char, long: &'static [&'static str]) -> Opt {
    Opt { short: Some(short), long, takes: true }
}

const fn long_flag(long: &'static [&'static str]) -> Opt {
    Opt { short: None, long, takes: false }
}

const fn long_value(long: &'static [&'static str]) -> Opt {
    Opt { short: None, long, takes: true }
}

const HELP: Opt = flag('h', &["help"]);
const QUIET: Opt = flag('q', &["quiet"]);
const PROGRESS: Opt = flag('p', &["progress"]);
const FORMAT: Opt = value('f', &["format"]);
const IMAGE_OPTS: Opt = long_flag(&["image-opts"]);
const OBJECT: Opt = long_value(&["object"]);
const FORCE_SHARE: Opt = flag('U', &["force-share"]);
const OUTPUT: Opt = long_value(&["output"]);
const OPTIONS: Opt = value('o', &["options"]);

/// Options in front of the command.
pub(super) const GLOBAL: &[Opt] = &[HELP, flag('V', &["version"]), value('T', &["trace"])];

const AMEND: &[Opt] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    OPTIONS,
    value('t', &["cache"]),
    long_flag(&["force"]),
];

const BENCH: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    value('c', &["count"]),
    value('d', &["depth"]),
    value('i', &["aio"]),
    flag('n', &["native"]),
    value('o', &["offset"]),
    value('s', &["buffer-size"]),
    value('S', &["step-size"]),
    value('t', &["cache"]),
    flag('w', &["write"]),
    long_value(&["pattern"]),
    long_value(&["flush-interval"]),
    long_flag(&["no-drain"]),
];

const BITMAP: &[Opt] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    value('b', &["source-file"]),
    value('F', &["source-format"]),
    value('g', &["granularity"]),
    long_flag(&["add"]),
    long_flag(&["remove"]),
    long_flag(&["clear"]),
    long_flag(&["enable"]),
    long_flag(&["disable"]),
    long_value(&["merge"]),
];

const CHECK: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    OUTPUT,
    value('r', &["repair"]),
    value('T', &["cache", "source-cache"]),
];

const COMMIT: &[Opt] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    value('b', &["base"]),
    flag('d', &["drop"]),
    value('r', &["rate"]),
    value('t', &["cache"]),
];

const COMPARE: &[Opt] = &[
    HELP,
    QUIET,
    PROGRESS,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    value('f', &["a-format", "format"]),
    value('F', &["b-format"]),
    flag('s', &["strict"]),
    value('T', &["cache", "source-cache"]),
];

const CONVERT: &[Opt] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORCE_SHARE,
    OBJECT,
    value('f', &["source-format", "format"]),
    value('O', &["target-format", "output-format"]),
    value('o', &["target-options", "options"]),
    value('B', &["backing"]),
    value('F', &["backing-format"]),
    flag('C', &["copy-range-offloading"]),
    flag('c', &["compress"]),
    value('l', &["source-snapshot", "snapshot"]),
    value('m', &["parallel"]),
    flag('n', &["no-create"]),
    value('r', &["rate"]),
    value('S', &["sparse-size"]),
    value('t', &["target-cache", "output-cache"]),
    value('T', &["source-cache"]),
    flag('W', &["oob-writes"]),
    long_flag(&["image-opts", "source-image-opts"]),
    long_flag(&["target-image-opts"]),
    long_flag(&["target-is-zero"]),
    long_flag(&["salvage"]),
    long_flag(&["bitmaps"]),
    long_flag(&["skip-broken-bitmaps"]),
];

const CREATE: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    OBJECT,
    OPTIONS,
    value('b', &["backing"]),
    value('F', &["backing-format"]),
    flag('u', &["backing-unsafe"]),
    // qemu-img takes it and does nothing with it.
    flag('6', &["compat6"]),
];

const DD: &[Opt] = &[HELP, FORMAT, IMAGE_OPTS, OBJECT, FORCE_SHARE, value('O', &["output-format"])];

const INFO: &[Opt] = &[HELP, FORMAT, IMAGE_OPTS, OBJECT, FORCE_SHARE, OUTPUT, flag('b', &["backing-chain"])];

const MAP: &[Opt] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    OUTPUT,
    value('s', &["start-offset"]),
    value('l', &["max-length"]),
];

const MEASURE: &[Opt] = &[
    HELP,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    OUTPUT,
    OPTIONS,
    value('O', &["target-format", "output-format"]),
    value('l', &["snapshot"]),
    value('s', &["size"]),
];

const REBASE: &[Opt] = &[
    HELP,
    QUIET,
    PROGRESS,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    value('b', &["backing"]),
    value('F', &["backing-format"]),
    value('t', &["cache"]),
    value('T', &["backing-cache", "source-cache"]),
    flag('u', &["backing-unsafe"]),
    flag('c', &["compress"]),
];

const RESIZE: &[Opt] =
    &[HELP, QUIET, FORMAT, IMAGE_OPTS, OBJECT, long_flag(&["shrink"]), long_value(&["preallocation"])];

const SNAPSHOT: &[Opt] = &[
    HELP,
    QUIET,
    FORMAT,
    IMAGE_OPTS,
    OBJECT,
    FORCE_SHARE,
    flag('l', &["list"]),
    value('a', &["apply"]),
    value('c', &["create"]),
    value('d', &["delete"]),
];

/// The options of a command.
pub(super) fn of(command: &str) -> &'static [Opt] {
    match command {
        "amend" => AMEND,
        "bench" => BENCH,
        "bitmap" => BITMAP,
        "check" => CHECK,
        "commit" => COMMIT,
        "compare" => COMPARE,
        "convert" => CONVERT,
        "create" => CREATE,
        "dd" => DD,
        "info" => INFO,
        "map" => MAP,
        "measure" => MEASURE,
        "rebase" => REBASE,
        "resize" => RESIZE,
        "snapshot" => SNAPSHOT,
        _ => &[HELP],
    }
}
