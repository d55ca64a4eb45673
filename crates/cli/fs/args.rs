//! The command line of `diskmill fs` as it is typed.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand, ValueEnum};
use diskmill::{Format, OpenOptions, parse_size};

use super::copy::readable;
use super::customize::{CustomizeArgs, SysprepArgs};
use super::diff::DiffArgs;
use super::grow::GrowArgs;
use super::guest::Access;
use super::headings::arranged;
use super::pack::Owner;
use super::prepare::PrepareArgs;
use super::registry::RegistryVerb;
use super::settings::SettingsArgs;
use super::sparsify::SparsifyArgs;
use super::tools::{MountArgs, ScriptArgs, ShellArgs, UmountArgs};
use crate::args::{OpenArgs, snapshot_ref};
use crate::exit::Failure;

const EXAMPLES: &str = "\
Examples:
  diskmill fs list disk.qcow2
  diskmill fs inspect --apps disk.qcow2
  diskmill fs cat disk.vmdk /etc/os-release
  diskmill fs get disk.qcow2 /etc ./copy
  diskmill fs put disk.qcow2 ./motd /etc/motd
  diskmill fs --help; diskmill fs VERB --help";

const CODES: &str = "\
Options may stand before the verb, too: `diskmill fs --keep ls disk.qcow2` is `diskmill fs ls --keep disk.qcow2`.

Exit codes: 0 done; 1 error, or `diff` found differences; 2 wrong usage; `run` and `script`: what the command says; \
128 + n: ended by signal n. `diskmill doctor` tells what the machine lacks.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = CODES, mut_subcommands(arranged))]
pub(crate) struct FsArgs {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Partitions, LVM, LUKS and file systems with labels, UUIDs, sizes and usage
    List(ListArgs),
    /// Operating systems: version, architecture, host name, mount points, packages
    Inspect(InspectArgs),
    /// Usage of the file systems
    Df(DfArgs),
    /// List folders
    Ls(LsArgs),
    /// Show a folder and all below it
    Tree(TreeArgs),
    /// Print files
    Cat(PathsArgs),
    /// Show what the guest knows of files
    Stat(PathsArgs),
    /// Find files by name, type and size
    Find(FindArgs),
    /// Copy files and trees out of the image
    Get(GetArgs),
    /// Copy files and trees into the image
    Put(PutArgs),
    /// Write a folder of the image as a tar archive
    TarOut(TarOutArgs),
    /// Unpack a tar archive into a folder of the image
    TarIn(TarInArgs),
    /// Remove files
    Rm(RmArgs),
    /// Make folders
    Mkdir(MkdirArgs),
    /// Edit a file with $VISUAL or $EDITOR
    Edit(EditArgs),
    /// Tell how the files of two images differ
    Diff(DiffArgs),
    /// Run a command in the guest's file systems
    Run(RunArgs),
    /// Set host name, passwords, users, keys, time zone, packages, scripts and files
    Customize(Box<CustomizeArgs>),
    /// Remove what makes a machine unlike others: keys, logs, host name, …
    Sysprep(SysprepArgs),
    /// Give back blocks that the file systems do not use
    Sparsify(SparsifyArgs),
    /// Grow an image, its partition and its file system
    Grow(GrowArgs),
    /// Mount the image's file systems on a folder of the host
    Mount(MountArgs),
    /// Unmount what `mount` mounted
    Umount(UmountArgs),
    /// Read and change the registry of a Windows guest
    #[command(subcommand)]
    Registry(Box<RegistryVerb>),
    /// Run guestfish commands from a file
    Script(ScriptArgs),
    /// guestfish, with the image added and mounted
    Shell(ShellArgs),
    /// Build an appliance that starts faster, once, for all later commands
    Prepare(PrepareArgs),
}

/// How to open an image and its session.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImageArgs {
    /// Format of the image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) format: Option<Format>,

    #[command(flatten)]
    pub(crate) open: OpenArgs,

    /// Look into an internal snapshot of a qcow2 image: its id or name, or snapshot.id=ID,snapshot.name=NAME (`diff`: that of
    /// the first image)
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) snapshot: Option<String>,

    /// Passphrase of LUKS volumes: `prompt` or `file:PATH`, for one volume DEVICE:prompt or DEVICE:file:PATH
    #[arg(long, value_name = "KEY")]
    pub(crate) key: Vec<Key>,

    /// Keep the session for the next commands on this image, which then take milliseconds (see `diskmill session`)
    #[arg(long)]
    pub(crate) keep: bool,

    #[command(flatten)]
    pub(crate) settings: SettingsArgs,

    /// Print one JSON value
    #[arg(long)]
    pub(crate) json: bool,

    /// No remarks: only errors
    #[arg(short = 'q', long)]
    pub(crate) quiet: bool,
}

