//! A session on one image, and what the verbs ask of it.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use diskmill::Format;
use diskmill_guestfs::{Command, Kind, Session};
use serde_json::{Value, json};

use super::args::{GuestArgs, ImageArgs};
use super::drive::Drive;
use super::failure::guest_refused;
use super::kept;
use super::meta::{Entry, Meta};
use super::name::{join, shown};
use super::reply::{Record, lines, null_ended, pairs, texts};
use super::settings::settings;
use super::watch::Watch;
use super::{args::FileType, keys};
use crate::exit::Failure;
use crate::names;

/// Names for one lstatnslist: guestfs limits a message to 4 MiB, and each answer takes some 600 bytes.
const BATCH: usize = 1000;
/// Bytes of names for one such call.
const BATCH_BYTES: usize = 512 << 10;

/// What a verb does to the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// It reads.
    Read,
    /// It reads; what is written all the same ends with the session.
    Discard,
    /// It writes.
    Write,
}

/// A running session on one image.
pub(crate) struct Guest {
    pub(super) session: Session,
    pub(super) watch: Watch,
    access: Access,
    quiet: bool,
    /// What the appliance reads the image through; ends after the session. `None` for a session that was kept.
    drive: Option<Drive>,
    /// How long the session is kept for the next command, if it is, and how it is called.
    keep: Option<(Duration, String)>,
}

/// The note that tells what is mounted.
const MOUNTED: &str = "mounted";
/// The note that tells which keys have opened what they are for.
const UNLOCKED: &str = "unlocked";

impl Guest {
    /// Opens a session, with LUKS volumes opened and nothing mounted.
    pub(crate) fn unmounted(args: &ImageArgs, file: &Path, access: Access) -> Result<Self, Failure> {
        let mut guest = Self::open(args, file, access)?;
        guest.forget_mounts()?;
        Ok(guest)
    }

    /// Opens a session, or attaches to the one that is kept, with LUKS volumes opened.
    fn open(args: &ImageArgs, file: &Path, access: Access) -> Result<Self, Failure> {
        args.check(access)?;
        if args.keep && access == Access::Discard {
            return Err(Failure::usage(
                "--keep is not supported with --discard: what is thrown away would stay",
            ));
        }
        if let Some(guest) = Self::attached(args, file, access)? {
            return Ok(guest);
        }
        if !args.keep {
            return Self::on(args, file, access, Drive::open(args, file, access, false)?);
        }
        let (settings, idle) = settings(&args.settings, 0)?;
        let _starting = kept::starting(file, settings.start_timeout)?;
        if let Some(guest) = Self::attached(args, file, access)? {
            return Ok(guest);
        }
        let mut guest = Self::on(args, file, access, Drive::open(args, file, access, true)?)?;
        guest.keep = Some((idle, kept::label(file)));
        guest.note(UNLOCKED, keys::note(&args.key))?;
        Ok(guest)
    }

    /// Attaches to the session that is kept on this image, if there is one.
    fn attached(args: &ImageArgs, file: &Path, access: Access) -> Result<Option<Self>, Failure> {
        let watch = Watch::start(args.quiet)?;
        let say = |text: &str| {
            if !args.quiet {
                watch.clear();
                eprintln!("diskmill: {}: {text}", shown_file(file));
            }
        };
        let Some(kept) = kept::find(args, file, access, &say)? else { return Ok(None) };
        let options = watch.attach_options(&args.settings)?;
        let session = match Session::attach(&kept, options) {
            Ok(session) => session,
            // It has ended meanwhile.
            Err(error) if matches!(error.kind(), Kind::Died | Kind::Io) => return Ok(None),
            Err(error) => return Err(watch.failure(error.of(shown_file(file)))),
        };
        // What is mounted serves readers and writers alike.
        let access = if session.is_writable() { Access::Write } else { access };
        let mut guest = Self { session, watch, access, quiet: args.quiet, drive: None, keep: None };
        // To look for volumes takes the appliance seconds, and nothing closes one.
        let wanted = keys::note(&args.key);
        if wanted.is_some() && guest.session.notes().get(UNLOCKED) != wanted.as_ref() {
            keys::unlock(&mut guest, &args.key)?;
            guest.note(UNLOCKED, wanted)?;
        }
        Ok(Some(guest))
    }

