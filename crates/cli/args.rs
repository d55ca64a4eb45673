//! Arguments that several commands share, and those of the commands that read and compare. Letters mean what they mean in
//! qemu-img.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use diskmill::convert::{Reflink, TargetFormat};
use diskmill::{Allow, EngineChoice, Format, OpenOptions, OpenPolicy, Secret, SnapshotRef, parse_size};

use crate::secrets::{self, SecretObject};

const CONVERT_EXAMPLES: &str = "\
Examples:
  diskmill convert disk.qcow2 disk.raw
  diskmill convert -O qcow2 -c disk.raw disk.qcow2
  diskmill convert -O qcow2 -B base.qcow2 -F qcow2 full.raw overlay.qcow2
  diskmill convert -l before-upgrade disk.qcow2 old-state.raw
  curl -s https://example.org/disk.raw | diskmill convert -f raw -O qcow2 - disk.qcow2";

const CONVERT_CODES: &str = "\
Exit codes: 0 done; 1 error; 2 wrong usage; 3 done with --salvage, but parts could not be read; \
128 + n: ended by signal n. After an error or a signal the old TARGET is still there, or none, \
unless it is a device or was written into (-n).";

#[derive(Debug, Args)]
#[command(
    before_help = CONVERT_EXAMPLES,
    after_help = CONVERT_CODES,
    override_usage = "diskmill convert [OPTIONS] SOURCE... TARGET"
)]
pub(crate) struct ConvertArgs {
    /// Format of the sources: raw, qcow2, vmdk or ova [default: detected from their first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) source_format: Option<Format>,

    /// Format of the target: raw, qcow2, vmdk or ova [default: raw]
    #[arg(short = 'O', long, value_name = "FMT", value_parser = TargetFormat::named)]
    pub(crate) target_format: Option<TargetFormat>,

    /// Options of the target: NAME=VALUE, several with commas, `,,` for a comma in a value; `help` lists them
    #[arg(short = 'o', long, visible_alias = "target-options", value_name = "LIST")]
    pub(crate) options: Vec<String>,

    /// Compress the target (qcow2, streamOptimized VMDK)
    #[arg(short = 'c', long)]
    pub(crate) compress: bool,

    /// Level of the compression: 1 to 12 for zlib, -7 to 22 for zstd [default: fastest that is as small as qemu-img's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub(crate) level: Option<i32>,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,

    /// Runs of zeros of at least SIZE bytes are left out of the target [default: 4k]; 0 allocates everything
    #[arg(short = 'S', long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) sparse_size: Option<u64>,

    /// qemu-img's number of coroutines, 1 to 16: accepted and ignored, see --threads
    #[arg(short = 'm', long = "parallel", value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(crate) _parallel: Option<u8>,

    /// Accepted and ignored: writes are out of order anyway
    #[arg(short = 'W', long = "oob-writes")]
    pub(crate) _oob_writes: bool,

    /// Share blocks with the sources, as cp does, where one file system (XFS, btrfs, bcachefs) has both; zeros are then not
    /// looked for [default: auto, but never with -S]
    #[arg(long, value_name = "WHEN")]
    pub(crate) reflink: Option<When>,

    /// Let the kernel copy what cannot be shared: for network file systems whose server copies; zeros are then not
    /// looked for
    #[arg(short = 'C', long = "copy-range-offloading")]
    pub(crate) copy_range: bool,

    /// qemu-img's cache mode for the target: none is --direct, writethrough --sync, directsync both
    #[arg(short = 't', long, value_name = "CACHE")]
    pub(crate) target_cache: Option<CacheMode>,

    /// qemu-img's cache mode for the sources: none and directsync bypass the page cache
    #[arg(short = 'T', long, value_name = "CACHE")]
    pub(crate) source_cache: Option<CacheMode>,

    /// Write into the existing TARGET instead of making a new one
    #[arg(short = 'n', long)]
    pub(crate) no_create: bool,

    /// With -n: TARGET reads as zeros everywhere, so zeros need not be written
    #[arg(long, requires = "no_create")]
    pub(crate) target_is_zero: bool,

    /// Make the target an overlay of this file: what is the same there is not copied
    #[arg(short = 'B', long, value_name = "FILE")]
    pub(crate) backing: Option<String>,

    /// Passphrase for a TARGET with -o encrypt.format=luks, from this file; a line end after it does not count
    #[arg(long, value_name = "FILE", value_parser = secrets::from_file)]
    pub(crate) target_key_file: Option<Secret>,

    /// Format of the backing file [default: detected from its first bytes]
    #[arg(short = 'F', long, value_name = "FMT", requires = "backing")]
    pub(crate) backing_format: Option<Format>,

    /// Copy an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, visible_alias = "source-snapshot", value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,