impl ImageArgs {
    /// How the image is opened by us, to be read.
    pub(crate) fn options(&self) -> OpenOptions {
        let snapshot = self.snapshot.as_deref().map(snapshot_ref);
        OpenOptions { snapshot, ..self.open.options(self.format) }
    }

    /// What can be told to be wrong before the image is opened and an appliance started.
    ///
    /// # Errors
    /// A snapshot to be written, a file of a passphrase that cannot be read.
    pub(crate) fn check(&self, access: Access) -> Result<(), Failure> {
        if self.snapshot.is_some() && access == Access::Write {
            return Err(Failure::usage(
                "writing to a snapshot is not supported: --snapshot is for commands that only read",
            ));
        }
        self.key.iter().try_for_each(|key| key.source.check())
    }
}

/// An image whose file systems are mounted.
#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// Mount DEVICE on FOLDER [default: /] instead of what the guest's operating system mounts
    #[arg(short = 'm', long, value_name = "DEVICE[:FOLDER[:OPTIONS[:FSTYPE]]]")]
    pub(crate) mount: Vec<MountSpec>,

    /// With several operating systems in the image: the one on this device
    #[arg(long, value_name = "DEVICE", conflicts_with = "mount")]
    pub(crate) root: Option<String>,

    /// The image
    #[arg(value_name = "IMAGE")]
    pub(crate) file: PathBuf,
}

/// Several images, each in a session of its own.
#[derive(Debug, Args)]
pub(crate) struct ManyArgs {
    #[command(flatten)]
    pub(crate) image: ImageArgs,

    /// Sessions at the same time [default: as many as CPUs allow; free memory bounds both]
    #[arg(short = 'j', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) jobs: Option<u16>,

    /// The images
    #[arg(value_name = "IMAGE", required = true)]
    pub(crate) files: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) many: ManyArgs,
}

#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// List the installed packages too
    #[arg(long)]
    pub(crate) apps: bool,

    #[command(flatten)]
    pub(crate) many: ManyArgs,
}

#[derive(Debug, Args)]
pub(crate) struct DfArgs {
    /// Count inodes instead of bytes
    #[arg(short = 'i', long)]
    pub(crate) inodes: bool,

    #[command(flatten)]
    pub(crate) many: ManyArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LsArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Folders and files
    #[arg(value_name = "PATH", default_value = "/")]
    pub(crate) paths: Vec<OsString>,

    /// Also mode, links, owner, size and time
    #[arg(short = 'l', long)]
    pub(crate) long: bool,

    /// Also all that is below
    #[arg(short = 'R', long)]
    pub(crate) recursive: bool,

    /// End names with NUL and print them as they are
    #[arg(short = '0', long, conflicts_with_all = ["long", "json"])]
    pub(crate) null: bool,
}

#[derive(Debug, Args)]
pub(crate) struct TreeArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The folder
    #[arg(value_name = "PATH", default_value = "/")]
    pub(crate) path: OsString,

    /// Levels to show
    #[arg(short = 'L', long, value_name = "N")]
    pub(crate) level: Option<usize>,
}

#[derive(Debug, Args)]
pub(crate) struct PathsArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Paths inside the image
    #[arg(value_name = "PATH", required = true)]
    pub(crate) paths: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct FindArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Where to begin
    #[arg(value_name = "PATH", default_value = "/")]
    pub(crate) path: OsString,

    /// Names that match this pattern (`*`, `?`, `[…]`, `{a,b}`)
    #[arg(long, value_name = "GLOB")]
    pub(crate) name: Option<OsString>,

    /// Paths that match this pattern; `*` stops at `/`, `**` does not
    #[arg(long, value_name = "GLOB")]
    pub(crate) path_glob: Option<OsString>,

    /// f: file, d: folder, l: symbolic link, b, c: device, p: FIFO, s: socket
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<FileType>,

    /// Files of at least this size
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) min_size: Option<u64>,

    /// Files of at most this size
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) max_size: Option<u64>,

    /// Levels below PATH
    #[arg(long, value_name = "N")]
    pub(crate) max_depth: Option<usize>,

    /// End paths with NUL and print them as they are
    #[arg(short = '0', long, conflicts_with = "json")]
    pub(crate) null: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FileType {
    #[value(name = "f")]
    File,
    #[value(name = "d")]
    Folder,
    #[value(name = "l")]
    Link,
    #[value(name = "b")]
    Block,
    #[value(name = "c")]
    Char,
    #[value(name = "p")]
    Fifo,
    #[value(name = "s")]
    Socket,
}

