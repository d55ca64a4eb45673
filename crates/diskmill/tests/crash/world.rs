//! Images on disks that remember what a power failure may leave of them.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use diskmill::{Image, ImageFile, OpenOptions, Secret, SnapshotRef};
use diskmill_io::{FaultyStorage, MemoryStorage, Moment, SharedStorage, Storage};

const LIMIT: u64 = 64 << 20;
/// Under these names the files know each other.
pub(crate) const IMAGE: &str = "a.qcow2";
pub(crate) const DATA: &str = "data.raw";
pub(crate) const BASE: &str = "base.qcow2";
/// Other names of files, which images may be given.
const ALIASES: [(&str, &str); 3] =
    [(DATA, RENAMED), (BASE, "./base.qcow2"), ("bottom.qcow2", "./bottom.qcow2")];
pub(crate) const RENAMED: &str = "renamed.raw";
/// The passphrase of encrypted images.
pub(crate) const KEY: &str = "correct horse";

type Bytes = Arc<Vec<u8>>;

/// The files of an image and of its chain; the image itself is the first one.
pub(crate) struct World {
    /// Those that are written to.
    disks: Vec<(&'static str, Arc<FaultyStorage>)>,
    /// Those that nobody may change.
    fixed: Vec<(&'static str, Bytes)>,
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
    /// Takes those of the files that are in `dir`.
    pub(crate) fn load(dir: &Path, written: &[&'static str], fixed: &[&'static str]) -> Self {
        let watch = Arc::new(Watch::default());
        let mut disks = Vec::new();
        for &name in written {
            let Ok(bytes) = std::fs::read(dir.join(name)) else { continue };
            let disk = Arc::new(FaultyStorage::new(Arc::new(MemoryStorage::with_bytes(bytes, LIMIT))));
            disk.start_journal().unwrap();
            let weak = Arc::downgrade(&watch);
            disk.before_sync(move || weak.upgrade().unwrap().stop());
            disks.push((name, disk));
        }
        watch.disks.lock().unwrap().extend(disks.iter().map(|(_, disk)| Arc::clone(disk)));
        let bytes = |&name: &&'static str| Some((name, Arc::new(std::fs::read(dir.join(name)).ok()?)));
        Self { disks, fixed: fixed.iter().filter_map(bytes).collect(), watch }
    }

    pub(crate) fn open(&self) -> Image {
        Image::from_storages(&self.files(), &writable()).unwrap()
    }

    /// The files as they are now; what is written to them is remembered.
    pub(crate) fn files(&self) -> Vec<ImageFile> {
        let disk = |(name, disk): &(&str, Arc<FaultyStorage>)| {
            let storage = Arc::clone(disk) as SharedStorage;
            ImageFile { storage, path: name.into() }
        };
        let fixed = |(name, bytes): &(&str, Bytes)| {
            let disk = FaultyStorage::new(memory(bytes));
            disk.fail_writes(0..u64::MAX);
            ImageFile { storage: Arc::new(disk), path: name.into() }
        };
        with_aliases(self.disks.iter().map(disk).chain(self.fixed.iter().map(fixed)).collect())
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
                let states = disk.crash_states_at(*moment, seed, max);
                (*name, states.map(|state| Arc::new(state.to_vec())).collect::<Vec<_>>())
            };
        let of_disks: Vec<_> = self.disks.iter().zip(&stop.moments).enumerate().map(states).collect();
        let count = of_disks.iter().map(|(_, states)| states.len()).max().unwrap_or(0);
        let fixed = self.fixed.clone();
        (0..count).map(move |turn| State {
            // A step that has no common divisor with the count brings the same states in another order.
            files: of_disks
                .iter()
                .zip([1, 3, 7])
                .map(|((name, states), step)| (*name, Arc::clone(&states[turn * step % states.len()])))
                .collect(),
            fixed: fixed.clone(),
        })
    }

    /// The disks as they are.
    pub(crate) fn now(&self) -> State {
        let bytes = |(name, disk): &(&'static str, Arc<FaultyStorage>)| (*name, Arc::new(read_all(&**disk)));
        State { files: self.disks.iter().map(bytes).collect(), fixed: self.fixed.clone() }
    }
}

/// The same files when nobody writes to them.
#[derive(Hash)]
pub(crate) struct State {
    files: Vec<(&'static str, Bytes)>,
    fixed: Vec<(&'static str, Bytes)>,
}

impl State {
    pub(crate) fn open(&self, snapshot: Option<&str>) -> Image {
        self.open_file(IMAGE, snapshot)
    }

    /// Opens another file of the chain.
    pub(crate) fn open_file(&self, name: &str, snapshot: Option<&str>) -> Image {
        let snapshot = snapshot.map(|name| SnapshotRef::Any(name.to_owned()));
        let mut files = self.copies();
        let first = files.iter().position(|file| file.path == Path::new(name)).unwrap();
        files.swap(0, first);
        Image::from_storages(&files, &OpenOptions { snapshot, writable: false, ..writable() }).unwrap()
    }

    /// Copies of the files, first those that were written to.
    pub(crate) fn copies(&self) -> Vec<ImageFile> {
        let file = |(name, bytes): &(&str, Bytes)| ImageFile { storage: memory(bytes), path: name.into() };
        with_aliases(self.files.iter().chain(&self.fixed).map(file).collect())
    }

    /// What became of these copies.
    pub(crate) fn after(&self, copies: &[ImageFile]) -> Self {
        let bytes = |((name, _), copy): (&(&'static str, Bytes), &ImageFile)| {
            (*name, Arc::new(read_all(&*copy.storage)))
        };
        Self { files: self.files.iter().zip(copies).map(bytes).collect(), fixed: self.fixed.clone() }
    }

    pub(crate) fn image(&self) -> &[u8] {
        &self.files[0].1
    }

    /// Those that were written to.
    pub(crate) fn written(&self) -> impl Iterator<Item = (&'static str, &[u8])> {
        self.files.iter().map(|(name, bytes)| (*name, bytes.as_slice()))
    }

    /// The external data file.
    pub(crate) fn data(&self) -> Option<&[u8]> {
        self.written().find(|(name, _)| *name == DATA).map(|(_, bytes)| bytes)
    }

    /// Writes the files into `dir`, but for those that nobody changed.
    pub(crate) fn save(&self, dir: &Path) {
        for (name, bytes) in &self.files {
            std::fs::write(dir.join(name), bytes.as_slice()).unwrap();
            for (_, alias) in ALIASES.iter().filter(|(of, _)| of == name) {
                std::fs::write(dir.join(alias), bytes.as_slice()).unwrap();
            }
        }
    }
}

fn with_aliases(mut files: Vec<ImageFile>) -> Vec<ImageFile> {
    for (name, alias) in ALIASES {
        let file = files.iter().find(|file| file.path == Path::new(name)).cloned();
        files.extend(file.map(|file| ImageFile { path: alias.into(), ..file }));
    }
    files
}

pub(crate) fn writable() -> OpenOptions {
    OpenOptions { writable: true, keys: vec![Secret::new(KEY.as_bytes().to_vec())], ..OpenOptions::default() }
}

fn memory(bytes: &Bytes) -> SharedStorage {
    Arc::new(MemoryStorage::with_bytes(bytes.to_vec(), LIMIT))
}

pub(crate) fn read_all(storage: &dyn Storage) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(storage.len().unwrap()).unwrap()];
    assert_eq!(storage.read_at(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}
