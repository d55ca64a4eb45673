//! `edit`: a file of the image in the user's editor.

use std::env;
use std::ffi::OsString;
use std::process::Command as Process;

use diskmill_guestfs::Command;
use serde_json::{Map, json};
use std::os::unix::ffi::OsStrExt as _;

use super::args::{EditArgs, FileType};
use super::copy::{LocalCopy, host_failure};
use super::guest::{Access, Guest};
use super::name::{self, guest_path, shown};
use super::output::print_json;
use crate::exit::{Exit, Failure};

pub(crate) fn edit(args: &EditArgs) -> Result<Exit, Failure> {
    let editor = editor();
    let mut guest = Guest::mounted(&args.guest, Access::Write)?;
    let path = guest_path(&args.path);
    // The file behind a link is replaced, not the link.
    let path = if guest.lstat(&path)?.is(FileType::Link) { real_path(&mut guest, &path)? } else { path };
    if !guest.lstat(&path)?.is(FileType::File) {
        return Err(Failure::failed(format!("{} is no file", shown(&path))));
    }
    let copy = LocalCopy::fetch(&mut guest, &path)?;
    let local = copy.path();
    let read = || std::fs::read(&local).map_err(|error| host_failure(&local, &error));
    let before = read()?;
    guest.pause();
    run(&editor, &local)?;
    let changed = read()? != before;
    if changed {
        if let Some(suffix) = &args.backup {
            let backup = [&path, suffix.as_bytes()].concat();
            guest.call(Command::new("cp-a").arg(&path).arg(&backup))?;
        }
        copy.store(&mut guest, &path)?;
    }
    guest.finish()?;
    if args.guest.image.json {
        let mut object = Map::new();
        name::put(&mut object, "path", &path);
        object.insert("changed".to_owned(), json!(changed));
        return print_json(&object.into());
    }
    if !changed && !args.guest.image.quiet {
        eprintln!("diskmill: {} was not changed", shown(&path));
    }
    Ok(Exit::Done)
}

fn real_path(guest: &mut Guest, path: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut real = guest.call(Command::new("realpath").arg(path))?;
    if real.last() == Some(&b'\n') {
        real.pop();
    }
    Ok(real)
}

/// As other programs choose: `VISUAL`, `EDITOR`, vi.
fn editor() -> OsString {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    set("VISUAL").or_else(|| set("EDITOR")).unwrap_or_else(|| "vi".into())
}

/// Runs the editor through the shell, since the variable may hold options.
fn run(editor: &std::ffi::OsStr, file: &std::path::Path) -> Result<(), Failure> {
    let mut line = editor.to_owned();
    line.push(" \"$1\"");
    let status = Process::new("/bin/sh").arg("-c").arg(line).arg("sh").arg(file).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            Err(Failure::failed(format!("the editor {editor:?} ended with {status}: nothing was changed")))
        }
        Err(error) => Err(Failure::failed(format!("cannot run the editor {editor:?}: {error}"))),
    }
}