    fn on(args: &ImageArgs, file: &Path, access: Access, drive: Drive) -> Result<Self, Failure> {
        let watch = Watch::start(args.quiet)?;
        let options = watch.options(&args.settings, drive.size())?;
        let session = Session::open(&[drive.disk()], options);
        watch.clear();
        let session = session.map_err(|error| watch.failure(error.of(shown_file(file))))?;
        let mut guest = Self { session, watch, access, quiet: args.quiet, drive: Some(drive), keep: None };
        keys::unlock(&mut guest, &args.key)?;
        Ok(guest)
    }

    /// Opens a session with file systems mounted: those that were asked for, those of the guest's operating system, or
    /// the only one there is.
    pub(crate) fn mounted(args: &GuestArgs, access: Access) -> Result<Self, Failure> {
        let mut guest = Self::open(&args.image, &args.file, access)?;
        let wanted = mounts_note(args);
        if guest.session.notes().get(MOUNTED) == Some(&wanted) {
            return Ok(guest);
        }
        guest.forget_mounts()?;
        guest.mount(args).map_err(|failure| failure.of(&shown_file(&args.file)))?;
        if guest.drive.is_none() || guest.keep.is_some() {
            guest.note(MOUNTED, Some(wanted))?;
        }
        Ok(guest)
    }

    /// Unmounts what an earlier user of the session has mounted.
    fn forget_mounts(&mut self) -> Result<(), Failure> {
        if self.drive.is_some() {
            return Ok(());
        }
        // First, so that nobody takes for mounted what no longer is.
        self.note(MOUNTED, None)?;
        self.call(Command::new("umount-all")).map(drop)
    }

    /// Leaves a note for later users of the session, or takes it away.
    fn note(&mut self, name: &str, text: Option<Value>) -> Result<(), Failure> {
        let mut notes = self.session.notes();
        match text {
            Some(text) => notes.insert(name.to_owned(), text),
            None => notes.remove(name),
        };
        self.session.set_notes(&notes).map_err(|error| self.watch.failure(error))
    }

    /// Another image with the same options, to be read.
    pub(crate) fn beside(args: &GuestArgs, file: &Path, format: Option<Format>) -> Result<Self, Failure> {
        let drive = Drive::as_format(&args.image, file, format)?;
        let mut guest = Self::on(&args.image, file, Access::Read, drive)?;
        guest.mount(args).map_err(|failure| failure.of(&shown_file(file)))?;
        Ok(guest)
    }

    fn mount(&mut self, args: &GuestArgs) -> Result<(), Failure> {
        if args.mount.is_empty() {
            return self.mount_inspected(args.root.as_deref());
        }
        for spec in &args.mount {
            let mode = if self.access == Access::Read { "ro" } else { "rw" };
            let options =
                if spec.options.is_empty() { mode.to_owned() } else { format!("{mode},{}", spec.options) };
            let command = match spec.fstype.as_str() {
                "" => Command::new("mount-options").arg(options),
                fstype => Command::new("mount-vfs").arg(options).arg(fstype),
            };
            let folder = self.mount_point(&spec.folder);
            self.call(command.arg(&spec.device).arg(folder))?;
        }
        Ok(())
    }

    fn mount_inspected(&mut self, root: Option<&str>) -> Result<(), Failure> {
        let roots = self.roots()?;
        let root = match (root, roots.as_slice()) {
            (Some(root), _) if roots.iter().any(|found| found == root) => root,
            (None, [only]) => only,
            (None, []) => return self.mount_only(),
            (Some(root), _) => {
                return Err(Failure::failed(format!(
                    "no operating system on {root}; found: {}",
                    roots.join(", ")
                )));
            }
            (None, _) => {
                let found = roots.join(", ");
                return Err(Failure::failed(format!(
                    "several operating systems: {found}; choose one with --root DEVICE"
                )));
            }
        };
        for (folder, device) in self.mount_points(root)? {
            if let Err(failure) = self.mount_one(&device, &folder) {
                // As guestfish does: fstab may name what is not there.
                if folder == "/" {
                    return Err(failure);
                }
                self.remark(&failure.message.unwrap_or_default());
            }
        }
        Ok(())
    }

