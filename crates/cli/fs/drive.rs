//! How the appliance gets at an image: through our own NBD server, so that QEMU never parses what a stranger made; raw and
//! plain qcow2 images that are to be written as files, with their format named.

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command as Process, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use clap::Args;
use diskmill::qcow2::CryptMethod;
use diskmill::{Custody, Format, FormatInfo, Image, OpenOptions};
use diskmill_guestfs::Disk;
use diskmill_nbd::{Address, Export as _, ImageExport, Running, Settings};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

use super::args::ImageArgs;
use super::guest::Access;
use super::kept;
use crate::args::{OpenArgs, snapshot_ref};
use crate::exit::{Exit, Failure};
use crate::{say, secrets};

/// The hidden subcommand that serves an image to an appliance which outlives the program.
const COMPANION: &str = "guestfs-companion";

/// How long an image's server may take to close it when its session or mount has ended.
const CLOSING: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(2);
/// The socket of a server that ends with its program, in a folder of its own.
pub(crate) const SOCKET: &str = "disk";

/// An image as a disk of the appliance.
pub(crate) struct Drive {
    disk: Disk,
    /// Of the disk, in bytes.
    size: u64,
    /// In QEMU's words.
    format: &'static str,
    /// What `guestfish -a` takes, and the format for `--format`.
    address: OsString,
    server: Server,
}

enum Server {
    /// QEMU opens the file, which is ours until the drive is dropped.
    None { _custody: Custody },
    /// Ends, with its folder, when the drive is dropped.
    Here { _running: Running, _folder: tempfile::TempDir },
    /// Another process, which ends when we do, unless it is told whom to wait for.
    Companion { stdin: ChildStdin },
}

impl Drive {
    /// Opens the image once ourselves: that tells its format, checks it, and applies the policy for the files it names.
    /// `outlives`: the appliance goes on when this program ends.
    pub(crate) fn open(
        args: &ImageArgs,
        file: &Path,
        access: Access,
        outlives: bool,
    ) -> Result<Self, Failure> {
        args.check(access)?;
        if access == Access::Write {
            make_way(file, args.quiet)?;
        }
        let image = Image::open(file, &args.options())?;
        for warning in image.warnings().iter().filter(|_| !args.quiet) {
            say::warning(warning);
        }
        match access {
            Access::Write if qemu_writes(&image) => Self::direct(image, file),
            _ if outlives => Self::by_companion(args, file, image, access),
            Access::Write => {
                // Our lock as a reader would be in the way.
                drop(image);
                let options = OpenOptions { writable: true, ..args.open.options(args.format) };
                Self::by_server(ImageExport::writable(Image::open(file, &options)?))
            }
            Access::Read | Access::Discard => Self::by_server(ImageExport::new(image)),
        }
    }

    /// Another image with the same options, to be read.
    pub(crate) fn as_format(args: &ImageArgs, file: &Path, format: Option<Format>) -> Result<Self, Failure> {
        Self::by_server(ImageExport::new(Image::open(file, &args.open.options(format))?))
    }

    fn direct(image: Image, file: &Path) -> Result<Self, Failure> {
        let (format, size) = (image.info().format.name(), image.info().virtual_size);
        // Reading it ourselves, we would be in the way.
        drop(image);
        let server = Server::None { _custody: Custody::take(file)? };
        // In full: the session may be asked for by programs in other folders.
        let full =
            std::path::absolute(file).map_err(|error| Failure::failed(format!("{file:?}: {error}")))?;
        let disk = Disk::file(full, format).writable();
        Ok(Self { disk, size, format, address: file.as_os_str().to_owned(), server })
    }

    fn by_server(export: ImageExport) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| Failure::failed(format!("cannot serve the image to the appliance: {error}"));
        // Where the next run finds what is left of this one, if it is killed.
        let folder = run_folder().and_then(|dir| tempfile::Builder::new().prefix("disk-").tempdir_in(dir));
        let folder = folder.map_err(failed)?;
        let socket = folder.path().join(SOCKET);
        let (address, size) = (Address::Unix(socket.clone()), export.size());
        let disk = Disk::nbd(&socket, "");
        let disk = if export.is_writable() { disk.writable() } else { disk };
        let running = diskmill_nbd::serve(export, &address, settings()).map_err(failed)?;
        let uri = guestfish_uri(&socket);
        let server = Server::Here { _running: running, _folder: folder };
        Ok(Self { disk, size, format: "raw", address: uri, server })
    }

    fn by_companion(args: &ImageArgs, file: &Path, image: Image, access: Access) -> Result<Self, Failure> {
        let failed =
            |error: io::Error| Failure::failed(format!("cannot serve the image to the appliance: {error}"));
        let socket = kept::socket(&image, args, file, access).map_err(failed)?;
        let (writable, size) = (access == Access::Write, image.info().virtual_size);
        let mut command = Process::new("/proc/self/exe");
        command.arg(COMPANION).args(args.open.arguments()).arg("--unix").arg(&socket);
        if writable {
            command.arg("--writable");
        }
        if let Some(snapshot) = &args.snapshot {
            command.arg("--snapshot").arg(snapshot);
        }
        if let Some(format) = args.format {
            command.arg("-f").arg(format.name());
        }
        // Out of the terminal's reach.
        command.arg("--").arg(file).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        command.process_group(0);
        // A reader's lock would be in the way of a writer.
        let _image = (!writable).then_some(image);
        let mut child = command.spawn().map_err(failed)?;
        let mut stdin = child.stdin.take();
        let sent = stdin.as_mut().map_or(Ok(()), |stdin| secrets::send(stdin, &args.open.keys()));
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line).map_err(failed)?;
        }
        let Some(stdin) = stdin.filter(|_| line == "ready\n") else {
            let _ = child.wait();
            // If it has stopped listening, it has said why.
            if line.is_empty() {
                sent.map_err(failed)?;
            }
            return Err(Failure::failed(line.trim_end().to_owned()));
        };
        let disk = Disk::nbd(&socket, "");
        let disk = if writable { disk.writable() } else { disk };
        let server = Server::Companion { stdin };
        Ok(Self { disk, size, format: "raw", address: guestfish_uri(&socket), server })
    }

    pub(crate) fn disk(&self) -> Disk {
        self.disk.clone()
    }

    /// The size of the disk, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// `--format` and `-a` for a libguestfs tool.
    pub(crate) fn tool_arguments(&self) -> Vec<OsString> {
        vec![self.format_argument(), "-a".into(), self.address.clone()]
    }

    /// `--format`.
    pub(crate) fn format_argument(&self) -> OsString {
        format!("--format={}", self.format).into()
    }

    /// Where the companion listens.
    pub(crate) fn socket(&self) -> Option<&Path> {
        match self.server {
            Server::Companion { .. } => self.disk.served().map(|(socket, _)| socket),
            _ => None,
        }
    }

    /// Lets the companion go on until the process `pid` has ended.
    pub(crate) fn release(self, pid: i32) -> Result<(), Failure> {
        if let Server::Companion { mut stdin } = self.server {
            let told = writeln!(stdin, "{pid}");
            told.map_err(|error| Failure::failed(format!("the image's server has ended: {error}")))?;
        }
        Ok(())
    }
}

