//! Files and block devices as the file systems of this machine have them.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use diskmill_io::{Allocation, Buf, FileStorage, OpenHow, Storage};

const RW: OpenHow = OpenHow { read: true, write: true, create_new: false, direct: false };
const NEW: OpenHow = OpenHow { create_new: true, ..RW };

/// A directory on the disk, and one on tmpfs where there is one.
fn places() -> Vec<tempfile::TempDir> {
    let mut places = vec![tempfile::tempdir().unwrap()];
    if Path::new("/dev/shm").is_dir() {
        places.extend(tempfile::tempdir_in("/dev/shm"));
    }
    places
}

fn runs(storage: &dyn Storage) -> Vec<(Allocation, u64)> {
    let mut runs = Vec::new();
    let mut at = 0;
    while let Some((kind, end)) = storage.allocation(at).unwrap() {
        assert!(end > at);
        runs.push((kind, end));
        at = end;
    }
    runs
}

fn content(storage: &dyn Storage) -> Vec<u8> {
    let mut buf = vec![0xee; storage.len().unwrap() as usize];
    let mut at = 0;
    while at < buf.len() {
        let n = storage.read_at(&mut buf[at..], at as u64).unwrap();
        assert!(n > 0);
        at += n;
    }
    buf
}

#[test]
fn holes_are_seen_and_made() {
    use Allocation::{Data, Hole};
    const M: u64 = 1 << 20;
    for dir in places() {
        let file = FileStorage::open(dir.path().join("f"), &NEW).unwrap();
        assert_eq!(runs(&file), []);
        file.set_len(4 * M).unwrap();
        assert_eq!(runs(&file), [(Hole, 4 * M)]);
        file.write_at(&vec![7; 2 * M as usize], M).unwrap();
        assert_eq!(runs(&file), [(Hole, M), (Data, 3 * M), (Hole, 4 * M)]);
        assert_eq!(file.allocation(M + 5).unwrap(), Some((Data, 3 * M)));
        assert_eq!(file.allocation(4 * M).unwrap(), None);
        assert_eq!(file.allocation(u64::MAX).unwrap(), None);

        file.write_zeroes(M + M / 2, M / 2, false).unwrap();
        assert_eq!(runs(&file), [(Hole, M), (Data, M + M / 2), (Hole, 2 * M), (Data, 3 * M), (Hole, 4 * M)]);
        // Not even a page: the bytes are zeros all the same.
        file.write_zeroes(2 * M + 10, 10, false).unwrap();
        file.write_zeroes(2 * M + 30, 10, true).unwrap();
        let bytes = content(&file);
        let expected = |i: u64| match i {
            i if i < M || (M + M / 2..2 * M).contains(&i) || i >= 3 * M => 0,
            i if (2 * M + 10..2 * M + 20).contains(&i) || (2 * M + 30..2 * M + 40).contains(&i) => 0,
            _ => 7,
        };
        assert!(bytes.iter().zip(0..).all(|(&b, i)| b == expected(i)));
    }
}

#[test]
fn zeroing_grows_and_reserves() {
    for dir in places() {
        let path = dir.path().join("f");
        let file = FileStorage::open(&path, &NEW).unwrap();
        file.write_zeroes(5000, 1 << 20, false).unwrap();
        assert_eq!(file.len().unwrap(), 5000 + (1 << 20));
        // The block that the end lies in may stay.
        assert!(fs::metadata(&path).unwrap().blocks() <= 8);
        file.write_zeroes(0, 1 << 21, true).unwrap();
        assert_eq!(file.len().unwrap(), 1 << 21);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 21);
        assert!(content(&file).iter().all(|&b| b == 0));
        file.allocate(1 << 21, 1 << 20).unwrap();
        assert_eq!(file.len().unwrap(), 3 << 20);
        assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 3 << 20);
        file.write_zeroes(u64::MAX, 0, false).unwrap();
        assert_eq!(file.write_zeroes(u64::MAX, 2, false).unwrap_err().kind(), ErrorKind::InvalidInput);
        assert_eq!(file.write_zeroes(1, i64::MAX as u64, false).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

/// Growing by zeros must not cut off what another thread appends at the same time.
#[test]
fn growing_by_zeros_never_shrinks() {
    const CHUNK: u64 = 4096;
    const COUNT: u64 = 20_000;
    let dir = tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).unwrap();
    let file = FileStorage::open(dir.path().join("f"), &NEW).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            (0..COUNT).step_by(2).for_each(|i| file.write_zeroes(i * CHUNK, CHUNK, false).unwrap())
        });
        scope.spawn(|| {
            for i in (1..COUNT).step_by(2) {
                assert_eq!(file.write_at(&[1; CHUNK as usize], i * CHUNK).unwrap() as u64, CHUNK);
            }
        });
    });
    let bytes = content(&file);
    assert_eq!(bytes.len() as u64, COUNT * CHUNK);
    let wrong = bytes.iter().zip(0u64..).find(|&(&b, i)| u64::from(b) != i / CHUNK % 2);
    assert_eq!(wrong, None);
}

