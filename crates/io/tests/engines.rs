//! The engines do the same, whatever the batch.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use diskmill_io::{
    Batch, Buf, Direction, Done, Engine, EngineChoice, EnginePlan, FaultyStorage, FileStorage, Full,
    MemoryStorage, OpenHow, Piece, SharedStorage, SyncEngine, UringEngine,
};

const NEW: OpenHow = OpenHow { read: true, write: true, create_new: true, direct: false };

/// The engines that this machine has.
fn engines(depth: usize) -> Vec<Box<dyn Engine>> {
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(SyncEngine::new())];
    match UringEngine::new(depth) {
        Ok(engine) => engines.push(Box::new(engine)),
        Err(e) => eprintln!("io_uring skipped: {e}"),
    }
    engines
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n
    }
}

fn file(dir: &Path, name: &str, direct: bool) -> SharedStorage {
    match FileStorage::open(dir.join(name), &OpenHow { direct, ..NEW }) {
        Err(e) if direct && e.kind() == ErrorKind::Unsupported => file(dir, name, false),
        result => Arc::new(result.unwrap()),
    }
}

fn run(engine: &mut dyn Engine, direction: Direction, pieces: Vec<Piece>, buf: Buf) -> Done {
    engine.submit(Batch { direction, pieces }, buf, 42).unwrap();
    let mut out = Vec::new();
    engine.reap(1, &mut out).unwrap();
    assert_eq!((out.len(), out[0].tag, engine.in_flight()), (1, 42, 0));
    out.pop().unwrap()
}

/// Random batches over several kinds of storage, against a plain array.
fn random_batches(engine: &mut dyn Engine, seed: u64) {
    const SIZE: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let shorts = FaultyStorage::new(Arc::new(MemoryStorage::new(1 << 30)));
    shorts.shorten(777);
    let files: [SharedStorage; 4] = [
        file(dir.path(), "a", false),
        file(dir.path(), "b", true),
        Arc::new(MemoryStorage::new(1 << 30)),
        Arc::new(shorts),
    ];
    let mut model: Vec<Vec<u8>> = vec![vec![0; SIZE]; files.len()];
    files.iter().for_each(|f| f.set_len(SIZE as u64).unwrap());

    let mut random = Random(seed);
    let mut flying: Vec<Option<(Vec<Piece>, Vec<u8>)>> = Vec::new();
    let mut out = Vec::new();
    for round in 0..60 {
        let direction = if round % 2 == 0 { Direction::Write } else { Direction::Read };
        // Each slot once per round: the order of overlapping writes in flight would be open.
        let mut free: Vec<(usize, usize)> =
            (0..files.len()).flat_map(|f| (0..128).map(move |s| (f, s))).collect();
        for _ in 0..engine.depth() {
            let count = random.below(if round % 7 == 0 { 150 } else { 20 });
            let mut buf = engine.buffer(count * 8192 + 1).unwrap();
            buf.iter_mut().for_each(|b| *b = random.below(256) as u8);
            let mut pieces = Vec::new();
            for i in 0..count {
                let Some(&(f, slot)) = free.get(random.below(free.len().max(1))) else { break };
                free.retain(|&x| x != (f, slot));
                // Some are aligned for direct I/O, most are not.
                let (skip, len) = if random.below(2) == 0 {
                    (0, 4096 * random.below(3))
                } else {
                    (random.below(100), random.below(8000))
                };
                pieces.push(Piece {
                    file: Arc::clone(&files[f]),
                    at: (slot * 8192 + skip) as u64,
                    buf_at: i * 8192,
                    len,
                });
                let range = slot * 8192 + skip..slot * 8192 + skip + len;
                if direction == Direction::Write {
                    model[f][range].copy_from_slice(&buf[i * 8192..i * 8192 + len]);
                }
            }
            let mut expected = buf.to_vec();
            if direction == Direction::Read {
                for p in &pieces {
                    let f = files.iter().position(|f| Arc::ptr_eq(f, &p.file)).unwrap();
                    expected[p.buf_at..p.buf_at + p.len]
                        .copy_from_slice(&model[f][p.at as usize..p.at as usize + p.len]);
                }
            }
            let batch = Batch { direction, pieces: pieces.clone() };
            let tag = flying.len() as u64;
            flying.push(Some((pieces, expected)));
            engine.submit(batch, buf, tag).unwrap();
        }
        let in_flight = engine.in_flight();
        assert_eq!(in_flight, engine.depth());
        let Err(Full(_, back)) =
            engine.submit(Batch { direction, pieces: Vec::new() }, Buf::new(5).unwrap(), 0)
        else {
            panic!("took more than its depth")
        };
        assert_eq!(back.len(), 5);
        engine.reap(0, &mut out).unwrap();
        engine.reap(usize::MAX, &mut out).unwrap();
        assert_eq!((out.len(), engine.in_flight()), (in_flight, 0));
        for done in out.drain(..) {
            assert!(done.failed.is_empty(), "{:?}", done.failed);
            let (pieces, expected) = flying[done.tag as usize].take().unwrap();
            assert_eq!(pieces.len(), done.batch.pieces.len());
            assert!(done.buf[..] == expected[..], "round {round}");
        }
    }
    for (f, model) in files.iter().zip(&model) {
        let mut bytes = vec![0; SIZE];
        let mut at = 0;
        while at < SIZE {
            at += f.read_at(&mut bytes[at..], at as u64).unwrap();
        }
        assert!(bytes == *model, "{f:?}");
    }
}

