//! `diskmill serve`: an image as an NBD export.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{ArgGroup, Args};
use diskmill::{Format, Image, OpenOptions};
use diskmill_nbd::{Address, ImageExport, MAX_NAME, Server, Settings};
use rustix::fs::{FlockOperation, fcntl_lock};
use rustix::io::Errno;
use serde_json::json;

use crate::args::{OpenArgs, snapshot_ref};
use crate::exit::{Exit, Failure};
use crate::json::qemu_style;
use crate::names::shown;
use crate::say;
use crate::signals::Watch;

const EXAMPLES: &str = "\
Examples:
  diskmill serve disk.vmdk --unix /run/user/1000/disk.sock
  diskmill serve --port 10809 disk.qcow2
  diskmill serve -l before-upgrade disk.qcow2 --unix old.sock &
  nbdcopy 'nbd+unix:///?socket=old.sock' old.raw";

const NOTES: &str = "\
Clients can only read, unless --writable says otherwise (raw, qcow2 and VMDK). The disk is served until a signal (Ctrl-C) \
comes; then the socket is removed. Exit codes: 0 ended by a signal, or after the last client; 1 error; 2 wrong usage.";

#[derive(Debug, Args)]
#[command(before_help = EXAMPLES, after_help = NOTES)]
#[command(group = ArgGroup::new("address").required(true).args(["unix", "port"]))]
pub(crate) struct ServeArgs {
    /// Format of the image: raw, qcow2, vmdk or ova [default: detected from its first bytes]
    #[arg(short = 'f', long, value_name = "FMT")]
    format: Option<Format>,

    /// Listen at this Unix socket, made for the current user alone
    #[arg(short = 'k', long, visible_alias = "socket", value_name = "SOCKET")]
    unix: Option<PathBuf>,

    /// Listen at this TCP port; 0: any that is free. No password and no encryption: for loopback and trusted networks
    #[arg(short = 'p', long, value_name = "PORT")]
    port: Option<u16>,

    /// The address that the port is bound to
    #[arg(short = 'b', long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), conflicts_with = "unix")]
    bind: IpAddr,

    /// Serve an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME
    #[arg(short = 'l', long, visible_alias = "load-snapshot", value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// Clients may not write: the default
    #[arg(short = 'r', long)]
    read_only: bool,

    /// Clients may write (raw, qcow2 and VMDK). No other process may have the image open
    #[arg(long, conflicts_with_all = ["read_only", "snapshot"])]
    writable: bool,

    /// Name of the export; clients get it by the empty name, too
    #[arg(short = 'x', long, visible_alias = "export-name", value_name = "NAME", default_value = "")]
    name: String,

    /// Connections at once. A client may make several (nbdcopy: 4, unless --connections says otherwise), but not with 1
    #[arg(short = 'e', long, visible_alias = "shared", value_name = "N", default_value_t = 16,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    connections: u16,

    /// Threads for each client [default: one for each CPU that may be used, 2 to 8]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: Option<u16>,

    /// End after the last client has left
    #[arg(long)]
    exit_with_last_client: bool,

    /// Go on after the last client has left: the default
    #[arg(short = 't', long, conflicts_with = "exit_with_last_client")]
    persistent: bool,

    /// Write the process id into this file once clients can connect, and remove it at the end. The file is locked
    /// meanwhile; one that holds anything but a process id is refused
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Bypass the page cache (O_DIRECT)
    #[arg(long)]
    direct: bool,

    #[command(flatten)]
    open: OpenArgs,

    /// Print where the disk is served as one JSON object
    #[arg(long)]
    json: bool,

    /// Say nothing but errors
    #[arg(short = 'q', long)]
    quiet: bool,

    /// The image
    file: PathBuf,
}

pub(crate) fn run(args: &ServeArgs) -> Result<Exit, Failure> {
    if args.name.len() > MAX_NAME {
        let len = args.name.len();
        return Err(Failure::usage(format!(
            "--name: at most {MAX_NAME} bytes, not {len}: clients ask for no more"
        )));
    }
    let options = OpenOptions {
        snapshot: args.snapshot.as_deref().map(snapshot_ref),
        direct: args.direct,
        writable: args.writable,
        ..args.open.options(args.format)
    };
    let image = Image::open(&args.file, &options)?;
    if !args.quiet {
        for warning in image.warnings() {
            say::warning(shown(&warning));
        }
    }
    let address = match (&args.unix, args.port) {
        (Some(path), _) => Address::Unix(path.clone()),
        (None, port) => Address::Tcp(SocketAddr::new(args.bind, port.unwrap_or_default())),
    };
    let quiet = args.quiet;
    let mut settings = Settings {
        export_name: args.name.clone(),
        connections: args.connections.into(),
        exit_with_last_client: args.exit_with_last_client,
        log: Arc::new(move |message| {
            if !quiet {
                eprintln!("diskmill: {}", shown(message));
            }
        }),
        ..Settings::default()
    };
    if let Some(threads) = args.threads {
        settings.threads = threads.into();
    }
    // Behind the image, whose locks show that it is none of the image's files; before anything is made.
    let mut pid_file = args.pid_file.as_deref().map(PidFile::lock).transpose()?;
    let server = Server::bind(&address, settings)
        .map_err(|error| Failure::failed(format!("cannot listen at {}: {error}", named(&address))))?;
    let stopper = server.stopper();
    let _watch = Watch::start_with(move || stopper.stop())?;
    if let Some(file) = &mut pid_file {
        file.write()?;
    }
    announce(args, &server, &image)?;
    let export = if args.writable { ImageExport::writable(image) } else { ImageExport::new(image) };
    let served = server.run(&export);
    // What clients wrote must be safe even if serving failed.
    export.close()?;
    served.map_err(|error| Failure::failed(format!("cannot go on serving: {error}")))?;
    Ok(Exit::Done)
}

