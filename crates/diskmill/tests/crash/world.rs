//! An image on disks that remember what a power failure may leave of them.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use diskmill::{Image, ImageFile, OpenOptions, SnapshotRef};
use diskmill_io::{Align, Allocation, FaultyStorage, MemoryStorage, Moment, SharedStorage, Storage};

const LIMIT: u64 = 64 << 20;
/// Under these names the files know each other.
pub(crate) const IMAGE: &str = "a.qcow2";
pub(crate) const DATA: &str = "data.raw";
pub(crate) const BASE: &str = "base.qcow2";

/// An image with its external data file and its backing file, if there are such.
pub(crate) struct World {
    /// The image, and its external data file.
    disks: Vec<(&'static str, Arc<FaultyStorage>)>,
    base: Option<Arc<Vec<u8>>>,
    watch: Arc<Watch>,
}

/// What happened so far.
#[derive(Default)]
struct Watch {
    /// The operation that is going on.
    operation: AtomicUsize,
    disks: Mutex<Vec<Arc<FaultyStorage>>>,
    stops: Mutex<Vec<Stop>>,
}

/// A moment at which the power may fail: right before a barrier, when most is open.
#[derive(Clone)]
pub(crate) struct Stop {
    /// The operation that is going on.
    pub(crate) operation: usize,
    moments: Vec<Moment>,
}

impl Watch {
    fn stop(&self) {
        let moments = self.disks.lock().unwrap().iter().map(|disk| disk.moment()).collect();
        let operation = self.operation.load(Ordering::Relaxed);
        self.stops.lock().unwrap().push(Stop { operation, moments });
    }
}

impl World {
    /// Takes the files that are in `dir`.
    pub(crate) fn load(dir: &Path) -> Self {
        let mut disks = Vec::new();
        for name in [IMAGE, DATA] {
            let Ok(bytes) = std::fs::read(dir.join(name)) else { continue };
            let disk = Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::with_bytes(bytes, LIMIT))));
            disk.start_journal().unwrap();
            disks.push((name, disk));
        }
        let watch = Watch::default();
        watch.disks.lock().unwrap().extend(disks.iter().map(|(_, disk)| Arc::clone(disk)));
        Self { disks, base: std::fs::read(dir.join(BASE)).ok().map(Arc::new), watch: Arc::new(watch) }
    }

    pub(crate) fn open(&self) -> Image {
        let watched = |(name, disk): &(&str, Arc<FaultyStorage>)| {
            let storage = Arc::new(Watched { disk: Arc::clone(disk), watch: Arc::clone(&self.watch) });
            ImageFile { storage, path: name.into() }
        };
        open(self.disks.iter().map(watched).collect(), self.base.as_ref(), &writable())
    }

    /// The disks, the image first, to make them fail.
    pub(crate) fn disks(&self) -> impl Iterator<Item = &FaultyStorage> {
        self.disks.iter().map(|(_, disk)| &**disk)
    }

    /// Says which operation begins now.
    pub(crate) fn begin(&self, operation: usize) {
        self.watch.operation.store(operation, Ordering::Relaxed);
    }

    /// All moments before a barrier so far, and now.
    pub(crate) fn stops(&self) -> Vec<Stop> {
        self.watch.stop();
        self.watch.stops.lock().unwrap().clone()
    }

    /// What the power failure may leave: `max` states, fewer if there are no more.
    pub(crate) fn states(&self, stop: &Stop, seed: u64, max: usize) -> impl Iterator<Item = State> {
        let states =
            |(index, ((name, disk), moment)): (usize, (&(&'static str, Arc<FaultyStorage>), &Moment))| {
                let seed = seed ^ (index as u64) << 32;
                (
                    *name,
                    disk.crash_states_at(*moment, seed, max).map(|state| state.to_vec()).collect::<Vec<_>>(),
                )
            };
        let of_disks: Vec<_> = self.disks.iter().zip(&stop.moments).enumerate().map(states).collect();
        let count = of_disks.iter().map(|(_, states)| states.len()).max().unwrap_or(0);
        let base = self.base.clone();
        (0..count).map(move |turn| State {
            // A step that has no common divisor with the count brings the same states in another order.
            files: of_disks
                .iter()
                .zip([1, 3])
                .map(|((name, states), step)| (*name, states[turn * step % states.len()].clone()))
                .collect(),
            base: base.clone(),
        })
    }

    /// The disks as they are.
    pub(crate) fn now(&self) -> State {
        let bytes = |(name, disk): &(&'static str, Arc<FaultyStorage>)| (*name, read_all(&**disk));
        State { files: self.disks.iter().map(bytes).collect(), base: self.base.clone() }
    }
}

/// The files of an image that nobody writes to.
#[derive(Hash)]
pub(crate) struct State {
    files: Vec<(&'static str, Vec<u8>)>,
    base: Option<Arc<Vec<u8>>>,
}

impl State {
    pub(crate) fn open(&self, snapshot: Option<&str>) -> Image {
        let snapshot = snapshot.map(|name| SnapshotRef::Any(name.to_owned()));
        self.open_with(&OpenOptions { snapshot, ..OpenOptions::default() }).0
    }

    /// Copies of the files, opened for writing, and the image's own storage.
    pub(crate) fn open_writable(&self) -> (Image, SharedStorage) {
        self.open_with(&writable())
    }

    fn open_with(&self, options: &OpenOptions) -> (Image, SharedStorage) {
        let file = |(name, bytes): &(&str, Vec<u8>)| {
            let storage = Arc::new(MemoryStorage::with_bytes(bytes.clone(), LIMIT));
            ImageFile { storage, path: name.into() }
        };
        let files: Vec<ImageFile> = self.files.iter().map(file).collect();
        let own = Arc::clone(&files[0].storage);
        (open(files, self.base.as_ref(), options), own)
    }

    pub(crate) fn image(&self) -> &[u8] {
        &self.files[0].1
    }

    /// The external data file.
    pub(crate) fn data(&self) -> Option<&[u8]> {
        self.files.get(1).map(|(_, bytes)| bytes.as_slice())
    }

    /// Writes the image and its data file into `dir`.
    pub(crate) fn save(&self, dir: &Path) {
        for (name, bytes) in &self.files {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
    }
}

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn open(mut files: Vec<ImageFile>, base: Option<&Arc<Vec<u8>>>, options: &OpenOptions) -> Image {
    if let Some(base) = base {
        let storage = Arc::new(MemoryStorage::with_bytes(base.to_vec(), LIMIT));
        files.push(ImageFile { storage, path: BASE.into() });
    }
    Image::from_storages(&files, options).unwrap()
}

fn read_all(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    assert_eq!(storage.read_at(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

/// Notes the moment of each barrier.
struct Watched {
    disk: Arc<FaultyStorage>,
    watch: Arc<Watch>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.disk.fmt(f)
    }
}

impl Storage for Watched {
    fn read_at(&self, buf: &mut [u8], at: u64) -> io::Result<usize> {
        self.disk.read_at(buf, at)
    }

    fn write_at(&self, buf: &[u8], at: u64) -> io::Result<usize> {
        self.disk.write_at(buf, at)
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.watch.stop();
        self.disk.sync()
    }

    fn allocation(&self, at: u64) -> io::Result<Option<(Allocation, u64)>> {
        self.disk.allocation(at)
    }

    fn write_zeroes(&self, at: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        self.disk.write_zeroes(at, len, keep_allocated)
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        self.disk.allocate(at, len)
    }

    fn clone_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<()> {
        self.disk.clone_range(at, src, src_at, len)
    }

    fn copy_range(&self, at: u64, src: &dyn Storage, src_at: u64, len: u64) -> io::Result<u64> {
        self.disk.copy_range(at, src, src_at, len)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn align(&self) -> Align {
        self.disk.align()
    }
}
