//! What supermin makes a prepared appliance of: libguestfs' own parts (`supermin.d`, supermin(1)), changed where each start
//! would do what is of no use in an appliance.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

/// The archive with the appliance's `/init`, a shell script.
const INIT_ARCHIVE: &str = "init.tar.gz";

/// The line with which `/init` makes udev look at every device that there is, some hundreds. That is the longest step of `/init`
/// under emulation: most of a second of processor time.
const TRIGGER: &str = "udevadm trigger";
/// What it says instead: disks, network cards, the channel to libguestfs, and what of virtio has no driver yet; and where there
/// are instructions for AES (KVM, not our emulated processor) the processor, whose crypto modules are loaded by that. The other
/// devices are as the kernel has made them, and devices that appear later have their rules as ever.
const NARROW_TRIGGER: &str = "udevadm trigger --subsystem-match=block --subsystem-match=net \\
    --subsystem-match=virtio --subsystem-match=virtio-ports \\
    $(grep -qw aes /proc/cpuinfo && echo --subsystem-match=cpu)";

/// Files that are left out, as a list of supermin. What systemd-tmpfiles makes by these in `/dev` and `/run` is for services
/// and users that an appliance does not have, which it says at length on the serial console.
const LEFT_OUT: &str = "\
-/usr/lib/tmpfiles.d/home.conf
-/usr/lib/tmpfiles.d/journal-nocow.conf
-/usr/lib/tmpfiles.d/legacy.conf
-/usr/lib/tmpfiles.d/passwd.conf
-/usr/lib/tmpfiles.d/provision.conf
-/usr/lib/tmpfiles.d/static-nodes-permissions.conf
-/usr/lib/tmpfiles.d/systemd*.conf
-/usr/lib/tmpfiles.d/tmp.conf
-/usr/lib/tmpfiles.d/var.conf
-/usr/lib/tmpfiles.d/x11.conf
";

/// Makes in the folder `into`, of which nothing is there yet, what supermin is to be given instead of `parts`. Where they are
/// not as we know them they stay as they are. `scratch` is a folder for files on the way.
pub(crate) fn tune(parts: &Path, into: &Path, scratch: &Path) -> io::Result<()> {
    fs::create_dir(into)?;
    fs::create_dir(scratch)?;
    for entry in fs::read_dir(parts)? {
        let entry = entry?;
        let to = into.join(entry.file_name());
        if entry.file_name() != INIT_ARCHIVE || tune_init(&entry.path(), &to, scratch).is_none() {
            fs::copy(entry.path(), to)?;
        }
    }
    fs::write(into.join("diskmill-excludefiles"), LEFT_OUT)
}

/// Writes the archive `to` with the changed script; `None` if there is nothing to be changed in `from`, or no way to.
fn tune_init(from: &Path, to: &Path, scratch: &Path) -> Option<()> {
    tar(Command::new("tar").arg("-xzf").arg(from).arg("-C").arg(scratch))?;
    let script = scratch.join("init");
    fs::write(&script, tuned_script(&fs::read_to_string(&script).ok()?)?).ok()?;
    let names = fs::read_dir(scratch).ok()?.map(|entry| Some(entry.ok()?.file_name()));
    let names = names.collect::<Option<Vec<_>>>()?;
    tar(Command::new("tar").arg("-czf").arg(to).arg("-C").arg(scratch).args(names))
}

fn tuned_script(script: &str) -> Option<String> {
    let mut found = false;
    let mut lines: Vec<&str> = script.lines().collect();
    for line in lines.iter_mut().filter(|line| **line == TRIGGER) {
        *line = NARROW_TRIGGER;
        found = true;
    }
    found.then(|| lines.join("\n") + "\n")
}

fn tar(command: &mut Command) -> Option<()> {
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().ok()?;
    status.success().then_some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn the_script_is_changed_where_it_is_as_we_know_it() {
        let dir = tempfile::tempdir().unwrap();
        let [parts, other, into, scratch] =
            ["parts", "other", "into", "scratch"].map(|name| dir.path().join(name));
        fs::create_dir(&parts).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(parts.join("packages"), "bash\n").unwrap();
        let script = dir.path().join("init");
        fs::write(&script, "#!/bin/bash\necho one\nudevadm trigger\n  udevadm trigger\n").unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        let pack = |into: &Path| {
            let into = into.join(INIT_ARCHIVE);
            tar(Command::new("tar").arg("-czf").arg(into).arg("-C").arg(dir.path()).arg("init")).unwrap();
        };
        pack(&parts);
        tune(&parts, &into, &scratch).unwrap();
        assert_eq!(fs::read_to_string(into.join("packages")).unwrap(), "bash\n");
        let unpacked = dir.path().join("unpacked");
        fs::create_dir(&unpacked).unwrap();
        tar(Command::new("tar").arg("-xzf").arg(into.join(INIT_ARCHIVE)).arg("-C").arg(&unpacked)).unwrap();
        let changed = fs::read_to_string(unpacked.join("init")).unwrap();
        assert_eq!(changed, format!("#!/bin/bash\necho one\n{NARROW_TRIGGER}\n  udevadm trigger\n"));
        assert_eq!(fs::metadata(unpacked.join("init")).unwrap().permissions().mode() & 0o777, 0o755);

        fs::write(&script, "#!/bin/bash\nudevadm trigger --verbose\n").unwrap();
        pack(&other);
        fs::remove_dir_all(&into).unwrap();
        fs::remove_dir_all(&scratch).unwrap();
        tune(&other, &into, &scratch).unwrap();
        let [was, is] = [&other, &into].map(|dir| fs::read(dir.join(INIT_ARCHIVE)).unwrap());
        assert!(was == is);
    }
}
