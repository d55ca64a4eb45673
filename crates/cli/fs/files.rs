//! Looking at files: `ls`, `tree`, `cat`, `stat`, `find`.

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;

use diskmill_guestfs::Command;
use serde_json::{Map, Value};

use super::args::{FileType, FindArgs, LsArgs, PathsArgs, TreeArgs};
use super::guest::{Access, Guest};
use super::meta::{Entry, Meta};
use super::name::{self, base, guest_path, join, parts, shown};
use super::output::print_json;
use super::table::Table;
use crate::exit::{Exit, Failure};

pub(crate) fn ls(args: &LsArgs) -> Result<Exit, Failure> {
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let json = args.guest.image.json;
    let mut listings = Vec::new();
    for path in &args.paths {
        let path = guest_path(path);
        // Like `ls`, what a link leads to is listed, and a file is shown itself.
        let names = match guest.stat(&path)?.is(FileType::Folder) {
            false => vec![Vec::new()],
            true if args.recursive => guest.walk(&path)?,
            true => guest.names(&path)?,
        };
        let entries = if args.long || json { guest.entries(&path, names)? } else { bare(names) };
        listings.push((path, entries));
    }
    guest.finish()?;
    if json {
        let entries =
            listings.iter().flat_map(|(path, entries)| entries.iter().map(|entry| entry.json(path)));
        return print_json(&entries.collect());
    }
    let raw = args.null || !args.long && !io::stdout().is_terminal();
    let mut out = Vec::new();
    for (index, (path, entries)) in listings.iter().enumerate() {
        if listings.len() > 1 && !args.null {
            out.extend_from_slice(if index == 0 { b"" } else { b"\n" });
            out.extend_from_slice(shown(path).as_bytes());
            out.extend_from_slice(b":\n");
        }
        if args.long {
            out.extend_from_slice(long(path, entries).as_bytes());
        } else {
            entries.iter().for_each(|entry| put_name(&mut out, entry.name_under(path), raw, args.null));
        }
    }
    io::stdout().write_all(&out)?;
    Ok(Exit::Done)
}

fn bare(names: Vec<Vec<u8>>) -> Vec<Entry> {
    names.into_iter().map(|path| Entry { path, meta: None, target: None }).collect()
}

/// Puts a name on a line of its own, as it is or escaped, or with a NUL behind it.
fn put_name(out: &mut Vec<u8>, name: &[u8], raw: bool, null: bool) {
    if raw {
        out.extend_from_slice(name);
    } else {
        out.extend_from_slice(shown(name).as_bytes());
    }
    out.push(if null { 0 } else { b'\n' });
}

/// `ls -l` with numbers for owners (names are the guest's own) and times in UTC.
fn long(folder: &[u8], entries: &[Entry]) -> String {
    let mut table = Table::new(&["MODE", ">LINKS", ">UID", ">GID", ">SIZE", "MODIFIED", "NAME"]);
    for entry in entries {
        let name = shown(entry.name_under(folder));
        let Some(meta) = &entry.meta else {
            table.row([
                "?".to_owned(),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
                String::new(),
                name,
            ]);
            continue;
        };
        let size = match meta.kind() {
            Some(FileType::Block | FileType::Char) => {
                let (major, minor) = meta.device_numbers();
                format!("{major},{minor}")
            }
            _ => meta.size.to_string(),
        };
        let name = match &entry.target {
            Some(target) => format!("{name} -> {}", shown(target)),
            None => name,
        };
        let [links, user, group] =
            [meta.links, meta.user.into(), meta.group.into()].map(|n: i64| n.to_string());
        table.row([meta.mode_text(), links, user, group, size, meta.modified.text(), name]);
    }
    table.text()
}

impl Entry {
    /// The name to show for an entry of `folder`: the path below it, or of a file that was asked for, the path itself.
    fn name_under<'e>(&'e self, folder: &'e [u8]) -> &'e [u8] {
        if self.path.is_empty() { folder } else { &self.path }
    }

    /// The absolute path.
    fn full(&self, folder: &[u8]) -> Vec<u8> {
        if self.path.is_empty() { folder.to_vec() } else { join(folder, &self.path) }
    }

    pub(crate) fn json(&self, folder: &[u8]) -> Value {
        let mut object = Map::new();
        let path = self.full(folder);
        name::put(&mut object, "name", base(&path));
        name::put(&mut object, "path", &path);
        if let Some(meta) = &self.meta {
            meta.put_json(&mut object);
        }
        if let Some(target) = &self.target {
            name::put(&mut object, "target", target);
        }
        object.into()
    }
}