fn named(address: &Address) -> String {
    match address {
        Address::Unix(path) => format!("{path:?}"),
        Address::Tcp(address) => address.to_string(),
    }
}

/// Says where the disk is, for people and scripts: clients can connect from now on.
fn announce(args: &ServeArgs, server: &Server, image: &Image) -> io::Result<()> {
    let uri = server.uri();
    let mut out = io::stdout().lock();
    if args.json {
        let facts = json!({
            "uri": uri,
            "format": image.info().format.to_string(),
            "virtual-size": image.size(),
            "read-only": !args.writable,
            "pid": std::process::id(),
        });
        writeln!(out, "{}", qemu_style(&facts))?;
    } else if !args.quiet {
        writeln!(out, "{uri}")?;
    }
    out.flush()
}

/// A file with our process id, locked and there for as long as this value.
struct PidFile {
    path: PathBuf,
    /// Nothing else here may open the file: closing that would release the lock.
    file: File,
    /// Whether the file is ours to remove: it was empty, or holds our number.
    ours: bool,
}

impl PidFile {
    /// The longest content that may be a process id, in bytes.
    const LONGEST: u64 = 32;

    /// Takes the file for us, without changing what it holds yet.
    fn lock(path: &Path) -> Result<Self, Failure> {
        let failed = |error| Failure::failed(format!("cannot use {path:?} as pid file: {error}"));
        loop {
            let mut options = File::options();
            // What it holds is looked at first.
            let mut file =
                options.read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
            let meta = file.metadata().map_err(failed)?;
            if !meta.is_file() {
                return Err(Failure::failed(format!(
                    "cannot use {path:?} as pid file: it is no regular file: name another file"
                )));
            }
            // The lock that qemu-nbd takes, which those of images conflict with, too.
            match fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN | Errno::ACCESS) => {
                    return Err(Failure::failed(format!(
                        "cannot use {path:?} as pid file: it is locked, being an image in use or the pid file of \
                         another server: name another file"
                    )));
                }
                Err(error) => return Err(failed(error.into())),
            }
            // Without symbolic links, so that the file itself is removed.
            let path = match path.canonicalize() {
                Ok(path) => path,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(error)),
            };
            // A server that ended meanwhile has removed its file; what we have locked is nowhere then.
            if identity(path.symlink_metadata()) != Some((meta.dev(), meta.ino())) {
                continue;
            }
            let mut content = Vec::new();
            (&mut file).take(Self::LONGEST + 1).read_to_end(&mut content).map_err(failed)?;
            if !content.is_empty() && !is_pid(&content) {
                return Err(Failure::failed(format!(
                    "cannot use {path:?} as pid file: it holds something else than a process id: name another file"
                )));
            }
            return Ok(Self { path, file, ours: content.is_empty() });
        }
    }

    /// Writes our process id.
    fn write(&mut self) -> Result<(), Failure> {
        let text = format!("{}\n", std::process::id());
        let written = self.file.set_len(0).and_then(|()| self.file.write_all_at(text.as_bytes(), 0));
        self.ours = true;
        written.map_err(|error| {
            Failure::failed(format!("cannot write the process id to {:?}: {error}", self.path))
        })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // Somebody else may have put another file in its place.
        let here = identity(self.path.symlink_metadata());
        if self.ours && here.is_some() && here == identity(self.file.metadata()) {
            // Gone meanwhile is as good.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether a file with this content is what a server left that was killed.
fn is_pid(content: &[u8]) -> bool {
    str::from_utf8(content).is_ok_and(|text| text.trim_ascii().parse().is_ok_and(|pid: i32| pid > 0))
}

/// Device and inode of a file that there is.
fn identity(meta: io::Result<Metadata>) -> Option<(u64, u64)> {
    meta.ok().map(|meta| (meta.dev(), meta.ino()))
}