#[derive(Debug, Args)]
#[command(override_usage = "diskmill fs get [OPTIONS] <IMAGE> <PATH>... <TARGET>")]
pub(crate) struct GetArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Paths inside the image, and behind them where to put them: a folder that exists, or for one PATH a new name;
    /// `-` is standard output
    #[arg(value_name = "PATH", num_args = 2.., required = true)]
    pub(crate) paths: Vec<OsString>,

    /// Keep owners, and set-user-ID and sticky bits (needs root)
    #[arg(short = 'a', long)]
    pub(crate) archive: bool,

    /// Replace files that exist
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
#[command(override_usage = "diskmill fs put [OPTIONS] <IMAGE> <PATH>... <TARGET>")]
pub(crate) struct PutArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// Files and folders of the host (`-` is standard input), and behind them where to put them: a folder that exists in
    /// the image, or for one file a new name
    #[arg(value_name = "PATH", num_args = 2.., required = true)]
    pub(crate) paths: Vec<OsString>,

    /// Owner in the guest, as numbers: USER:GROUP, or `keep` for the host's [default: 0:0]
    #[arg(long, value_name = "OWNER", value_parser = owner)]
    pub(crate) owner: Option<Owner>,

    /// Mode of files, in octal [default: the host's]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub(crate) mode: Option<u32>,
}

#[derive(Debug, Args)]
pub(crate) struct TarOutArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The folder inside the image
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: OsString,

    /// The archive; `-` is standard output
    #[arg(value_name = "FILE")]
    pub(crate) archive: PathBuf,

    /// Compress the archive
    #[arg(long, value_name = "HOW")]
    pub(crate) compress: Option<TarCompression>,

    /// Keep extended attributes, access control lists and SELinux labels too
    #[arg(long)]
    pub(crate) xattrs: bool,

    /// Leave out what matches this pattern, as tar(1) understands it: `*` stands for `/` too, and a name matches at any depth
    #[arg(long, value_name = "GLOB")]
    pub(crate) exclude: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct TarInArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The archive; `-` is standard input
    #[arg(value_name = "FILE")]
    pub(crate) archive: PathBuf,

    /// The folder inside the image
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: OsString,

    /// The archive is compressed
    #[arg(long, value_name = "HOW")]
    pub(crate) compress: Option<TarCompression>,

    /// Restore extended attributes, access control lists and SELinux labels too
    #[arg(long)]
    pub(crate) xattrs: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum TarCompression {
    Gzip,
    Bzip2,
    Xz,
}

impl TarCompression {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    #[command(flatten)]
    pub(crate) paths: PathsArgs,

    /// Folders too, with all that is in them
    #[arg(short = 'r', long)]
    pub(crate) recursive: bool,

    /// No error for what is not there
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct MkdirArgs {
    #[command(flatten)]
    pub(crate) paths: PathsArgs,

    /// Make missing parents too; no error for a folder that exists
    #[arg(short = 'p', long)]
    pub(crate) parents: bool,

    /// Mode, in octal
    #[arg(long, value_name = "MODE", value_parser = mode, default_value = "755")]
    pub(crate) mode: u32,
}

#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The file
    #[arg(value_name = "PATH")]
    pub(crate) path: OsString,

    /// Keep the old file under its name with this behind it
    #[arg(short = 'b', long, value_name = "SUFFIX")]
    pub(crate) backup: Option<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) guest: GuestArgs,

    /// The command and its arguments; one argument is a line for /bin/sh
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<OsString>,

    /// Throw away what the command changes
    #[arg(long)]
    pub(crate) discard: bool,
}