    /// The operating systems' root devices.
    pub(crate) fn roots(&mut self) -> Result<Vec<String>, Failure> {
        self.call(Command::new("inspect-os")).map(|output| texts(&output))
    }

    /// What an operating system mounts where, parents first.
    pub(crate) fn mount_points(&mut self, root: &str) -> Result<Vec<(String, String)>, Failure> {
        let mut points = pairs(&self.call(Command::new("inspect-get-mountpoints").arg(root))?);
        points.sort_by(|a, b| a.0.len().cmp(&b.0.len()).then_with(|| a.cmp(b)));
        Ok(points)
    }

    /// Mounts the only file system that there is.
    fn mount_only(&mut self) -> Result<(), Failure> {
        let output = self.call(Command::new("list-filesystems"))?;
        let all = texts(&output);
        let mut found = all.iter().filter_map(|line| line.rsplit_once(": "));
        let no_files = ["swap", "unknown", "crypto_LUKS", "LVM2_member"];
        let candidates: Vec<&str> = found
            .clone()
            .filter(|(device, content)| !no_files.contains(content) && !device.starts_with("btrfsvol:"))
            .map(|(device, _)| device)
            .collect();
        match candidates.as_slice() {
            [device] => {
                self.remark(&format!("no operating system found: {} is mounted", names::shown(device)));
                self.mount_one(device, "/")
            }
            [] if found.any(|(_, content)| content == "crypto_LUKS") => Err(Failure::failed(
                "no file system found, but an encrypted volume: give its passphrase with --key prompt or --key file:PATH",
            )),
            [] => Err(Failure::failed("no file system found")),
            several => {
                let list = names::shown(&several.join(", ")).into_owned();
                let message = format!(
                    "no operating system and several file systems found: {list}; mount with -m DEVICE"
                );
                Err(Failure::failed(message))
            }
        }
    }

    fn mount_one(&mut self, device: &str, folder: &str) -> Result<(), Failure> {
        let command = if self.access == Access::Read { "mount-ro" } else { "mount" };
        let folder = self.mount_point(folder);
        self.call(Command::new(command).arg(device).arg(folder)).map(drop)
    }

    /// What is mounted where, parents first, and unmounts it.
    pub(crate) fn take_mounts(&mut self) -> Result<Vec<(String, String)>, Failure> {
        let output = self.call(Command::new("mountpoints"))?;
        let mut mounts: Vec<(String, String)> = texts(&output)
            .iter()
            .filter_map(|line| line.rsplit_once(": "))
            .map(|(device, folder)| (device.to_owned(), folder.to_owned()))
            .collect();
        mounts.sort_by_key(|(_, folder)| folder.len());
        if !mounts.is_empty() {
            self.note(MOUNTED, None)?;
            self.call(Command::new("umount-all"))?;
        }
        Ok(mounts)
    }

    /// Mounts again what [`take_mounts`](Self::take_mounts) unmounted.
    pub(crate) fn restore_mounts(&mut self, mounts: &[(String, String)]) -> Result<(), Failure> {
        mounts.iter().try_for_each(|(device, folder)| self.mount_one(device, folder))
    }

    /// Takes the progress off the terminal, for somebody else to use it.
    pub(crate) fn pause(&self) {
        self.watch.clear();
    }

    /// Ends the session, or lets go of it if it is kept. After a verb that writes, everything is in the image when this
    /// returns.
    pub(crate) fn finish(self) -> Result<(), Failure> {
        self.watch.clear();
        match (self.keep, self.drive) {
            (Some((idle, label)), drive) => {
                let kept = self.session.keep(idle, label).map_err(|error| self.watch.failure(error))?;
                drive.map_or(Ok(()), |drive| drive.release(kept.pid()))?;
                if !self.quiet {
                    let (id, idle) = (kept.id(), idle.as_secs());
                    eprintln!(
                        "diskmill: session {id} is kept; it ends {idle} s after its last use, or with `diskmill session stop {id}`"
                    );
                }
                Ok(())
            }
            (None, _drive) => self.session.close().map_err(|error| self.watch.failure(error)),
        }
    }

    /// The name of the session.
    pub(crate) fn session_id(&self) -> String {
        self.session.id()
    }

    /// Whether it was there before this program.
    pub(crate) fn is_attached(&self) -> bool {
        self.drive.is_none()
    }

