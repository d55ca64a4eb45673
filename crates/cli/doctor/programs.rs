//! The programs that the file-system commands need.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Machine;
use super::report::{Check, Topic};

/// Programs of libguestfs that single commands need: program, Debian's package, command.
const TOOLS: [(&str, &str, &str); 4] = [
    ("guestmount", "guestmount", "fs mount"),
    ("virt-customize", "guestfs-tools", "fs customize"),
    ("virt-sysprep", "guestfs-tools", "fs sysprep"),
    ("hivexregedit", "libwin-hivex-perl", "fs registry export"),
];

pub(super) fn guestfish(machine: &Machine) -> Check {
    let program = &machine.settings.guestfish;
    let install = "install it: `apt install guestfish` (Debian, Ubuntu), `dnf install libguestfs guestfs-tools` (Fedora, RHEL)";
    let Some(path) = find(program) else {
        return Check::problem(Topic::Guestfish, format!("{} is not on PATH", program.display()), install);
    };
    match version(&path) {
        Ok(version) => Check::ok(Topic::Guestfish, format!("{version}, {}", path.display())),
        Err(why) => {
            Check::problem(Topic::Guestfish, format!("{} does not run: {why}", path.display()), install)
        }
    }
}

pub(super) fn tools(_machine: &Machine) -> Check {
    let missing: Vec<_> = TOOLS.iter().filter(|(program, ..)| find(Path::new(program)).is_none()).collect();
    if missing.is_empty() {
        return Check::ok(Topic::Tools, TOOLS.map(|(program, ..)| program).join(", "));
    }
    let found: Vec<String> =
        missing.iter().map(|(program, _, command)| format!("{program} (`{command}`)")).collect();
    let mut packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    packages.dedup();
    Check::note(
        Topic::Tools,
        format!("not installed: {}", found.join(", ")),
        format!(
            "install them: `apt install {}` (Debian, Ubuntu), `dnf install guestfs-tools` (Fedora, RHEL)",
            packages.join(" ")
        ),
    )
}

pub(super) fn qemu(machine: &Machine) -> Check {
    let arch = std::env::consts::ARCH;
    let install = format!(
        "install it: `apt install qemu-system-{}` (Debian, Ubuntu), `dnf install qemu-kvm` (Fedora, RHEL); LIBGUESTFS_HV names \
         one elsewhere",
        if arch == "x86_64" { "x86" } else { "arm" },
    );
    match machine.qemu() {
        None => Check::problem(Topic::Qemu, format!("no qemu-system-{arch} on PATH"), install),
        Some(path) => match version(&path) {
            Ok(version) => Check::ok(Topic::Qemu, format!("{version}, {}", path.display())),
            Err(why) => {
                Check::problem(Topic::Qemu, format!("{} does not run: {why}", path.display()), install)
            }
        },
    }
}

pub(super) fn supermin(machine: &Machine) -> Check {
    if let Some(fixed) = machine.fixed_appliance() {
        return Check::ok(
            Topic::Supermin,
            format!("not needed: the appliance in {} is complete", fixed.display()),
        );
    }
    match find(Path::new("supermin")).map(|path| (version(&path), path)) {
        Some((Ok(version), path)) => Check::ok(Topic::Supermin, format!("{version}, {}", path.display())),
        other => {
            let why = other.map_or("it is not on PATH".to_owned(), |(version, path)| {
                format!("{} does not run: {}", path.display(), version.err().unwrap_or_default())
            });
            let remedy = "install it (`apt install supermin`, `dnf install supermin`), or point LIBGUESTFS_PATH to a fixed \
                          appliance";
            Check::problem(Topic::Supermin, why, remedy)
        }
    }
}

/// The file that the shell would run for `program`.
pub(super) fn find(program: &Path) -> Option<PathBuf> {
    let runs = |path: &Path| {
        path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if program.components().count() > 1 {
        return runs(program).then(|| program.to_owned());
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|path| runs(path))
}

/// The first line of `program --version`.
fn version(program: &Path) -> Result<String, String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|error| error.to_string())?;
    if !output.status.success() {
        return Err(output.status.to_string());
    }
    let said = String::from_utf8_lossy(&output.stdout);
    Ok(said.lines().next().unwrap_or_default().trim().to_owned())
}
