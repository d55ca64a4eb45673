//! What the machine and its kernel offer.

use std::fs::OpenOptions;
use std::path::Path;

use diskmill::{EngineChoice, EnginePlan};
use diskmill_guestfs::kvm::{self, Verdict};
use rustix::process::{Resource, getrlimit};

use super::programs::find;
use super::report::{Check, Topic, size};
use super::{DoctorArgs, Machine};
use crate::fs::defaults;
use crate::fs::memory::free;

/// What an appliance takes at boot, in bytes; below that nothing works.
const LEAST_MEMORY: u64 = 400 << 20;
/// Files that a session and a conversion of a long chain may have open.
const FILES: u64 = 512;
/// Bytes of locked memory below which io_uring may be refused on kernels before 5.12.
const LOCKED: u64 = 8 << 20;

pub(super) fn kvm(machine: &Machine, args: &DoctorArgs) -> Check {
    if machine.forced_by_user {
        return Check::ok(Topic::Kvm, "not used: LIBGUESTFS_BACKEND_SETTINGS has force_tcg");
    }
    let Some(qemu) = machine.qemu() else {
        return Check::note(Topic::Kvm, "not tried: QEMU is missing", "see `qemu`");
    };
    let slow = "appliances are emulated, which takes ten times as long";
    match kvm::verdict(&qemu, args.retest_kvm) {
        Verdict::Works { millis } => Check::ok(Topic::Kvm, format!("a machine boots in {millis} ms")),
        Verdict::TooSlow { limit_millis } => Check::note(
            Topic::Kvm,
            format!(
                "/dev/kvm is there, but a machine does not boot within {}.{} s: {slow}",
                limit_millis / 1000,
                limit_millis % 1000 / 100
            ),
            "nothing, if this is a virtual machine whose host does not nest well; --retest-kvm tries again",
        ),
        Verdict::Unusable { reason } if reason.contains("denied") => Check::note(
            Topic::Kvm,
            format!("{reason}: {slow}"),
            "`sudo usermod -aG kvm $USER` and log in again; in a container: `--device /dev/kvm --group-add` with its group",
        ),
        Verdict::Unusable { reason } => Check::note(
            Topic::Kvm,
            format!("{reason}: {slow}"),
            "switch virtualisation on (firmware, nested virtualisation of the host); in a container: `--device /dev/kvm`",
        ),
        Verdict::Unknown { reason } => {
            Check::note(Topic::Kvm, format!("cannot tell: {reason}"), "see `qemu`")
        }
        _ => Check::note(Topic::Kvm, "cannot tell", "see `qemu`"),
    }
}

pub(super) fn fuse() -> Check {
    let problem = |found: String, remedy: &str| {
        Check::note(Topic::Fuse, format!("{found}: `fs mount` does not work"), remedy)
    };
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        return problem(
            format!("/dev/fuse: {error}"),
            "`modprobe fuse`; in a container: `--device /dev/fuse --cap-add SYS_ADMIN`",
        );
    }
    match ["fusermount3", "fusermount"].into_iter().find_map(|name| find(Path::new(name))) {
        Some(path) => Check::ok(Topic::Fuse, format!("/dev/fuse, {}", path.display())),
        None => problem(
            "fusermount is not on PATH".to_owned(),
            "install it: `apt install fuse3` (Debian, Ubuntu), `dnf install fuse3` (Fedora, RHEL)",
        ),
    }
}

pub(super) fn memory(machine: &Machine) -> Check {
    let Some(free) = free() else {
        return Check::note(Topic::Memory, "/proc/meminfo does not tell", "mount /proc");
    };
    let wanted = machine.settings.memory_mib.unwrap_or_else(|| defaults::memory_mib(0, Some(free)));
    let wanted = u64::from(wanted) << 20;
    let found = format!("{} available, an appliance may take {}", size(free), size(wanted));
    if free < LEAST_MEMORY {
        Check::problem(
            Topic::Memory,
            found,
            format!("free at least {}, or raise the container's limit", size(LEAST_MEMORY)),
        )
    } else if free < wanted {
        let fits = (free >> 20).max(512);
        Check::note(
            Topic::Memory,
            found,
            format!("`--memsize {fits}` or LIBGUESTFS_MEMSIZE={fits}, if it is killed"),
        )
    } else {
        Check::ok(Topic::Memory, found)
    }
}

pub(super) fn io_uring() -> Check {
    let plan = EnginePlan::probe(EngineChoice::Uring, true);
    if !plan.refused {
        return Check::ok(Topic::IoUring, "the kernel makes a ring");
    }
    Check::note(
        Topic::IoUring,
        format!("{}: plain reads and writes are used instead", plan.reason),
        "only direct and device I/O gain from it; in a container: a seccomp profile that allows io_uring_*",
    )
}

pub(super) fn reflink(args: &DoctorArgs) -> Check {
    let path = args.path.display();
    if let Err(error) = args.path.metadata() {
        return Check::problem(
            Topic::Reflink,
            format!("{path}: {error}"),
            "name a folder that is there with --path",
        );
    }
    match diskmill::reflinks_in(&args.path) {
        Ok(()) => Check::ok(Topic::Reflink, format!("files in {path} can share blocks")),
        Err(error) => Check::note(
            Topic::Reflink,
            format!("{path}: {error}: conversions copy"),
            "nothing, or keep images on XFS, btrfs or bcachefs; --path looks elsewhere",
        ),
    }
}

pub(super) fn limits() -> Check {
    let limit = |resource| getrlimit(resource).current;
    let shown = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |value| value.to_string());
    let (files, locked, space) = (limit(Resource::Nofile), limit(Resource::Memlock), limit(Resource::As));
    let found = format!(
        "open files {}, locked memory {}, address space {}",
        shown(files),
        locked.map_or("unlimited".to_owned(), size),
        space.map_or("unlimited".to_owned(), size)
    );
    let low = |limit: Option<u64>, least: u64| limit.is_some_and(|limit| limit < least);
    if low(files, FILES) {
        Check::note(
            Topic::Limits,
            found,
            format!("`ulimit -n {FILES}` for long backing chains and many extents"),
        )
    } else if low(space, 4 << 30) {
        Check::note(Topic::Limits, found, "`ulimit -v unlimited`: QEMU maps more than it uses")
    } else if low(locked, LOCKED) {
        Check::note(Topic::Limits, found, "`ulimit -l 8192`, if io_uring is refused")
    } else {
        Check::ok(Topic::Limits, found)
    }
}