#[test]
fn only_files_and_block_devices_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let cases: [(PathBuf, &str); 4] = [
        (fifo, "a FIFO"),
        (socket, "a socket"),
        (dir.path().to_owned(), "a directory"),
        ("/dev/zero".into(), "a character device"),
    ];
    for (path, word) in cases {
        for how in
            [RW, OpenHow { read: true, ..OpenHow::default() }, OpenHow { write: true, ..OpenHow::default() }]
        {
            let error = FileStorage::open(&path, &how).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{path:?}");
            assert!(error.to_string().contains(word), "{error}");
        }
    }
    let missing = FileStorage::open(dir.path().join("none"), &RW).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    File::create(dir.path().join("there")).unwrap();
    let taken = FileStorage::open(dir.path().join("there"), &NEW).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AlreadyExists);
}

#[test]
fn direct_files_take_any_access() {
    let dir = tempfile::tempdir().unwrap();
    let how = OpenHow { direct: true, ..NEW };
    let file = match FileStorage::open(dir.path().join("f"), &how) {
        Err(e) if e.kind() == ErrorKind::Unsupported => {
            assert!(!dir.path().join("f").exists());
            return eprintln!("skipped: {e}");
        }
        result => result.unwrap(),
    };
    let align = file.align();
    assert!(align.offset >= 512 && align.offset.is_power_of_two() && align.memory.is_power_of_two());
    let mut buf = Buf::new(16384).unwrap();
    buf.fill(3);
    assert_eq!(file.write_at(&buf, 0).unwrap(), 16384);
    // Bytes before, across and after the aligned part.
    assert_eq!(file.write_at(&[4; 100], 16380).unwrap(), 100);
    assert_eq!(file.read_at(&mut buf[1..4], 16379).unwrap(), 3);
    assert_eq!(buf[1..4], [3, 4, 4]);
    assert_eq!(file.read_at(&mut buf, 0).unwrap(), 16384);
    assert_eq!(buf[16379..], [3, 4, 4, 4, 4]);
    assert_eq!(file.len().unwrap(), 16480);
    assert_eq!(file.read_at(&mut buf[..100], 16400).unwrap(), 80);
    file.sync().unwrap();
}

#[test]
fn ranges_are_copied_and_cloned_where_the_system_can() {
    for dir in places() {
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let (a, b) = (FileStorage::open(a, &NEW).unwrap(), FileStorage::open(b, &NEW).unwrap());
        let data: Vec<u8> = (0..100_000u32).map(|i| (i % 253) as u8).collect();
        a.write_at(&data, 0).unwrap();
        let mut done = 0;
        while done < 99_000 {
            match b.copy_range(500 + done, &a, 1000 + done, 99_000 - done) {
                Ok(n) => {
                    assert!(n > 0);
                    done += n;
                }
                Err(e) => return assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}"),
            }
        }
        assert!(content(&b)[500..] == data[1000..]);
        assert_eq!(b.copy_range(0, &a, 100_000, 10).unwrap(), 0);
        b.clone_range(0, &a, 0, 0).unwrap();
        match b.clone_range(0, &a, 0, 65536) {
            Ok(()) => assert!(content(&b)[..65536] == data[..65536]),
            Err(e) => assert_eq!(e.kind(), ErrorKind::Unsupported, "{e}"),
        }
    }
}

struct Loop(String);

impl Loop {
    /// A loop device on `file`; `None` where that takes rights we lack.
    fn new(file: &Path) -> Option<Loop> {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        out.status.success().then(|| Loop(String::from_utf8(out.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let Some(device) = Loop::new(&path) else { return eprintln!("skipped: no loop device") };
    for direct in [false, true] {
        let disk = FileStorage::open(&device.0, &OpenHow { direct, ..RW }).unwrap();
        assert!(disk.is_block_device());
        assert_eq!(disk.len().unwrap(), 8 << 20);
        assert_eq!(runs(&disk), [(Allocation::Data, 8 << 20)]);
        disk.set_len(1 << 20).unwrap();
        assert_eq!(disk.set_len((8 << 20) + 1).unwrap_err().kind(), ErrorKind::Unsupported);
        let mut ones = Buf::new(1 << 20).unwrap();
        for keep in [false, true] {
            ones.fill(1);
            disk.write_at(&ones, 1 << 20).unwrap();
            // Edges inside a sector.
            disk.write_zeroes((1 << 20) + 100, 500_000, keep).unwrap();
            disk.write_zeroes((1 << 20) + 600_000, 5, keep).unwrap();
            let bytes = &content(&disk)[1 << 20..2 << 20];
            let zero = |i: usize| (100..500_100).contains(&i) || (600_000..600_005).contains(&i);
            assert!(
                bytes.iter().enumerate().all(|(i, &b)| b == u8::from(!zero(i))),
                "direct {direct} keep {keep}"
            );
        }
        assert!(disk.write_zeroes((8 << 20) - 10, 20, false).is_err());
        disk.sync().unwrap();
    }
}
