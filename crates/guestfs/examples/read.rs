//! Shows a file inside an image: `read IMAGE FORMAT PARTITION PATH`, such as `read disk.qcow2 qcow2 /dev/sda1 /etc/fstab`.

use std::io::Write as _;
use std::process::ExitCode;

use diskmill_guestfs::{Command, Disk, Options, Session, WatchdogCommand, keeper_main, sweep};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        // As which the session starts this program, to be ended whatever becomes of it.
        ["guestfs-keeper"] => return keeper_main(),
        [image, format, partition, path] => show(image, format, partition, path),
        _ => {
            eprintln!("usage: read IMAGE FORMAT PARTITION PATH");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("read: {error}");
            ExitCode::FAILURE
        }
    }
}

fn show(image: &str, format: &str, partition: &str, path: &str) -> diskmill_guestfs::Result<()> {
    // What killed runs have left may still have the image open.
    sweep();
    let options = Options::new(WatchdogCommand::this_program(["guestfs-keeper"]))?;
    let mut session = Session::open(&[Disk::file(image, format)], options)?;
    session.call(&Command::new("mount-ro").arg(partition).arg("/"))?;
    let content = session.read(path)?;
    session.close()?;
    let _ = std::io::stdout().write_all(&content);
    Ok(())
}