pub(crate) fn tree(args: &TreeArgs) -> Result<Exit, Failure> {
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let root = guest_path(&args.path);
    if !guest.stat(&root)?.is(FileType::Folder) {
        return Err(Failure::failed(format!("{} is no folder", shown(&root))));
    }
    let mut names = guest.walk(&root)?;
    names.retain(|name| args.level.is_none_or(|level| parts(name).count() <= level));
    let entries = guest.entries(&root, names)?;
    guest.finish()?;
    if args.guest.image.json {
        return print_json(&entries.iter().map(|entry| entry.json(&root)).collect());
    }
    io::stdout().write_all(draw(&root, &entries).as_bytes())?;
    Ok(Exit::Done)
}

/// The tree of `entries`, drawn like tree(1).
fn draw(root: &[u8], entries: &[Entry]) -> String {
    // In the order of their parts, so that what is in a folder follows it.
    let mut entries: Vec<(Vec<&[u8]>, &Entry)> =
        entries.iter().map(|entry| (parts(&entry.path).collect(), entry)).collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let mut out = shown(root) + "\n";
    let mut folders = 0_u64;
    // From the end, an entry is the last one of its folder if no later one was seen at its depth since a shallower one.
    let mut last = vec![false; entries.len()];
    let mut seen: Vec<bool> = Vec::new();
    for (flag, (path, _)) in last.iter_mut().zip(&entries).rev() {
        let depth = path.len();
        seen.truncate(depth);
        seen.resize(depth, false);
        if let Some(seen) = seen.last_mut() {
            *flag = !std::mem::replace(seen, true);
        }
    }
    let mut lines: Vec<&str> = Vec::new();
    for (&last, (path, entry)) in last.iter().zip(&entries) {
        lines.truncate(path.len().saturating_sub(1));
        lines.iter().for_each(|line| out.push_str(line));
        out.push_str(if last { "└── " } else { "├── " });
        lines.push(if last { "    " } else { "│   " });
        out.push_str(&shown(path.last().copied().unwrap_or_default()));
        if let Some(target) = &entry.target {
            out.push_str(" -> ");
            out.push_str(&shown(target));
        }
        out.push('\n');
        folders += u64::from(entry.meta.is_some_and(|meta| meta.is(FileType::Folder)));
    }
    let files = (entries.len() as u64).saturating_sub(folders);
    out + &format!("\n{folders} folders, {files} files\n")
}

pub(crate) fn cat(args: &PathsArgs) -> Result<Exit, Failure> {
    if args.guest.image.json {
        return Err(Failure::usage(
            "cat --json is not supported: a file's bytes are no JSON; see stat --json",
        ));
    }
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    for path in &args.paths {
        guest.print(&guest_path(path), &mut io::stdout())?;
    }
    io::stdout().flush()?;
    guest.finish()?;
    Ok(Exit::Done)
}

pub(crate) fn stat(args: &PathsArgs) -> Result<Exit, Failure> {
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let mut entries = Vec::new();
    for path in &args.paths {
        let path = guest_path(path);
        let meta = guest.lstat(&path)?;
        let target = if meta.is(FileType::Link) { Some(guest.readlink(&path)?) } else { None };
        entries.push((path, Entry { path: Vec::new(), meta: Some(meta), target }));
    }
    guest.finish()?;
    if args.guest.image.json {
        return print_json(&entries.iter().map(|(path, entry)| entry.json(path)).collect());
    }
    let texts: Vec<String> = entries.iter().map(|(path, entry)| facts(path, entry)).collect();
    io::stdout().write_all(texts.join("\n").as_bytes())?;
    Ok(Exit::Done)
}

fn facts(path: &[u8], entry: &Entry) -> String {
    let mut out = String::new();
    let mut line = |key: &str, value: String| out.push_str(&format!("{key:>9}: {value}\n"));
    line("file", shown(path));
    if let Some(target) = &entry.target {
        line("target", shown(target));
    }
    let Some(meta) = &entry.meta else { return out };
    line("type", meta.kind().map_or("unknown", super::meta::type_name).to_owned());
    line("size", format!("{} ({} allocated)", meta.size, meta.allocated));
    line("mode", format!("{:04o} {}", meta.permissions(), meta.mode_text()));
    line("owner", format!("{}:{}", meta.user, meta.group));
    line("links", meta.links.to_string());
    line("inode", meta.inode.to_string());
    if meta.is(FileType::Block) || meta.is(FileType::Char) {
        let (major, minor) = meta.device_numbers();
        line("device", format!("{major},{minor}"));
    }
    line("accessed", meta.accessed.text());
    line("modified", meta.modified.text());
    line("changed", meta.changed.text());
    out
}

