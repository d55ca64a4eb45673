//! What the guest may find after a power failure.

use std::time::SystemTime;

use diskmill::edit::{Amendment, Preallocation, ZeroHow};
use diskmill::{Error, FormatInfo, Image, SnapshotRef};
use diskmill_testkit::{ModelDisk, Op, Step};

use crate::world::State;

/// One operation.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    Step(Step),
    Flush,
    Snapshot(String),
    Apply(String),
    Delete(String),
    Resize(u64, Preallocation),
    Amend(Amendment),
    /// What became of that: whether discards zero whole clusters.
    Amended(bool),
    Close,
}

impl Act {
    /// Whether it happens all at once, after all that came before, and is durable when it is done.
    const fn is_switch(&self) -> bool {
        matches!(self, Self::Snapshot(_) | Self::Apply(_) | Self::Delete(_))
    }

    /// Does it, unless it is to close the image.
    pub(crate) fn run(&self, image: &mut Image) -> Result<(), Error> {
        match self {
            Self::Step(step) => write(image, step),
            Self::Flush => image.flush(),
            Self::Snapshot(name) => image.create_snapshot(name, SystemTime::UNIX_EPOCH).map(drop),
            Self::Apply(name) => image.apply_snapshot(&SnapshotRef::Any(name.clone())),
            Self::Delete(name) => image.delete_snapshot(&SnapshotRef::Any(name.clone())),
            Self::Resize(size, how) => image.resize(*size, *how),
            Self::Amend(changes) => image.amend(changes),
            Self::Amended(_) | Self::Close => Ok(()),
        }
    }
}

pub(crate) fn write(image: &Image, step: &Step) -> Result<(), Error> {
    match step.op {
        Op::Write(_) => image.write_at(&step.bytes(), step.start),
        Op::Compressed(_) => match image.write_compressed(&step.bytes(), step.start) {
            // Not whole clusters, or an image that cannot have packed ones.
            Err(error) if matches!(error.kind(), diskmill::Kind::Invalid | diskmill::Kind::Unsupported) => {
                image.write_at(&step.bytes(), step.start)
            }
            done => done,
        },
        Op::Zero { unmap: false } => image.write_zeroes(step.start, step.len, ZeroHow::KeepAllocated),
        Op::Zero { unmap: true } => image.write_zeroes(step.start, step.len, ZeroHow::MayUnmap),
        Op::Discard => image.discard(step.start, step.len),
    }
}

pub(crate) fn content(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(image.size()).unwrap()];
    image.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// Whether discards zero whole clusters: version 2 has nothing to say so over a backing file.
pub(crate) fn discards(image: &Image) -> bool {
    let FormatInfo::Qcow2(info) = &image.info().specific else { panic!("it is qcow2") };
    info.area.header.version >= 3 || info.area.backing_name.is_none()
}

/// All that the guest can see.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) disk: ModelDisk,
    pub(crate) snapshots: Vec<(String, ModelDisk)>,
    /// See [`discards`].
    pub(crate) discards: bool,
}

impl Guest {
    pub(crate) fn apply(&mut self, act: &Act) {
        match act {
            Act::Step(step) => self.disk.apply(step),
            Act::Flush | Act::Close | Act::Amend(_) => {}
            Act::Amended(discards) => {
                self.discards = *discards;
                self.disk.set_discards(*discards);
            }
            Act::Snapshot(name) => self.snapshots.push((name.clone(), self.disk.clone())),
            Act::Apply(name) => {
                self.disk = self.snapshots.iter().find(|(other, _)| other == name).unwrap().1.clone();
                self.disk.set_discards(self.discards);
            }
            Act::Resize(size, _) => self.disk.resize(*size),
            Act::Delete(name) => self.snapshots.retain(|(other, _)| other != name),
        }
    }
}

/// What the guest saw after each operation; number 0 is the beginning.
pub(crate) struct History {
    guests: Vec<Guest>,
    acts: Vec<Act>,
    /// For each operation: the last one before it after which all was durable.
    floors: Vec<usize>,
}