    /// Worker threads [default: one for each CPU that may be used]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// Upper bound for buffers. Tables of TARGET come on top: at most 80 MiB (a qcow2 with the largest L1 table)
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = parse_size)]
    pub(crate) memory: u64,

    /// How the kernel is asked to move bytes
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    pub(crate) io: Io,

    /// Bypass the page cache (O_DIRECT) for sources and target (not for a target that holds data already, with -n)
    #[arg(long)]
    pub(crate) direct: bool,

    /// Make the target durable before it gets its name
    #[arg(long)]
    pub(crate) sync: bool,

    /// Go on where a source is damaged: fill with zeros, list the ranges, exit with 3
    #[arg(long)]
    pub(crate) salvage: bool,

    /// Carry the persistent bitmaps of a qcow2 source over into the qcow2 target
    #[arg(long)]
    pub(crate) bitmaps: bool,

    /// Leave out bitmaps that were not saved, instead of failing
    #[arg(long, requires = "bitmaps")]
    pub(crate) skip_broken_bitmaps: bool,

    /// First check all files of the sources, which must be OVAs, against their manifests
    #[arg(long)]
    pub(crate) verify: bool,

    /// Pack everything anew, even clusters that the source has packed in a way that the target can take over
    #[arg(long)]
    pub(crate) recompress: bool,

    /// Unpack packed clusters that are taken over, to find damage in them: the default
    #[arg(long = "verify-packed")]
    pub(crate) _verify_packed: bool,

    /// Take packed clusters over without unpacking them: faster, but damage in them goes unseen. For sources that are
    /// known to be sound
    #[arg(long, conflicts_with_all = ["recompress", "salvage", "_verify_packed"])]
    pub(crate) trust_packed: bool,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// Print what was done as one JSON object on standard output
    #[arg(long)]
    pub(crate) json: bool,

    /// Images, one behind the other, and the file or device to write; `-` is standard input or output (raw, streamOptimized VMDK)
    #[arg(value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// Format of the image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Also show the backing file, its backing file, and so on
    #[arg(short = 'b', long)]
    pub(crate) backing_chain: bool,

    /// First check all files of the image, which must be an OVA, against its manifest
    #[arg(long)]
    pub(crate) verify: bool,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    /// The image
    pub(crate) file: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct MapArgs {
    /// Format of the image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// First byte of the guest's disk to show
    #[arg(short = 's', long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    pub(crate) start_offset: u64,

    /// Bytes to show [default: up to the end]
    #[arg(short = 'l', long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_length: Option<u64>,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    /// The image
    pub(crate) file: PathBuf,
}

const COMPARE_CODES: &str = "\
Exit codes: 0 same; 1 different; 2 wrong usage, or an image cannot be opened; 3 its map cannot be read; \
4 it cannot be read; 128 + n: ended by signal n.";

#[derive(Debug, Args)]
#[command(after_help = COMPARE_CODES)]
pub(crate) struct CompareArgs {
    /// Format of the first image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, visible_alias = "format", value_name = "FMT")]
    pub(crate) a_format: Option<Format>,

    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) b_format: Option<Format>,

    /// Sizes must be the same too, and where data, zeros, compressed data and nothing are
    #[arg(short = 's', long)]
    pub(crate) strict: bool,

    /// qemu-img's cache mode: none and directsync bypass the page cache
    #[arg(short = 'T', long, value_name = "CACHE")]
    pub(crate) cache: Option<CacheMode>,

    #[command(flatten)]
    pub(crate) progress: ProgressArgs,

    /// Threads [default: one for each CPU that may be used]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    /// One image
    pub(crate) a: PathBuf,

    /// The other
    pub(crate) b: PathBuf,
}

const CHECK_CODES: &str = "\
Exit codes (with -r: after the repair): 0 no errors; 1 the check could not be completed; 2 the image is corrupt; \
3 it only has leaked clusters; 63 the format has no check (raw, ova).";

#[derive(Debug, Args)]
#[command(after_help = CHECK_CODES)]
pub(crate) struct CheckArgs {
    /// Format of the image: qcow2 or vmdk [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    /// Repair a qcow2 image: its leaked clusters, or everything that can be; guest data stays as it is
    #[arg(short = 'r', long, value_name = "WHAT")]
    pub(crate) repair: Option<RepairWhat>,

    /// qemu-img's cache mode: accepted and ignored
    #[arg(short = 'T', long, value_name = "CACHE")]
    pub(crate) _cache: Option<CacheMode>,

    /// Print nothing but errors of the check itself
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,

    /// List all that was found, not only the first of it
    #[arg(short = 'v', long)]
    pub(crate) verbose: bool,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    #[command(flatten)]
    pub(crate) output: OutputArgs,

    /// The image
    pub(crate) file: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RepairWhat {
    Leaks,
    All,
}

#[derive(Debug, Args)]
pub(crate) struct ProgressArgs {
    /// Show progress: a bar on a terminal, else qemu-img's line
    #[arg(short = 'p', conflicts_with = "mode")]
    pub(crate) show: bool,

    /// How to show progress: a bar on a terminal (auto) or always, qemu-img's line on standard output, JSON lines on
    /// standard error
    #[arg(long = "progress", value_name = "MODE")]
    pub(crate) mode: Option<ProgressMode>,

