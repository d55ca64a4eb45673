use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Cmd, is_root, require_program, scratch, skip};

/// A file system of its own in a file, mounted by a loop device (needs root). Unmounted when dropped.
pub struct Mounted {
    dir: TempDir,
}

impl Mounted {
    /// A fresh file system of `kind` (`xfs`, `btrfs`, `ext4`) with at most `size` bytes; `None`, said loudly, where
    /// that cannot be had.
    pub fn fresh(kind: &str, size: u64) -> Option<Self> {
        if !is_root() {
            skip("mounting needs root");
            return None;
        }
        let mkfs = require_program(&format!("mkfs.{kind}"))?;
        let mount = require_program("mount")?;
        let dir = scratch();
        let image = dir.path().join("image");
        let file = std::fs::File::create(&image).expect("a file for the file system");
        file.set_len(size).expect("its length");
        Cmd::new(mkfs).arg("-q").arg(&image).ok();
        std::fs::create_dir(dir.path().join("mnt")).expect("a folder to mount at");
        let made = Self { dir };
        let out = Cmd::new(mount).args(["-o", "loop"]).arg(&image).arg(made.path()).run();
        if out.code == Some(0) {
            return Some(made);
        }
        skip(&format!("cannot mount {kind}: {}", out.err().trim()));
        None
    }

    /// Where it is mounted.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("mnt")
    }

    /// Bytes in use, with all that was written on disk.
    pub fn used(&self) -> u64 {
        Cmd::new("sync").arg("-f").arg(self.path()).ok();
        let stat = rustix::fs::statvfs(self.path()).expect("the state of the file system");
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let at: &Path = &self.path();
        let _ = Cmd::new("umount").arg(at).run();
    }
}
