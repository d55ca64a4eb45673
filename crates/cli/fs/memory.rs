//! Memory that programs may still take: what the machine has left, and what the control groups do.

use std::fs;
use std::path::{Path, PathBuf};

/// Bytes that this process and its children may still take; `None` where `/proc` does not tell.
pub(crate) fn free() -> Option<u64> {
    free_below(Path::new("/"))
}

fn free_below(root: &Path) -> Option<u64> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let free = available(&meminfo)?;
    Some(room(root).map_or(free, |room| room.min(free)))
}

/// `MemAvailable`, in bytes (proc(5)).
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control groups leave, in bytes: the least of our own group and those around it (cgroups(7); version 2:
/// `memory.max`, version 1: `memory.limit_in_bytes`). `None` without a limit.
fn room(root: &Path) -> Option<u64> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let paths = own.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let (base, files) = match controllers {
            "" => ("sys/fs/cgroup", &SECOND),
            list if list.split(',').any(|name| name == "memory") => ("sys/fs/cgroup/memory", &FIRST),
            _ => return None,
        };
        Some((root.join(base), path.trim_start_matches('/').to_owned(), files))
    });
    let groups = paths.flat_map(|(base, path, files)| {
        let own = base.join(path);
        // A path from outside of our namespace leads nowhere; the base is our own group then.
        let groups: Vec<PathBuf> =
            own.ancestors().take_while(|dir| dir.starts_with(&base)).map(Path::to_owned).collect();
        groups.into_iter().filter_map(|group| files.room(&group))
    });
    groups.min()
}

/// The names of a control group's files.
struct Files {
    limit: &'static str,
    used: &'static str,
    /// The line of `memory.stat` with the page cache that goes first where memory is short.
    cache: &'static str,
}

const SECOND: Files = Files { limit: "memory.max", used: "memory.current", cache: "inactive_file" };
const FIRST: Files =
    Files { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", cache: "total_inactive_file" };

impl Files {
    fn room(&self, group: &Path) -> Option<u64> {
        let read = |name| fs::read_to_string(group.join(name)).ok();
        let number = |name| read(name)?.trim().parse::<u64>().ok();
        // "max" is no number, and no limit.
        let (limit, used) = (number(self.limit)?, number(self.used)?);
        let stat = read("memory.stat").unwrap_or_default();
        let cache = stat.lines().find_map(|line| line.strip_prefix(self.cache)?.trim().parse::<u64>().ok());
        Some(limit.saturating_sub(used.saturating_sub(cache.unwrap_or(0))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A machine with 8 GiB available and these files.
    fn machine(files: &[(&str, &str)]) -> Option<u64> {
        let root = tempfile::tempdir().unwrap();
        let all = [("proc/meminfo", "MemTotal: 9 kB\nMemAvailable:  8388608 kB\n")];
        for (path, text) in all.iter().chain(files) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        free_below(root.path())
    }

    #[test]
    fn the_least_of_all_limits_counts() {
        assert_eq!(machine(&[]), Some(8 * GIB));
        let own = ("proc/self/cgroup", "0::/a/b\n");
        let none =
            [own, ("sys/fs/cgroup/a/b/memory.max", "max\n"), ("sys/fs/cgroup/a/b/memory.current", "5\n")];
        assert_eq!(machine(&none), Some(8 * GIB));
        let outer = [
            ("sys/fs/cgroup/a/memory.max", "3221225472\n"),
            ("sys/fs/cgroup/a/memory.current", "2147483648\n"),
        ];
        assert_eq!(machine(&[&none[..], &outer].concat()), Some(GIB));
        // The page cache of the group can be had.
        let cache = [("sys/fs/cgroup/a/memory.stat", "anon 7\ninactive_file 1073741824\n")];
        assert_eq!(machine(&[&none[..], &outer, &cache].concat()), Some(2 * GIB));
        // Used up, and more than that.
        let full = [own, ("sys/fs/cgroup/a/memory.max", "1\n"), ("sys/fs/cgroup/a/memory.current", "9\n")];
        assert_eq!(machine(&full), Some(0));
        // Inside a container the path may be that of the host.
        let inside = [
            ("proc/self/cgroup", "0::/docker/x\n"),
            ("sys/fs/cgroup/memory.max", "1073741824\n"),
            ("sys/fs/cgroup/memory.current", "0\n"),
        ];
        assert_eq!(machine(&inside), Some(GIB));
    }

    #[test]
    fn the_first_version_is_read_too() {
        let own = ("proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/docker/x\n0::/\n");
        let group = "sys/fs/cgroup/memory/docker/x";
        let files = |limit: &str| {
            [
                ("memory.limit_in_bytes", limit),
                ("memory.usage_in_bytes", "1073741824\n"),
                ("memory.stat", "total_inactive_file 0\n"),
            ]
            .map(|(name, text)| (format!("{group}/{name}"), text.to_owned()))
        };
        for (limit, want) in [("2147483648\n", GIB), ("9223372036854771712\n", 8 * GIB)] {
            let files = files(limit);
            let files = files.iter().map(|(path, text)| (path.as_str(), text.as_str()));
            assert_eq!(machine(&[own].into_iter().chain(files).collect::<Vec<_>>()), Some(want), "{limit}");
        }
    }

    #[test]
    fn meminfo_is_read() {
        assert_eq!(available("MemTotal: 3 kB\nMemAvailable:   2048 kB\n"), Some(2 << 20));
        for wrong in
            ["", "MemAvailable: x kB\n", "MemAvailable: 5\n", "MemAvailable: 99999999999999999999 kB"]
        {
            assert_eq!(available(wrong), None, "{wrong}");
        }
    }
}