pub(crate) fn find(args: &FindArgs) -> Result<Exit, Failure> {
    let mut guest = Guest::mounted(&args.guest, Access::Read)?;
    let root = guest_path(&args.path);
    guest.lstat(&root)?;
    // What is named follows links, what is below does not.
    let folder = guest.stat_if_there(&root)?.is_some_and(|meta| meta.is(FileType::Folder));
    let mut names = if folder { guest.walk(&root)? } else { Vec::new() };
    // find(1) begins with where it begins.
    names.insert(0, Vec::new());
    names.retain(|name| {
        let full = join(&root, name);
        let full = full.strip_suffix(b"/").filter(|path| !path.is_empty()).unwrap_or(&full);
        matches(args.name.as_deref(), base(full))
            && matches(args.path_glob.as_deref(), full)
            && args.max_depth.is_none_or(|depth| parts(name).count() <= depth)
    });
    let json = args.guest.image.json;
    let mut entries = if json || args.kind.is_some() || args.min_size.is_some() || args.max_size.is_some() {
        guest.entries(&root, names)?
    } else {
        bare(names)
    };
    guest.finish()?;
    entries.retain(|entry| {
        let fits = |wanted: &dyn Fn(&Meta) -> bool| entry.meta.as_ref().is_some_and(wanted);
        args.kind.is_none_or(|kind| fits(&|meta| meta.is(kind)))
            && args.min_size.is_none_or(|size| fits(&|meta| meta.size >= size))
            && args.max_size.is_none_or(|size| fits(&|meta| meta.size <= size))
    });
    if json {
        return print_json(&entries.iter().map(|entry| entry.json(&root)).collect());
    }
    let raw = args.null || !io::stdout().is_terminal();
    let mut out = Vec::new();
    entries.iter().for_each(|entry| put_name(&mut out, &entry.full(&root), raw, args.null));
    io::stdout().write_all(&out)?;
    Ok(Exit::Done)
}

fn matches(glob: Option<&OsStr>, name: &[u8]) -> bool {
    glob.is_none_or(|glob| fast_glob::glob_match(glob.as_bytes(), name))
}

pub(crate) fn rm(args: &super::args::RmArgs) -> Result<Exit, Failure> {
    change(&args.paths, |guest, path| {
        if !args.recursive {
            let command = if args.force { "rm-f" } else { "rm" };
            return guest.call(Command::new(command).arg(path)).map(drop);
        }
        if args.force && guest.lstat_if_there(path)?.is_none() {
            return Ok(());
        }
        // rm-rf is silent about what is not there.
        guest.lstat(path)?;
        let path = guest.real_name(path)?;
        guest.call(Command::new("rm-rf").arg(path)).map(drop)
    })
}

pub(crate) fn mkdir(args: &super::args::MkdirArgs) -> Result<Exit, Failure> {
    change(&args.paths, |guest, path| {
        if args.parents {
            if guest.lstat_if_there(path)?.is_some_and(|meta| meta.is(FileType::Folder)) {
                return Ok(());
            }
            guest.call(Command::new("mkdir-p").arg(path))?;
        } else {
            guest.call(Command::new("mkdir").arg(path))?;
        }
        guest.chmod(path, args.mode)
    })
}

/// Does `one` to each path of a mounted image that may be written.
fn change(
    args: &PathsArgs,
    mut one: impl FnMut(&mut Guest, &[u8]) -> Result<(), Failure>,
) -> Result<Exit, Failure> {
    let mut guest = Guest::mounted(&args.guest, Access::Write)?;
    let paths: Vec<Vec<u8>> = args.paths.iter().map(|path: &OsString| guest_path(path)).collect();
    for path in &paths {
        one(&mut guest, path)?;
    }
    guest.finish()?;
    if args.guest.image.json {
        let done = paths.iter().map(|path| {
            let mut object = Map::new();
            name::put(&mut object, "path", path);
            Value::from(object)
        });
        return print_json(&done.collect());
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(paths: &[&[u8]]) -> Vec<Entry> {
        bare(paths.iter().map(|path| path.to_vec()).collect())
    }

    #[test]
    fn trees_are_drawn() {
        let entries = entries(&[b"a/b/c", b"a", b"a.x", b"a/b", b"z\n", b"a/d"]);
        let want = "/etc\n\
                    ├── a\n\
                    │   ├── b\n\
                    │   │   └── c\n\
                    │   └── d\n\
                    ├── a.x\n\
                    └── z\\n\n\
                    \n0 folders, 6 files\n";
        assert_eq!(draw(b"/etc", &entries), want);
    }

    #[test]
    fn patterns_match_bytes() {
        let glob = |glob: &str, name: &[u8]| matches(Some(OsStr::new(glob)), name);
        assert!(glob("*.conf", b"a.conf") && !glob("*.conf", b"a.confx") && glob("?", b"\xff"));
        assert!(glob("/etc/**/x", b"/etc/a/b/x") && !glob("/etc/*/x", b"/etc/a/b/x"));
        assert!(matches(None, b"anything"));
    }
}