    /// Says something that is no error.
    pub(crate) fn remark(&self, text: &str) {
        if !self.quiet {
            self.watch.clear();
            eprintln!("diskmill: {text}");
        }
    }

    /// Sends a command and gives back its output.
    pub(crate) fn call(&mut self, command: Command) -> Result<Vec<u8>, Failure> {
        let result = self.session.call(&command);
        result.map_err(|error| self.watch.failure(error))
    }

    /// The same for commands that may fail without an end of the verb: `None` when the guest refuses.
    pub(crate) fn try_call(&mut self, command: Command) -> Result<Option<Vec<u8>>, Failure> {
        match self.session.call(&command) {
            Ok(output) => Ok(Some(output)),
            Err(error) if guest_refused(&error) => Ok(None),
            Err(error) => Err(self.watch.failure(error)),
        }
    }

    /// Removes a file that is of no use any more, be the verb interrupted or not.
    pub(crate) fn discard(&mut self, path: &[u8]) {
        // The error that led here is what counts.
        let _ = self.session.tidy(&Command::new("rm-f").arg(path));
    }

    /// The output as one line of text.
    pub(crate) fn text(&mut self, command: Command) -> Result<String, Failure> {
        let output = self.call(command)?;
        let line = output.strip_suffix(b"\n").unwrap_or(&output);
        Ok(String::from_utf8_lossy(line).into_owned())
    }

    /// Metadata of what the path leads to.
    pub(crate) fn stat(&mut self, path: &[u8]) -> Result<Meta, Failure> {
        let output = self.call(Command::new("statns").arg(path))?;
        Meta::from_record(&Record::single(&output)).ok_or_else(|| strange("statns", path))
    }

    /// Metadata of the file itself, be it a link.
    pub(crate) fn lstat(&mut self, path: &[u8]) -> Result<Meta, Failure> {
        let output = self.call(Command::new("lstatns").arg(path))?;
        Meta::from_record(&Record::single(&output)).ok_or_else(|| strange("lstatns", path))
    }

    /// The same, and `None` if there is no such file.
    pub(crate) fn lstat_if_there(&mut self, path: &[u8]) -> Result<Option<Meta>, Failure> {
        self.if_there("lstatns", path)
    }

    /// Metadata of what the path leads to, and `None` if it leads nowhere.
    pub(crate) fn stat_if_there(&mut self, path: &[u8]) -> Result<Option<Meta>, Failure> {
        self.if_there("statns", path)
    }

    fn if_there(&mut self, command: &str, path: &[u8]) -> Result<Option<Meta>, Failure> {
        match self.session.call(&Command::new(command).arg(path)) {
            Ok(output) => {
                Meta::from_record(&Record::single(&output)).map(Some).ok_or_else(|| strange(command, path))
            }
            Err(error) if error.kind() == Kind::NotFound => Ok(None),
            Err(error) => Err(self.watch.failure(error)),
        }
    }

    /// Where a symbolic link leads.
    pub(crate) fn readlink(&mut self, path: &[u8]) -> Result<Vec<u8>, Failure> {
        let mut target = self.call(Command::new("readlink").arg(path))?;
        if target.last() == Some(&b'\n') {
            target.pop();
        }
        Ok(target)
    }

    /// The names in a folder, sorted.
    pub(crate) fn names(&mut self, folder: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
        self.list(Command::new("ls0").arg(folder).output())
    }

    /// The paths of all that is below a folder, relative to it, sorted.
    pub(crate) fn walk(&mut self, folder: &[u8]) -> Result<Vec<Vec<u8>>, Failure> {
        let real = self.real_path(folder)?;
        let mut names = self.list(Command::new("find0").arg(real).output())?;
        // Of any folder but the root, libguestfs leaves the slash behind it.
        for name in &mut names {
            if name.first() == Some(&b'/') {
                name.remove(0);
            }
        }
        Ok(names)
    }

