//! Copying between host and guest: `get`, `put`, `tar-out`, `tar-in`.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::Path;
use std::thread;

use diskmill_guestfs::Command;
use serde_json::json;

use super::args::{FileType, GetArgs, PutArgs, TarInArgs, TarOutArgs};
use super::copied::{Copied, Counted};
use super::extract::{Keep, unpack};
use super::guest::{Access, Guest};
use super::meta::Meta;
use super::name::{base, guest_path, join, parent, shown};
use super::output::print_json;
use super::pack::{Owner, open_regular, pack};
use super::replace::replace;
use super::target::Target;
use super::watch::{self, Interruptible};
use crate::exit::{Exit, Failure};

pub(crate) fn get(args: &GetArgs) -> Result<Exit, Failure> {
    let Some((target, paths)) = args.paths.split_last() else {
        return Err(Failure::usage("get takes at least one PATH and a TARGET"));
    };
    let target = Path::new(target);
    let to_stdout = target == Path::new("-");
    if to_stdout && args.guest.image.json {
        return Err(Failure::usage(
            "--json and a TARGET on standard output (-) exclude each other: both want it",
        ));
    }
    let into_folder = target.is_dir() && !to_stdout;
    if !into_folder && paths.len() > 1 {
        return Err(Failure::usage(format!("{target:?} is no folder: several files need one")));
    }
    if !into_folder && !to_stdout {
        let folder = folder_of(target);
        fs::metadata(folder).map_err(|error| host_failure(folder, &error))?;
        if !args.force && target.symlink_metadata().is_ok() {
            return Err(exists(target, &io::ErrorKind::AlreadyExists.into()));
        }
    }
    let keep = Keep { owners: args.archive, existing: args.force };
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let mut done = Copied::default();
    for path in paths {
        let path = guest_path(path);
        // What is named follows links, what is below does not.
        let meta = guest.stat(&path)?;
        let to = if into_folder { target.join(host_name(&path)?) } else { target.to_owned() };
        match meta.kind() {
            Some(FileType::Folder) if to_stdout => {
                return Err(Failure::usage(format!(
                    "{} is a folder: tar-out writes it as a stream",
                    shown(&path)
                )));
            }
            Some(FileType::Folder) => done.add(&get_tree(&mut guest, &path, &to, keep)?),
            Some(FileType::File) if to_stdout => {
                done.bytes = done.bytes.saturating_add(guest.download(&path, &mut io::stdout())?);
                done.files += 1;
            }
            Some(FileType::File) => done.add(&get_file(&mut guest, &path, &meta, &to, keep)?),
            _ => return Err(Failure::failed(format!("{} is neither a file nor a folder", shown(&path)))),
        }
    }
    if let Some(remark) = done.remark() {
        guest.remark(&remark);
    }
    guest.finish()?;
    if args.guest.image.json {
        return print_json(&done.as_json());
    }
    Ok(Exit::Done)
}

/// The name on the host of what stands at `path` in the guest.
fn host_name(path: &[u8]) -> Result<&OsStr, Failure> {
    match base(path) {
        b"" | b".." => {
            Err(Failure::failed(format!("{} has no name of its own: give the TARGET a new one", shown(path))))
        }
        name => Ok(OsStr::from_bytes(name)),
    }
}

fn get_file(guest: &mut Guest, path: &[u8], meta: &Meta, to: &Path, keep: Keep) -> Result<Copied, Failure> {
    let failed = |error: io::Error| host_failure(to, &error);
    if !keep.existing && to.symlink_metadata().is_ok() {
        return Err(exists(to, &io::ErrorKind::AlreadyExists.into()));
    }
    let mut target = Target::open(to, 0o600, false).map_err(failed)?;
    let bytes = guest.download(path, &mut target)?;
    if let Some(file) = target.fresh() {
        if keep.owners {
            fchown(file, Some(meta.user), Some(meta.group)).map_err(failed)?;
        }
        let mode = meta.permissions() & if keep.owners { 0o7777 } else { 0o777 };
        file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
        file.set_modified(system_time(meta.modified.seconds, meta.modified.nanos)).map_err(failed)?;
    }
    target.publish(keep.existing).map_err(|error| exists(to, &error))?;
    Ok(Copied::file(bytes))
}