    /// No progress, no remarks: only errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

impl ProgressArgs {
    /// Progress as qemu-img shows it: only where it is asked for, and always as its line.
    pub(crate) fn of_qemu_img(show: bool, quiet: bool) -> Self {
        let mode = if show { ProgressMode::Qemu } else { ProgressMode::None };
        Self { show, mode: Some(mode), quiet }
    }
}

/// How to open images.
#[derive(Debug, Clone, Args)]
pub(crate) struct OpenArgs {
    /// Read images that another process may be writing to
    #[arg(short = 'U', long)]
    force_share: bool,

    /// Let images name files in this folder too, as backing files and the like; by default only in the image's own
    #[arg(long, value_name = "DIR")]
    allow_path: Vec<PathBuf>,

    /// Let images name any file; only for images whose maker is trusted
    #[arg(long)]
    allow_any_path: bool,

    /// Disk of an OVA that has several: its number, from 1, or its name
    #[arg(long, value_name = "N|NAME")]
    disk: Option<String>,

    /// Read a VMDK delta although its parent was changed since (the CIDs differ)
    #[arg(long)]
    ignore_cid: bool,

    /// Passphrase of an encrypted image, from this file; a line end after it does not count
    #[arg(long, value_name = "FILE", value_parser = secrets::from_file)]
    key_file: Vec<Secret>,

    /// A passphrase as qemu-img takes it: secret,id=ID,data=TEXT or secret,id=ID,file=FILE
    #[arg(long, value_name = "SECRET", value_parser = SecretObject::parse)]
    object: Vec<SecretObject>,
}

impl OpenArgs {
    /// The passphrase that `--object` names `id`.
    pub(crate) fn secret(&self, id: &str) -> Option<Secret> {
        self.object.iter().find(|object| object.id == id).map(|object| object.secret.clone())
    }

    /// All passphrases that the user gave.
    pub(crate) fn keys(&self) -> Vec<Secret> {
        let objects = self.object.iter().map(|object| &object.secret);
        self.key_file.iter().chain(objects).cloned().collect()
    }

    /// The same as arguments for another process of this program, but for the passphrases, which are nobody else's
    /// business.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut out: Vec<OsString> = Vec::new();
        let flags = [
            (self.force_share, "--force-share"),
            (self.allow_any_path, "--allow-any-path"),
            (self.ignore_cid, "--ignore-cid"),
        ];
        out.extend(flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag.into()));
        for path in &self.allow_path {
            out.extend(["--allow-path".into(), path.into()]);
        }
        if let Some(disk) = &self.disk {
            out.extend(["--disk".into(), disk.into()]);
        }
        out
    }

    pub(crate) fn options(&self, format: Option<Format>) -> OpenOptions {
        let allow = if self.allow_any_path { Allow::Anything } else { Allow::OwnTree };
        OpenOptions {
            format,
            policy: OpenPolicy { allow, paths: self.allow_path.clone() },
            force_share: self.force_share,
            disk: self.disk.clone(),
            ignore_cid: self.ignore_cid,
            keys: self.keys(),
            ..OpenOptions::default()
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProgressMode {
    Auto,
    Bar,
    Json,
    Qemu,
    None,
}

/// How a command prints what it found out.
#[derive(Debug, Args)]
pub(crate) struct OutputArgs {
    /// How to print
    #[arg(long, value_name = "FORM", default_value = "human")]
    output: OutputForm,

    /// Short for --output json
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl OutputArgs {
    pub(crate) const fn form(&self) -> OutputForm {
        if self.json { OutputForm::Json } else { self.output }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputForm {
    Human,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Io {
    Auto,
    Uring,
    Sync,
}

impl From<Io> for EngineChoice {
    fn from(io: Io) -> Self {
        match io {
            Io::Auto => Self::Auto,
            Io::Uring => Self::Uring,
            Io::Sync => Self::Sync,
        }
    }
}

/// As in `cp --reflink`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    /// Where it can be done
    Auto,
    /// Fail where it cannot be done
    Always,
    /// Not at all
    Never,
}

impl From<When> for Reflink {
    fn from(when: When) -> Self {
        match when {
            When::Auto => Self::Auto,
            When::Always => Self::Always,
            When::Never => Self::Never,
        }
    }
}

/// QEMU's cache modes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum CacheMode {
    None,
    Writethrough,
    Writeback,
    Directsync,
    Unsafe,
}

impl CacheMode {
    pub(crate) const fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::Directsync)
    }

    pub(crate) const fn is_durable(self) -> bool {
        matches!(self, Self::Writethrough | Self::Directsync)
    }
}

/// Takes qemu-img's `-l`: an id or name, or `snapshot.id=…` and `snapshot.name=…`.
pub(crate) fn snapshot_ref(text: &str) -> SnapshotRef {
    let mut wanted = (None, None);
    for (name, value) in crate::options::split(text) {
        match (name.as_str(), value) {
            ("snapshot.id", Some(value)) => wanted.0 = Some(value),
            ("snapshot.name", Some(value)) => wanted.1 = Some(value),
            _ => return SnapshotRef::Any(text.to_owned()),
        }
    }
    match wanted {
        (None, None) => SnapshotRef::Any(text.to_owned()),
        (id, name) => SnapshotRef::Exact { id, name },
    }
}