    fn list(&mut self, command: Command) -> Result<Vec<Vec<u8>>, Failure> {
        let output = self.call(command)?;
        let mut names: Vec<Vec<u8>> = null_ended(&output).map(<[u8]>::to_vec).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Metadata and link targets of `names` below `folder`. What has gone meanwhile is left out.
    pub(crate) fn entries(&mut self, folder: &[u8], names: Vec<Vec<u8>>) -> Result<Vec<Entry>, Failure> {
        let mut entries = Vec::with_capacity(names.len());
        // The folder itself has no name in it.
        let (itself, names): (Vec<_>, Vec<_>) = names.into_iter().partition(Vec::is_empty);
        for path in itself {
            let meta = self.lstat(folder)?;
            let target = if meta.is(FileType::Link) { Some(self.readlink(folder)?) } else { None };
            entries.push(Entry { path, meta: Some(meta), target });
        }
        // Both calls take names in one folder, not paths.
        let mut folders: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
        for path in names {
            let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
                Some(slash) => path.split_at(slash),
                None => (&b""[..], path.as_slice()),
            };
            let name = name.strip_prefix(b"/").unwrap_or(name).to_vec();
            folders.entry(parent.to_vec()).or_default().push(name);
        }
        for (parent, names) in folders {
            let full = if parent.is_empty() { folder.to_vec() } else { join(folder, &parent) };
            let mut left = names.as_slice();
            while !left.is_empty() {
                let (batch, rest) = left.split_at(batch_len(left));
                left = rest;
                self.add_entries(&full, &parent, batch, &mut entries)?;
            }
        }
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(entries)
    }

    /// Adds what `names` in the folder `full` are; `parent` is how the folder is called in the listing.
    fn add_entries(
        &mut self,
        full: &[u8],
        parent: &[u8],
        names: &[Vec<u8>],
        entries: &mut Vec<Entry>,
    ) -> Result<(), Failure> {
        let output = self.call(Command::new("lstatnslist").arg(full).list(names))?;
        let records = Record::list(&output);
        if records.len() != names.len() {
            return Err(strange("lstatnslist", full));
        }
        let found = || {
            names.iter().zip(&records).filter_map(|(name, record)| Some((name, Meta::from_record(record)?)))
        };
        let links: Vec<&Vec<u8>> =
            found().filter(|(_, meta)| meta.is(FileType::Link)).map(|(name, _)| name).collect();
        let mut targets = self.targets(full, &links)?.into_iter();
        for (name, meta) in found() {
            let path = if parent.is_empty() { name.clone() } else { join(parent, name) };
            let target = if meta.is(FileType::Link) { targets.next() } else { None };
            entries.push(Entry { path, meta: Some(meta), target });
        }
        Ok(())
    }

    /// The targets of links in a folder. readlinklist answers with lines, so that where a target has a line end each is
    /// asked for alone.
    fn targets(&mut self, folder: &[u8], links: &[&Vec<u8>]) -> Result<Vec<Vec<u8>>, Failure> {
        if links.is_empty() {
            return Ok(Vec::new());
        }
        let output = self.call(Command::new("readlinklist").arg(folder).list(links))?;
        let targets: Vec<Vec<u8>> = lines(&output).map(<[u8]>::to_vec).collect();
        if targets.len() == links.len() {
            return Ok(targets);
        }
        links.iter().map(|name| self.readlink(&join(folder, name))).collect()
    }

    /// Sends a command with streams.
    pub(crate) fn send(
        &mut self,
        command: &Command,
        input: Option<&mut dyn Read>,
        output: &mut dyn Write,
    ) -> Result<(), Failure> {
        let result = self.session.send(command, input, output);
        result.map_err(|error| self.watch.failure(error))
    }
}

/// What is to be mounted, for a later command to compare.
fn mounts_note(args: &GuestArgs) -> Value {
    let specs = args.mount.iter().map(|spec| [&spec.device, &spec.folder, &spec.options, &spec.fstype]);
    json!({ "mount": specs.collect::<Vec<_>>(), "root": args.root })
}

/// How many of the names go into one call; at least one.
fn batch_len(names: &[Vec<u8>]) -> usize {
    let mut bytes = 0_usize;
    let fits = |name: &&Vec<u8>| {
        bytes = bytes.saturating_add(name.len());
        bytes <= BATCH_BYTES
    };
    names.iter().take(BATCH).take_while(fits).count().max(1)
}

fn shown_file(file: &Path) -> String {
    names::shown(&file.to_string_lossy()).into_owned()
}

fn strange(command: &str, path: &[u8]) -> Failure {
    Failure::failed(format!("{command} {}: an answer that is not understood", shown(path)))
}