#[test]
fn random_batches_agree() {
    for depth in [1, 4, 9] {
        for mut engine in engines(depth) {
            random_batches(&mut *engine, 0x1234_5678 + depth as u64);
        }
    }
}

#[test]
fn more_pieces_than_the_queue_holds() {
    let dir = tempfile::tempdir().unwrap();
    for (n, mut engine) in engines(2).into_iter().enumerate() {
        let file = file(dir.path(), &format!("f{n}"), false);
        let mut buf = engine.buffer(5000 * 16).unwrap();
        buf.chunks_mut(16).zip(0u64..).for_each(|(c, i)| c[..8].copy_from_slice(&i.to_le_bytes()));
        let piece =
            |i: usize| Piece { file: Arc::clone(&file), at: (4999 - i as u64) * 8, buf_at: i * 16, len: 8 };
        let done = run(&mut *engine, Direction::Write, (0..5000).map(piece).collect(), buf);
        assert!(done.failed.is_empty());
        let mut bytes = vec![0; 40_000];
        assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 40_000);
        assert!(bytes.chunks(8).zip(0u64..).all(|(c, i)| c == (4999 - i).to_le_bytes()));
    }
}

#[test]
fn failures_are_told_by_piece() {
    let dir = tempfile::tempdir().unwrap();
    for (n, mut engine) in engines(2).into_iter().enumerate() {
        for direct in [false, true] {
            let file = file(dir.path(), &format!("f{n}{direct}"), direct);
            file.write_at(&[5; 10_000], 0).unwrap();
            let faulty = FaultyStorage::new(Arc::new(MemoryStorage::with_bytes(vec![6; 10_000], 1 << 20)));
            faulty.fail_reads(500..600);
            let faulty: SharedStorage = Arc::new(faulty);
            let piece =
                |file: &SharedStorage, at, buf_at, len| Piece { file: Arc::clone(file), at, buf_at, len };
            let pieces = vec![
                piece(&file, 0, 0, 4096),
                piece(&file, 8192, 4096, 4096), // past the end
                piece(&faulty, 0, 8192, 501),
                piece(&faulty, 0, 12_288, 500),
                piece(&file, 1 << 40, 16_384, 1),
                piece(&file, 8192, 16_384, 1808), // the very end
                piece(&file, 0, usize::MAX, 2),
                piece(&file, 0, 32_760, 9), // outside the buffer
                piece(&file, u64::MAX, 0, 1),
                piece(&file, 1 << 50, 0, 0),
            ];
            let buf = engine.buffer(32_768).unwrap();
            let done = run(&mut *engine, Direction::Read, pieces, buf);
            let failed: Vec<_> = done.failed.iter().map(|(i, e)| (*i, e.kind())).collect();
            use ErrorKind::{InvalidInput, UnexpectedEof};
            let eio = std::io::Error::from_raw_os_error(5).kind();
            assert_eq!(
                failed[..5],
                [(1, UnexpectedEof), (2, eio), (4, UnexpectedEof), (6, InvalidInput), (7, InvalidInput)]
            );
            assert_eq!((failed.len(), failed[5].0), (6, 8));
            assert!(
                done.buf[..4096].iter().all(|&b| b == 5) && done.buf[12_288..12_788].iter().all(|&b| b == 6)
            );
            assert!(done.buf[16_384..18_192].iter().all(|&b| b == 5));
        }
    }
}

