//! `edit`: a file of the image in the user's editor.

use std::env;
use std::ffi::OsString;
use std::process::Command as Process;

use diskmill_guestfs::Command;
use serde_json::{Map, json};
use std::os::unix::ffi::OsStrExt as _;

use super::args::{EditArgs, FileType};
use super::copy::host_failure;
use super::guest::{Access, Guest};
use super::name::{self, guest_path, shown};
use super::output::print_json;
use super::replace::LocalCopy;
use crate::exit::{Exit, Failure};

pub(crate) fn edit(args: &EditArgs) -> Result<Exit, Failure> {
    let editor = editor();
    let mut guest = Guest::mounted(&args.guest, Access::Write)?;
    let path = guest_path(&args.path);
    // The file behind a link is replaced, not the link.
    let path = if guest.lstat(&path)?.is(FileType::Link) { guest.real_path(&path)? } else { path };
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
            let real = guest.real_path(&path)?;
            let backup = [&real, suffix.as_bytes()].concat();
            // Copying would follow it.
            if guest.lstat_if_there(&backup)?.is_some_and(|meta| meta.is(FileType::Link)) {
                guest.call(Command::new("rm-f").arg(&backup))?;
            }
            guest.call(Command::new("cp-a").arg(&real).arg(&backup))?;
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