/// Where the passphrase for a LUKS volume comes from. Never the passphrase itself: the arguments of a process are no
/// secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Key {
    /// The volume, or all of them.
    pub(crate) device: Option<String>,
    pub(crate) source: KeySource,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeySource {
    Prompt,
    File(PathBuf),
}

impl KeySource {
    /// Whether there is something to read.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        match self {
            Self::Prompt => Ok(()),
            Self::File(path) => readable(path),
        }
    }
}

impl FromStr for Key {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let source = |text: &str| match (text, text.strip_prefix("file:")) {
            ("prompt", _) => Some(KeySource::Prompt),
            (_, Some(path)) if !path.is_empty() => Some(KeySource::File(path.into())),
            _ => None,
        };
        if let Some(source) = source(text) {
            return Ok(Self { device: None, source });
        }
        let (device, rest) = text.split_once(':').unwrap_or_default();
        match source(rest) {
            Some(source) if !device.is_empty() => Ok(Self { device: Some(device.to_owned()), source }),
            _ => Err("takes prompt, file:PATH, DEVICE:prompt or DEVICE:file:PATH; a passphrase on the command line is \
                      not supported: other users could read it"
                .to_owned()),
        }
    }
}

/// One file system to mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountSpec {
    pub(crate) device: String,
    pub(crate) folder: String,
    pub(crate) options: String,
    pub(crate) fstype: String,
}

impl FromStr for MountSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A btrfs subvolume is named btrfsvol:/dev/sda2/name.
        let (prefix, rest) = match text.strip_prefix("btrfsvol:") {
            Some(rest) => ("btrfsvol:", rest),
            None => ("", text),
        };
        let mut fields = rest.splitn(4, ':').map(str::to_owned);
        let device = fields.next().filter(|device| device.starts_with('/'));
        let device = device.ok_or("takes a device such as /dev/sda1; `diskmill fs list` shows them")?;
        let folder = fields.next().filter(|folder| !folder.is_empty()).unwrap_or_else(|| "/".to_owned());
        if !folder.starts_with('/') {
            return Err(format!("the folder {folder:?} must begin with /"));
        }
        let [options, fstype] = [fields.next().unwrap_or_default(), fields.next().unwrap_or_default()];
        Ok(Self { device: format!("{prefix}{device}"), folder, options, fstype })
    }
}

fn owner(text: &str) -> Result<Owner, String> {
    if text == "keep" {
        return Ok(Owner::Kept);
    }
    let ids = text.split_once(':').and_then(|(user, group)| Some((user.parse().ok()?, group.parse().ok()?)));
    let (user, group) = ids.ok_or("takes USER:GROUP as numbers, or keep")?;
    Ok(Owner::Ids { user, group })
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|&mode| mode <= 0o7777);
    mode.ok_or_else(|| "takes an octal number up to 7777".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_name_a_source_and_never_a_passphrase() {
        let key = |text: &str| text.parse::<Key>();
        assert_eq!(key("prompt"), Ok(Key { device: None, source: KeySource::Prompt }));
        let file = KeySource::File("/k:1".into());
        assert_eq!(key("/dev/sda2:file:/k:1"), Ok(Key { device: Some("/dev/sda2".into()), source: file }));
        for wrong in ["", "secret", "key:secret", "/dev/sda1:key:secret", "file:", ":prompt"] {
            assert!(key(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mounts_are_read_as_by_guestfish() {
        let spec = |text: &str| {
            text.parse::<MountSpec>().map(|s| [s.device, s.folder, s.options, s.fstype].join("|"))
        };
        assert_eq!(spec("/dev/sda1").as_deref(), Ok("/dev/sda1|/||"));
        assert_eq!(spec("/dev/sda1:/boot:ro,noload:ext4").as_deref(), Ok("/dev/sda1|/boot|ro,noload|ext4"));
        assert_eq!(spec("btrfsvol:/dev/sda2/home:/home").as_deref(), Ok("btrfsvol:/dev/sda2/home|/home||"));
        assert!(spec("sda1").is_err() && spec("/dev/sda1:boot").is_err());
    }

    #[test]
    fn owners_and_modes_are_numbers() {
        assert_eq!(owner("1:2"), Ok(Owner::Ids { user: 1, group: 2 }));
        assert_eq!((mode("0644"), mode("7777")), (Ok(0o644), Ok(0o7777)));
        assert!(owner("root").is_err() && mode("8").is_err() && mode("17777").is_err());
    }
}