#[test]
fn write_failures_and_full_disks() {
    for mut engine in engines(1) {
        let disk = FaultyStorage::new(Arc::new(MemoryStorage::new(1 << 20)));
        disk.limit_space(5000);
        let disk: SharedStorage = Arc::new(disk);
        let piece = |at| Piece { file: Arc::clone(&disk), at, buf_at: 0, len: 4096 };
        let done = run(&mut *engine, Direction::Write, vec![piece(0), piece(4096)], Buf::new(4096).unwrap());
        assert_eq!(done.failed.len(), 1);
        assert_eq!((done.failed[0].0, done.failed[0].1.kind()), (1, ErrorKind::StorageFull));
    }
}

#[test]
fn more_files_than_slots_and_foreign_buffers() {
    let dir = tempfile::tempdir().unwrap();
    let files: Vec<_> = (0..100).map(|i| file(dir.path(), &i.to_string(), false)).collect();
    let mut all = engines(2);
    let foreign = all[0].buffer(100 * 64).unwrap();
    let Some(engine) = all.get_mut(1) else { return };
    let mut foreign = Some(foreign);
    let mut other = UringEngine::new(1).unwrap();
    for round in 0..3u8 {
        let mut buf = match round {
            0 => foreign.take().unwrap(),
            1 => other.buffer(100 * 64).unwrap(),
            _ => engine.buffer(100 * 64).unwrap(),
        };
        buf.fill(round + 1);
        let piece =
            |(i, f): (usize, &SharedStorage)| Piece { file: Arc::clone(f), at: 0, buf_at: i * 64, len: 64 };
        let done = run(&mut **engine, Direction::Write, files.iter().enumerate().map(piece).collect(), buf);
        assert!(done.failed.is_empty());
        for f in &files {
            let mut bytes = [0; 64];
            f.read_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, [round + 1; 64]);
        }
    }
}

#[test]
fn drop_waits_for_what_is_in_flight() {
    let dir = tempfile::tempdir().unwrap();
    for (n, mut engine) in engines(8).into_iter().enumerate() {
        let file = file(dir.path(), &n.to_string(), true);
        let depth = engine.depth();
        for i in 0..depth {
            let mut buf = engine.buffer(1 << 20).unwrap();
            buf.fill(9);
            let piece = Piece { file: Arc::clone(&file), at: (i as u64) << 20, buf_at: 0, len: 1 << 20 };
            engine.submit(Batch { direction: Direction::Write, pieces: vec![piece] }, buf, 0).unwrap();
        }
        drop(engine);
        let mut bytes = vec![0; depth << 20];
        let mut at = 0;
        while at < bytes.len() {
            let n = file.read_at(&mut bytes[at..], at as u64).unwrap();
            assert!(n > 0, "{at}");
            at += n;
        }
        assert!(bytes.iter().all(|&b| b == 9));
    }
}

/// A ring belongs to its thread on newer kernels; elsewhere it must fail, not hang or free what is in use.
#[test]
fn engines_that_change_threads_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    for (n, mut engine) in engines(2).into_iter().enumerate() {
        let file = file(dir.path(), &n.to_string(), true);
        file.set_len(1 << 20).unwrap();
        let piece = || Piece { file: Arc::clone(&file), at: 0, buf_at: 0, len: 1 << 20 };
        let batch = || Batch { direction: Direction::Read, pieces: vec![piece()] };
        engine.submit(batch(), Buf::new(1 << 20).unwrap(), 0).unwrap();
        let elsewhere = std::thread::spawn(move || {
            let mut out = Vec::new();
            match engine.reap(1, &mut out) {
                Ok(()) => assert!(out.len() == 1 && out[0].failed.is_empty()),
                Err(e) => assert_eq!(e.kind(), ErrorKind::AlreadyExists, "{e}"), // EEXIST
            }
        });
        elsewhere.join().unwrap();
    }
}

#[test]
fn plans() {
    let sync = EnginePlan::probe(EngineChoice::Sync, true);
    assert_eq!((sync.kind, sync.engine(8).name(), sync.refused), ("sync", "sync", false));
    let auto = EnginePlan::probe(EngineChoice::Auto, false);
    assert_eq!(auto.kind, "sync");
    let uring = EnginePlan::probe(EngineChoice::Uring, false);
    assert_eq!(uring.engine(8).name(), uring.kind);
    if uring.kind == "sync" {
        assert!(
            uring.refused && uring.reason.starts_with("io_uring refused by the kernel: "),
            "{}",
            uring.reason
        );
    } else {
        assert_eq!(uring.engine(8).depth(), 8);
    }
}
