//! `diskmill install-qemu-img`: the link under whose name diskmill is qemu-img.

use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use clap::Args;

use crate::exit::{Exit, Failure};

#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    /// Replace a program or link of that name
    #[arg(long)]
    pub(crate) force: bool,

    /// Folder for the link; best one that comes first in PATH
    pub(crate) dir: PathBuf,
}

pub(crate) fn run(args: &InstallArgs) -> Result<Exit, Failure> {
    let failed = |doing: &str, error: io::Error| Failure::failed(format!("{doing}: {error}"));
    let program = std::env::current_exe().map_err(|error| failed("cannot tell where diskmill is", error))?;
    let link = args.dir.join("qemu-img");
    match link.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(&format!("{link:?}"), error)),
        Ok(_) if link.canonicalize().is_ok_and(|target| target == program) => return Ok(Exit::Done),
        Ok(old) if args.force && !old.is_dir() => {
            std::fs::remove_file(&link)
                .map_err(|error| failed(&format!("cannot replace {link:?}"), error))?;
        }
        Ok(_) => {
            return Err(Failure::failed(format!("{link:?} is there already (--force replaces it)")));
        }
    }
    symlink(&program, &link).map_err(|error| failed(&format!("cannot make the link {link:?}"), error))?;
    writeln!(io::stdout(), "{} -> {}", link.display(), program.display())?;
    Ok(Exit::Done)
}
