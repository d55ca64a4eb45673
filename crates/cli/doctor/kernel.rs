//! The kernel that supermin builds an appliance with (supermin(1), "KERNEL" and "ENVIRONMENT VARIABLES").

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::Machine;
use super::report::{Check, Topic};

const VARIABLES: [&str; 3] = ["SUPERMIN_KERNEL", "SUPERMIN_KERNEL_VERSION", "SUPERMIN_MODULES"];

pub(super) fn kernel(machine: &Machine) -> Check {
    if let Some(fixed) = machine.fixed_appliance() {
        return Check::ok(Topic::Kernel, format!("not needed: the appliance in {} has one", fixed.display()));
    }
    let named = VARIABLES.map(|name| std::env::var_os(name).filter(|value| !value.is_empty()));
    match named {
        [None, None, None] => installed(Path::new("/")),
        [Some(kernel), Some(_), Some(modules)] => by_variables(Path::new(&kernel), Path::new(&modules)),
        named => {
            let missing: Vec<&str> = VARIABLES
                .into_iter()
                .zip(&named)
                .filter(|(_, value)| value.is_none())
                .map(|(name, _)| name)
                .collect();
            Check::problem(
                Topic::Kernel,
                format!("{} is not set, others of {} are", missing.join(", "), VARIABLES.join(", ")),
                "set all three of them, or none",
            )
        }
    }
}

fn by_variables(kernel: &Path, modules: &Path) -> Check {
    match (File::open(kernel), modules.join("modules.dep").exists()) {
        (Err(error), _) => Check::problem(
            Topic::Kernel,
            format!("SUPERMIN_KERNEL: {}: {error}", kernel.display()),
            "name a kernel that you may read, or unset SUPERMIN_KERNEL, _KERNEL_VERSION and _MODULES",
        ),
        (Ok(_), false) => Check::problem(
            Topic::Kernel,
            format!("SUPERMIN_MODULES: there is no modules.dep in {}", modules.display()),
            "name the folder /lib/modules/VERSION of that kernel, and run `depmod VERSION` if modules.dep is missing",
        ),
        (Ok(_), true) => Check::ok(Topic::Kernel, format!("{} (SUPERMIN_KERNEL)", kernel.display())),
    }
}

/// Looks where supermin does: `/boot/vmlinuz-VERSION` and `/lib/modules/VERSION/vmlinuz`, with modules for that version.
fn installed(root: &Path) -> Check {
    let modules = root.join("lib/modules");
    let mut kernels = Vec::new();
    for entry in entries(&root.join("boot")) {
        let name = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some(version) = name.strip_prefix("vmlinuz-") {
            kernels.push((entry, version.to_owned()));
        }
    }
    for entry in entries(&modules) {
        let version = entry.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if entry.join("vmlinuz").exists() {
            kernels.push((entry.join("vmlinuz"), version));
        }
    }
    let mut unreadable = Vec::new();
    let mut without = Vec::new();
    for (kernel, version) in kernels {
        match File::open(&kernel) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => unreadable.push(kernel),
            Err(_) => {}
            Ok(_) if modules.join(&version).join("modules.dep").exists() => {
                return Check::ok(Topic::Kernel, kernel.display().to_string());
            }
            Ok(_) => without.push(version),
        }
    }
    if let Some(kernel) = unreadable.first() {
        // Ubuntu keeps its kernels from everybody but root.
        let path = kernel.display();
        return Check::problem(
            Topic::Kernel,
            format!("you may not read {path}"),
            format!(
                "`sudo chmod 0644 {path}`, after each upgrade of the kernel anew (`sudo dpkg-statoverride --update --add root root 0644 {path}` keeps it)"
            ),
        );
    }
    if let Some(version) = without.first() {
        return Check::problem(
            Topic::Kernel,
            format!("the kernel {version} has no modules in /lib/modules/{version}"),
            "install the whole kernel package, or run `depmod VERSION` if only modules.dep is missing",
        );
    }
    Check::problem(
        Topic::Kernel,
        "there is no kernel in /boot or /lib/modules (libguestfs does not depend on one, and containers have none)",
        format!(
            "`apt install --no-install-recommends linux-image-{}` (Debian), `linux-image-generic` (Ubuntu), `dnf install kernel-core` \
             (Fedora, RHEL); or point LIBGUESTFS_PATH to a fixed appliance",
            match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            }
        ),
    )
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::super::report::Status;
    use super::*;

    #[test]
    fn a_kernel_needs_its_modules() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let says = |word: &str| {
            let check = installed(root);
            assert!(check.found.contains(word), "{check:?}");
            check.status
        };
        assert_eq!(says("no kernel"), Status::Problem);
        fs::create_dir(root.join("boot")).unwrap();
        fs::write(root.join("boot/vmlinuz-6.1"), "").unwrap();
        assert_eq!(says("no modules"), Status::Problem);
        // As Fedora has it.
        fs::create_dir_all(root.join("lib/modules/6.2")).unwrap();
        fs::write(root.join("lib/modules/6.2/vmlinuz"), "").unwrap();
        assert_eq!(says("no modules"), Status::Problem);
        fs::write(root.join("lib/modules/6.2/modules.dep"), "").unwrap();
        assert_eq!(says("6.2/vmlinuz"), Status::Ok);
    }
}