fn system_time(seconds: i64, nanos: i64) -> std::time::SystemTime {
    let (epoch, length) = (std::time::UNIX_EPOCH, std::time::Duration::from_secs(seconds.unsigned_abs()));
    let time = if seconds < 0 { epoch.checked_sub(length) } else { epoch.checked_add(length) };
    // The part of a second counts forward, before 1970, too.
    let nanos = std::time::Duration::from_nanos(nanos.clamp(0, 999_999_999).unsigned_abs());
    time.and_then(|time| time.checked_add(nanos)).unwrap_or(epoch)
}

fn get_tree(guest: &mut Guest, path: &[u8], to: &Path, keep: Keep) -> Result<Copied, Failure> {
    let real = guest.real_path(path)?;
    match fs::DirBuilder::new().create(to) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && keep.existing => {}
        made => made.map_err(|error| exists(to, &error))?,
    }
    let (reader, mut writer) = pipe()?;
    let command = Command::new("tar-out").arg(real).output().opt("numericowner", "true");
    thread::scope(|scope| {
        let unpacking = scope.spawn(move || {
            let mut reader = reader;
            let result = unpack(&mut reader, to, keep);
            if result.is_ok() {
                // Padding at the end of the archive.
                let _ = io::copy(&mut reader, &mut io::sink());
            }
            result
        });
        let sent = guest.send(&command, None, &mut writer);
        drop(writer);
        let unpacked = unpacking.join().unwrap_or_else(|_| Err(io::Error::other("unpacking panicked")));
        // An error while unpacking closes the pipe, which the sender then complains of.
        let unpacked = unpacked.map_err(|error| host_failure(to, &error))?;
        sent.map(|()| unpacked)
    })
}

/// File systems that have no owners and permissions, or none unless they are mounted so (ntfs-3g(8), "permissions"); in
/// blkid's words. What is asked of them is refused (FAT) or silently not done (NTFS).
const WITHOUT_OWNERS: [&str; 3] = ["vfat", "exfat", "ntfs"];

pub(crate) fn put(args: &PutArgs) -> Result<Exit, Failure> {
    let Some((target, sources)) = args.paths.split_last() else {
        return Err(Failure::usage("put takes at least one file of the host and a path in the image"));
    };
    // Looked at before the appliance is started.
    let mut metas = Vec::new();
    for source in sources {
        let path = Path::new(source);
        metas.push(if path == Path::new("-") {
            None
        } else {
            Some(fs::metadata(path).map_err(|error| host_failure(path, &error))?)
        });
    }
    let mut guest = Guest::mounted(&args.guest, Access::Write)?;
    let target = guest_path(target);
    let there = guest.lstat_if_there(&target)?;
    let into_folder = match there {
        Some(meta) if meta.is(FileType::Link) => guest.stat(&target)?.is(FileType::Folder),
        Some(meta) => meta.is(FileType::Folder),
        None => false,
    };
    if !into_folder && sources.len() > 1 {
        return Err(Failure::failed(format!(
            "{} is no folder in the image: several files need one",
            shown(&target)
        )));
    }
    let mut done = Copied::default();
    let mut not_kept = None;
    for (source, meta) in sources.iter().zip(&metas) {
        let source = Path::new(source);
        let to = match (into_folder, meta) {
            (true, None) => {
                return Err(Failure::usage("standard input needs a name in the image, not a folder"));
            }
            (true, Some(_)) => join(&target, source_name(source)?.as_bytes()),
            (false, _) => target.clone(),
        };
        let folder = guest.lstat_if_there(&to)?.is_some_and(|meta| meta.is(FileType::Folder));
        let filesystem = guest.filesystem_at(if folder { &to } else { parent(&to) })?;
        let owners = !WITHOUT_OWNERS.contains(&filesystem.as_str());
        if !owners && (args.owner.is_some() || args.mode.is_some()) {
            return Err(Failure::failed(format!(
                "{}: {filesystem} keeps no owners and modes: leave out --owner and --mode",
                shown(&to)
            )));
        }
        match meta {
            Some(meta) if meta.is_dir() => done.add(&put_tree(&mut guest, source, &to, args)?),
            _ => done.add(&put_file(&mut guest, source, meta.as_ref(), &to, args, owners)?),
        }
        if !owners {
            not_kept = Some(filesystem);
        }
    }
    if let Some(filesystem) = &not_kept {
        guest.remark(&format!("{filesystem} keeps no owners and modes: they are lost"));
    }
    if let Some(remark) = done.remark() {
        guest.remark(&remark);
    }
    guest.finish()?;
    if args.guest.image.json {
        let mut result = done.as_json();
        result["owners-kept"] = json!(not_kept.is_none());
        return print_json(&result);
    }
    Ok(Exit::Done)
}

