//! Several threads write into one image. Each has bytes of its own, whose borders lie inside clusters that it shares with
//! others, and must always read there what it wrote; the storage makes them meet.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "test code"
)]

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use diskmill::check::{CheckOptions, check_storage};
use diskmill::convert::TargetFormat;
use diskmill::create::{CreateOptions, create};
use diskmill::edit::ZeroHow;
use diskmill::{Allocation, Image, MemoryStorage, OpenOptions, Secret, SharedStorage, SnapshotRef, Storage};
use diskmill_io::Align;
use diskmill_testkit::content::{Pattern, Rng, fill};
use diskmill_testkit::scratch;

const THREADS: usize = 4;
const SIZE: usize = 600 << 10;
const ROUNDS: usize = 6;
/// What each thread does in a round.
const OPERATIONS: usize = 250;

/// A storage on which threads often lose their turn, and whose barriers take their time.
#[derive(Debug)]
struct Slow {
    inner: MemoryStorage,
    turn: AtomicU64,
    barrier: Duration,
    /// In a barrier, and a barrier has ended.
    during: AtomicBool,
    after: AtomicBool,
}

impl Slow {
    fn new(bytes: Vec<u8>, barrier: Duration) -> Self {
        let inner = MemoryStorage::with_bytes(bytes, 64 << 20);
        let (during, after) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { inner, turn: AtomicU64::new(0), barrier, during, after }
    }

    fn pause(&self) {
        if self.turn.fetch_add(1, Ordering::Relaxed).is_multiple_of(3) {
            thread::yield_now();
        }
    }
}

impl Storage for Slow {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.pause();
        self.inner.read_at(buf, at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        self.pause();
        // In two parts, so that others see the one without the other.
        let (first, second) = buf.split_at(buf.len() / 2);
        let done = self.inner.write_at(first, at)?;
        if done < first.len() || second.is_empty() {
            return Ok(done);
        }
        self.pause();
        Ok(done + self.inner.write_at(second, at + done as u64)?)
    }

    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.during.store(true, Ordering::SeqCst);
        thread::sleep(self.barrier);
        self.after.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        self.inner.allocation(at)
    }

    fn write_zeroes(&self, at: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        self.pause();
        self.inner.write_zeroes(at, len, keep_allocated)
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.inner.allocate(at, len)
    }

    fn clone_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<()> {
        self.inner.clone_range(at, src, src_at, len)
    }

    fn copy_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<u64> {
        self.inner.copy_range(at, src, src_at, len)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        self.inner.align()
    }
}

fn writable() -> OpenOptions {
    OpenOptions { writable: true, keys: vec![key()], ..OpenOptions::default() }
}

fn key() -> Secret {
    Secret::new(b"correct horse".to_vec())
}

fn empty(options: &[(&str, &str)]) -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("a");
    let mut format = TargetFormat::named("qcow2").unwrap();
    options.iter().for_each(|(name, value)| format.set(name, value).unwrap());
    if let TargetFormat::Qcow2(qcow2) = &mut format
        && let Some(encryption) = &mut qcow2.encryption
    {
        encryption.key = Some(key());
    }
    create(&path, &CreateOptions { format, size: SIZE as u64, trust_backing: false }).unwrap();
    std::fs::read(path).unwrap()
}

/// The stretches of bytes that belong to each thread: short ones, in turn.
fn shares(rng: &mut Rng) -> Vec<Vec<(usize, usize)>> {
    let mut shares = vec![Vec::new(); THREADS];
    let mut at = 0;
    for turn in 0.. {
        let end = (at + 1 + rng.below(9000)).min(SIZE);
        shares[turn % THREADS].push((at, end));
        if end == SIZE {
            break;
        }
        at = end;
    }
    shares
}

/// One thread's work in its share. Returns what the disk holds there afterwards, as `disk`.
fn work(image: &Image, share: &[(usize, usize)], mut disk: Vec<u8>, seed: u64, cluster: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    for turn in 0..OPERATIONS {
        let (first, end) = share[rng.below(share.len())];
        let start = first + rng.below(end - first);
        let len = 1 + rng.below(end - start);
        let (range, at) = (start..start + len, start as u64);
        match rng.below(16) {
            0..=6 => {
                let bytes = fill(Pattern::Random, rng.next_u64(), len);
                image.write_at(&bytes, at).unwrap();
                disk[range].copy_from_slice(&bytes);
            }
            7..=9 => {
                let how = if turn % 2 == 0 { ZeroHow::MayUnmap } else { ZeroHow::KeepAllocated };
                image.write_zeroes(at, len as u64, how).unwrap();
                disk[range].fill(0);
            }
            10 => {
                image.discard(at, len as u64).unwrap();
                let (start, end) = (
                    start.next_multiple_of(cluster),
                    match start + len {
                        SIZE => SIZE,
                        end => end / cluster * cluster,
                    },
                );
                if start < end {
                    disk[start..end].fill(0);
                }
            }
            11 => image.flush().unwrap(),
            _ => {
                let mut bytes = vec![0; end - first];
                image.read_at(&mut bytes, first as u64).unwrap();
                assert!(
                    bytes == disk[first..end],
                    "turn {turn}: {first}..{end} is not what was written there"
                );
            }
        }
    }
    disk
}

fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn stress(options: &[(&str, &str)], cluster: usize) {
    let slow = Arc::new(Slow::new(empty(options), Duration::ZERO));
    let storage: SharedStorage = Arc::clone(&slow) as SharedStorage;
    let mut image = Image::from_storage(storage, "a", &writable()).unwrap();
    let mut disk = vec![0; SIZE];
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    let mut rng = Rng::new(cluster as u64);
    for round in 0..ROUNDS {
        let shares = shares(&mut rng);
        let seed = rng.next_u64();
        let shared = &image;
        let works = thread::scope(|scope| {
            let mut works = Vec::new();
            for (number, share) in shares.iter().enumerate() {
                let (disk, seed) = (disk.clone(), seed + number as u64);
                works.push(scope.spawn(move || work(shared, share, disk, seed, cluster)));
            }
            let reader = scope.spawn(|| (0..20).for_each(|_| drop(content(shared))));
            let works: Vec<Vec<u8>> = works.into_iter().map(|work| work.join().unwrap()).collect();
            reader.join().unwrap();
            works
        });
        for (share, work) in shares.iter().zip(works) {
            share.iter().for_each(|&(start, end)| disk[start..end].copy_from_slice(&work[start..end]));
        }
        assert!(content(&image) == disk, "round {round}");
        match round % 3 {
            0 | 1 => {
                let name = format!("s{round}");
                image.create_snapshot(&name, SystemTime::UNIX_EPOCH).unwrap();
                snapshots.push((name, disk.clone()));
            }
            _ => {
                let (gone, _) = snapshots.remove(0);
                image.delete_snapshot(&SnapshotRef::Any(gone)).unwrap();
                let (name, old) = snapshots[0].clone();
                image.apply_snapshot(&SnapshotRef::Any(name)).unwrap();
                disk = old;
            }
        }
        assert!(content(&image) == disk, "round {round}, after a snapshot");
    }
    image.close().unwrap();
    let mut found = Vec::new();
    let report =
        check_storage(&*slow, &CheckOptions::default(), &mut |_, finding| found.push(finding.to_string()));
    assert_eq!(report.unwrap().exit_code(), 0, "{found:#?}");
    for (name, disk) in &snapshots {
        let snapshot = Some(SnapshotRef::Any(name.clone()));
        let options = OpenOptions { snapshot, writable: false, ..writable() };
        let storage: SharedStorage = Arc::clone(&slow) as SharedStorage;
        assert!(content(&Image::from_storage(storage, "a", &options).unwrap()) == *disk, "snapshot {name}");
    }
}

#[test]
fn threads_share_small_clusters() {
    stress(&[("cluster_size", "512")], 512);
}

#[test]
fn threads_share_clusters() {
    stress(&[("cluster_size", "8k")], 8 << 10);
}

#[test]
fn threads_share_large_clusters() {
    stress(&[], 64 << 10);
}

#[test]
fn threads_share_subclusters() {
    stress(&[("cluster_size", "32k"), ("extended_l2", "on")], 32 << 10);
}

const ENCRYPTED: &[(&str, &str)] = &[("encrypt.format", "luks"), ("encrypt.iter-time", "5")];

#[test]
fn threads_share_encrypted_clusters() {
    stress(ENCRYPTED, 64 << 10);
}

/// Encrypted sectors can only be written whole: what another thread has there must not be lost.
#[test]
fn threads_share_encrypted_sectors() {
    let storage: SharedStorage = Arc::new(Slow::new(empty(ENCRYPTED), Duration::ZERO));
    let image = Image::from_storage(storage, "a", &writable()).unwrap();
    image.write_at(&[9; 1024], 0).unwrap();
    thread::scope(|scope| {
        for number in 0..THREADS {
            let image = &image;
            scope.spawn(move || {
                let (at, len) = (number * 100 + 300, 100);
                for turn in 0..200 {
                    image.write_at(&vec![turn; len], at as u64).unwrap();
                    let mut bytes = vec![0; len];
                    image.read_at(&mut bytes, at as u64).unwrap();
                    assert!(bytes.iter().all(|&byte| byte == turn), "thread {number}, turn {turn}");
                }
            });
        }
    });
    let seen = content(&image);
    assert!(seen[300..700].iter().all(|&byte| byte == 199));
    assert!(seen[..300].iter().chain(&seen[700..1024]).all(|&byte| byte == 9));
}

/// A flush that finds all written data on its way is not done before it has arrived.
#[test]
fn a_flush_waits_for_the_barrier_of_another() {
    for bytes in [vec![0; SIZE], empty(&[])] {
        let slow = Arc::new(Slow::new(bytes, Duration::from_millis(100)));
        let storage: SharedStorage = Arc::clone(&slow) as SharedStorage;
        let image = Image::from_storage(storage, "a", &writable()).unwrap();
        image.write_at(&[1; 512], 0).unwrap();
        image.flush().unwrap();
        image.write_at(&[2; 512], 0).unwrap();
        slow.during.store(false, Ordering::SeqCst);
        slow.after.store(false, Ordering::SeqCst);
        thread::scope(|scope| {
            scope.spawn(|| image.flush().unwrap());
            while !slow.during.load(Ordering::SeqCst) {
                thread::yield_now();
            }
            image.flush().unwrap();
            assert!(slow.after.load(Ordering::SeqCst), "the bytes were still on their way");
        });
        image.close().unwrap();
    }
}