/// Whether QEMU itself writes to such an image.
fn qemu_writes(image: &Image) -> bool {
    match &image.info().specific {
        FormatInfo::Raw => true,
        FormatInfo::Qcow2(qcow2) => qcow2.area.header.crypt == CryptMethod::None,
        _ => false,
    }
}

fn settings() -> Settings {
    Settings {
        log: std::sync::Arc::new(|message| eprintln!("diskmill: {}", crate::names::shown(message))),
        ..Settings::default()
    }
}

/// The URI form of guestfish(1), "ADDING REMOTE STORAGE".
fn guestfish_uri(socket: &Path) -> OsString {
    let mut uri = OsString::from("nbd:///?socket=");
    uri.push(socket);
    uri
}

/// Ends the sessions that read the image, which is about to be written.
pub(super) fn make_way(file: &Path, quiet: bool) -> Result<(), Failure> {
    let say = |text: &str| {
        if !quiet {
            eprintln!("diskmill: {text}");
        }
    };
    kept::make_way(file, &say)
}

/// Waits until the companion at `socket`, whose client has ended, has closed its image: the name goes last.
pub(crate) fn wait_closed(socket: &Path) -> Result<(), Failure> {
    let end = Instant::now() + CLOSING;
    while socket.symlink_metadata().is_ok() && UnixStream::connect(socket).is_ok() {
        if Instant::now() > end {
            return Err(Failure::failed(format!(
                "the server of the image, at {socket:?}, does not close it"
            )));
        }
        sleep(RETRY);
    }
    Ok(())
}

/// A folder of this user alone for sockets and notes, made where it is missing.
pub(crate) fn run_folder() -> io::Result<PathBuf> {
    let run = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|dir| dir.is_absolute() && dir.is_dir());
    let folder = match run {
        Some(run) => run.join("diskmill-nbd"),
        None => PathBuf::from(format!("/tmp/diskmill-nbd-{}", geteuid().as_raw())),
    };
    match DirBuilder::new().mode(0o700).create(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let found = std::fs::symlink_metadata(&folder)?;
    if !found.is_dir() || found.uid() != geteuid().as_raw() || found.mode() & 0o077 != 0 {
        return Err(io::Error::other(format!("{folder:?} is not a folder for this user alone")));
    }
    Ok(folder)
}

/// How the companion is started.
#[derive(Debug, Args)]
pub(crate) struct CompanionArgs {
    #[arg(short = 'f', long)]
    format: Option<Format>,
    #[command(flatten)]
    open: OpenArgs,
    #[arg(long)]
    unix: PathBuf,
    #[arg(long)]
    writable: bool,
    #[arg(long)]
    snapshot: Option<String>,
    file: PathBuf,
}

/// Serves an image until the process whose number comes on standard input, behind the passphrases, has ended; at once, if
/// none comes.
pub(crate) fn companion(args: &CompanionArgs) -> Result<Exit, Failure> {
    serve_process(args).inspect_err(|failure| {
        // Standard error is nobody's.
        println!("{}", failure.message.as_deref().unwrap_or_default().replace('\n', " "));
    })
}

fn serve_process(args: &CompanionArgs) -> Result<Exit, Failure> {
    let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let keys = secrets::receive(&mut stdin)?;
    let image = {
        let snapshot = args.snapshot.as_deref().map(snapshot_ref);
        let options =
            OpenOptions { writable: args.writable, snapshot, keys, ..args.open.options(args.format) };
        Image::open(&args.file, &options)?
    };
    let failed = |error: io::Error| Failure::failed(format!("cannot serve {:?}: {error}", args.file));
    let settings = Settings { log: std::sync::Arc::new(|_| ()), ..Settings::default() };
    let export = if args.writable { ImageExport::writable(image) } else { ImageExport::new(image) };
    let running = diskmill_nbd::serve(export, &Address::Unix(args.unix.clone()), settings);
    let running = running.map_err(failed)?;
    println!("ready");
    let mut line = String::new();
    BufReader::new(stdin).read_line(&mut line)?;
    if let Some(pid) = line.trim().parse().ok().and_then(Pid::from_raw)
        && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
    {
        while poll(&mut [PollFd::new(&process, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
    }
    running.stop().map_err(failed)?;
    Ok(Exit::Done)
}