/// The last part of a path of the host, also for `.` and `dir/..`.
fn source_name(source: &Path) -> Result<OsString, Failure> {
    if let Some(name) = source.file_name() {
        return Ok(name.to_owned());
    }
    let full = fs::canonicalize(source).map_err(|error| host_failure(source, &error))?;
    let name = full.file_name().map(OsStr::to_owned);
    name.ok_or_else(|| Failure::failed(format!("{source:?} has no name of its own")))
}

fn put_file(
    guest: &mut Guest,
    source: &Path,
    meta: Option<&fs::Metadata>,
    to: &[u8],
    args: &PutArgs,
    owners: bool,
) -> Result<Copied, Failure> {
    let failed = |error: io::Error| host_failure(source, &error);
    let mut input: Box<dyn Read> = match meta {
        None => Box::new(watch::stdin()?),
        // Links were followed: what they lead to is opened.
        Some(_) => {
            let real = fs::canonicalize(source).map_err(failed)?;
            Box::new(open_regular(&real).map_err(failed)?)
        }
    };
    let mut counted = Counted::new(&mut *input);
    let mode = args.mode.or(meta.map(|meta| meta.mode() & 0o7777)).unwrap_or(0o644);
    let (user, group) = match (args.owner.unwrap_or_default(), meta) {
        (Owner::Ids { user, group }, _) => (user, group),
        (owner, Some(meta)) => owner.of(meta),
        (Owner::Kept, None) => (0, 0),
    };
    replace(guest, &mut counted, to, |guest, path| {
        if owners {
            guest.chown(path, user, group)?;
            guest.chmod(path, mode)?;
        }
        match meta {
            Some(meta) => guest.set_modified(path, meta.mtime(), meta.mtime_nsec()),
            None => Ok(()),
        }
    })?;
    let bytes = counted.bytes;
    Ok(Copied::file(bytes))
}

fn put_tree(guest: &mut Guest, source: &Path, to: &[u8], args: &PutArgs) -> Result<Copied, Failure> {
    // What is named follows links, what is below does not.
    let source = &fs::canonicalize(source).map_err(|error| host_failure(source, &error))?;
    if guest.lstat_if_there(to)?.is_none() {
        guest.call(Command::new("mkdir").arg(to))?;
    }
    let (mut reader, writer) = pipe()?;
    let (owner, mode) = (args.owner.unwrap_or_default(), args.mode);
    let command = Command::new("tar-in").input().arg(guest.real_path(to)?);
    thread::scope(|scope| {
        let packing = scope
            .spawn(move || pack(source, b".", owner, mode, io::BufWriter::with_capacity(256 << 10, writer)));
        let sent = guest.send(&command, Some(&mut reader), &mut io::sink());
        drop(reader);
        let packed = packing.join().unwrap_or_else(|_| Err(io::Error::other("packing panicked")));
        match (packed, sent) {
            (Ok(packed), Ok(())) => Ok(packed),
            // The guest's error closes the pipe, which is no news then.
            (Err(error), Err(failure)) if error.kind() == io::ErrorKind::BrokenPipe => Err(failure),
            (Err(error), _) => Err(host_failure(source, &error)),
            (Ok(_), Err(failure)) => Err(failure),
        }
    })
}