impl History {
    pub(crate) fn new(guest: Guest) -> Self {
        // Opening the image is operation 0.
        Self { guests: vec![guest], acts: vec![Act::Flush], floors: vec![0] }
    }

    /// The number of the last operation.
    pub(crate) fn last(&self) -> usize {
        self.acts.len() - 1
    }

    pub(crate) fn now(&self) -> &Guest {
        self.guests.last().unwrap()
    }

    /// Notes an operation. Not that it ended well: after an error the bytes that it was to write may be old or new.
    pub(crate) fn note(&mut self, act: Act) {
        let mut guest = self.now().clone();
        guest.apply(&act);
        let last = self.acts.len() - 1;
        let durable = !matches!(self.acts[last], Act::Step(_) | Act::Amended(_));
        self.floors.push(if durable { last } else { self.floors[last] });
        self.guests.push(guest);
        self.acts.push(act);
    }

    /// Panics unless the guest may find this `state` after a power failure during `operation`.
    pub(crate) fn judge(&self, state: &State, operation: usize) {
        let floor = self.floors[operation];
        let image = state.open(None);
        let seen = content(&image);
        let names: Vec<String> = image
            .snapshots()
            .iter()
            .map(|snapshot| String::from_utf8(snapshot.name.clone()).unwrap())
            .collect();
        let all = &self.guests[floor..=operation];
        let may_be: Vec<&[Guest]> = match self.acts[operation].is_switch() {
            // Before it each byte may be old or new, after it none.
            true => vec![&all[..all.len() - 1], &all[all.len() - 1..]],
            false => vec![all],
        };
        let found = may_be.iter().filter(|guests| {
            let list = guests[0].snapshots.iter().map(|(name, _)| name);
            list.eq(&names)
        });
        let mut why = vec![format!("it has the snapshots {names:?}")];
        let fits = found.into_iter().any(|guests| {
            let disks: Vec<&[u8]> = guests.iter().map(|guest| guest.disk.bytes()).collect();
            let difference = first_foreign(&seen, &disks);
            why.extend(difference.clone());
            difference.is_none()
        });
        assert!(fits, "the guest finds what was never there: {why:?}");
        let snapshots = self.guests[floor..=operation].iter().flat_map(|guest| &guest.snapshots);
        for name in &names {
            let model = snapshots.clone().find(|(other, _)| other == name).unwrap();
            let seen = content(&state.open(Some(name)));
            let difference = first_foreign(&seen, &[model.1.bytes()]);
            assert!(difference.is_none(), "snapshot {name}: {difference:?}");
        }
    }

    /// As [`judge`](Self::judge), for a raw external data file.
    pub(crate) fn judge_raw(&self, data: &[u8], operation: usize) {
        let guests = &self.guests[self.floors[operation]..=operation];
        let mut data = data.to_vec();
        data.resize(guests[0].disk.bytes().len(), 0);
        let disks: Vec<&[u8]> = guests.iter().map(|guest| guest.disk.bytes()).collect();
        let difference = first_foreign(&data, &disks);
        assert!(difference.is_none(), "the raw data file: {difference:?}");
    }
}

/// Says where `seen` has a byte that none of `disks` has.
pub(crate) fn first_foreign(seen: &[u8], disks: &[&[u8]]) -> Option<String> {
    const SECTOR: usize = 512;
    let disks: Vec<&[u8]> = disks.iter().copied().filter(|disk| disk.len() == seen.len()).collect();
    if disks.is_empty() {
        return Some(format!("a disk of {} bytes", seen.len()));
    }
    for start in (0..seen.len()).step_by(SECTOR) {
        let sector = start..seen.len().min(start + SECTOR);
        if disks.iter().any(|disk| disk[sector.clone()] == seen[sector.clone()]) {
            continue;
        }
        for at in sector {
            if !disks.iter().any(|disk| disk[at] == seen[at]) {
                let wanted: Vec<u8> = disks.iter().map(|disk| disk[at]).collect();
                return Some(format!("guest offset {at:#x} reads {}, wanted one of {wanted:?}", seen[at]));
            }
        }
    }
    None
}