pub(crate) fn tar_out(args: &TarOutArgs) -> Result<Exit, Failure> {
    let to_stdout = args.archive == Path::new("-");
    if to_stdout && args.guest.image.json {
        return Err(Failure::usage(
            "--json and an archive on standard output (-) exclude each other: both want it",
        ));
    }
    // The appliance's tar reads the patterns from a file with a line for each.
    if args.exclude.iter().any(|glob| glob.as_bytes().contains(&b'\n')) {
        return Err(Failure::usage(
            "--exclude: a pattern with a line feed is not supported; `?` stands for one",
        ));
    }
    if !to_stdout {
        let folder = folder_of(&args.archive);
        fs::metadata(folder).map_err(|error| host_failure(folder, &error))?;
    }
    let failed = |error: io::Error| host_failure(&args.archive, &error);
    let target =
        if to_stdout { None } else { Some(Target::open(&args.archive, 0o666, true).map_err(failed)?) };
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let folder = guest.real_path(&guest_path(&args.folder))?;
    let mut command = Command::new("tar-out").arg(&folder).output().opt("numericowner", "true");
    if let Some(compress) = args.compress {
        command = command.opt("compress", compress.name());
    }
    if args.xattrs {
        for key in ["xattrs", "selinux", "acls"] {
            command = command.opt(key, "true");
        }
    }
    if !args.exclude.is_empty() {
        command = command.opt_list("excludes", args.exclude.iter().map(|glob| glob.as_bytes()));
    }
    let bytes = if let Some(target) = target {
        let mut out = Counted::new(target);
        guest.send(&command, None, &mut out)?;
        out.inner.publish(true).map_err(failed)?;
        out.bytes
    } else {
        let mut out = Counted::new(io::stdout());
        guest.send(&command, None, &mut out)?;
        out.flush()?;
        out.bytes
    };
    guest.finish()?;
    if args.guest.image.json {
        return print_json(&json!({ "archive": args.archive.to_string_lossy(), "bytes": bytes }));
    }
    Ok(Exit::Done)
}

pub(crate) fn tar_in(args: &TarInArgs) -> Result<Exit, Failure> {
    let mut input: Box<dyn Read> = if args.archive == Path::new("-") {
        Box::new(watch::stdin()?)
    } else {
        let file = File::open(&args.archive).map_err(|error| host_failure(&args.archive, &error))?;
        Box::new(Interruptible::new(file)?)
    };
    let mut guest = Guest::mounted(&args.guest, Access::Write)?;
    let folder = guest.real_path(&guest_path(&args.folder))?;
    let mut command = Command::new("tar-in").input().arg(&folder);
    if let Some(compress) = args.compress {
        command = command.opt("compress", compress.name());
    }
    if args.xattrs {
        for key in ["xattrs", "selinux", "acls"] {
            command = command.opt(key, "true");
        }
    }
    let mut counted = Counted::new(&mut *input);
    guest.send(&command, Some(&mut counted), &mut io::sink())?;
    let bytes = counted.bytes;
    guest.finish()?;
    if args.guest.image.json {
        return print_json(&json!({ "archive": args.archive.to_string_lossy(), "bytes": bytes }));
    }
    Ok(Exit::Done)
}

fn pipe() -> Result<(io::PipeReader, io::PipeWriter), Failure> {
    io::pipe().map_err(|error| Failure::failed(format!("cannot make a pipe: {error}")))
}

/// An error of the host's file system.
pub(crate) fn host_failure(path: &Path, error: &io::Error) -> Failure {
    Failure::failed(format!("{path:?}: {error}"))
}

/// The folder that a file of the host is in, or would be.
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Looks whether a file of the host can be read, before an appliance is started for it.
pub(crate) fn readable(path: &Path) -> Result<(), Failure> {
    let found = fs::metadata(path).and_then(|meta| match meta.is_dir() {
        true => Err(io::ErrorKind::IsADirectory.into()),
        // Whoever opens a pipe reads it.
        false if !meta.is_file() => Ok(()),
        false => File::open(path).map(drop),
    });
    found.map_err(|error| host_failure(path, &error))
}

fn exists(path: &Path, error: &io::Error) -> Failure {
    if error.kind() == io::ErrorKind::AlreadyExists {
        return Failure::failed(format!("{path:?} exists already; --force replaces files"));
    }
    host_failure(path, error)
}
