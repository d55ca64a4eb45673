//! `qemu-img bench`: how long a number of equal requests takes.

use std::io::{Write, stdout};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use diskmill::{Error, Image};

use super::getopt::Args;
use super::node::Context;
use super::size::{number, size, size_between};
use super::{Fail, Outcome, cache_mode, messages};

/// The largest count, depth, request and step.
const MOST: u64 = i32::MAX as u64;

/// The requests: each of `len` bytes, the first at `start`, each next one `step` bytes further, from the front again
/// behind the end.
struct Requests {
    count: u64,
    len: u64,
    start: u64,
    step: u64,
}

impl Requests {
    /// Where the request of this number is, on a disk of `size` bytes.
    fn offset(&self, index: u64, size: u64) -> u64 {
        let last = size.saturating_sub(self.len);
        let at = u128::from(self.start) + u128::from(index) * u128::from(self.step);
        // Fits: less than a disk's size.
        (at % (u128::from(last) + 1)) as u64
    }
}

pub(super) fn run(args: Args) -> Outcome {
    let mut context = Context::of(&args, "format")?;
    let count = |option: &str, what: &str, default: u64| match args.text(option) {
        Some(text) => number(what, &text, 1, MOST),
        None => Ok(default),
    };
    let (requests, depth) = (count("count", "request count", 75_000)?, count("depth", "queue depth", 64)?);
    let start = args.text("offset").map(|text| size("offset", &text)).transpose()?.unwrap_or(0);
    let len = args.text("buffer-size").map(|text| size_between("buffer size", &text, 1, MOST)).transpose()?;
    let step = args.text("step-size").map(|text| size_between("step size", &text, 0, MOST)).transpose()?;
    if let Some(text) = args.text("pattern") {
        number("pattern byte", &text, 0, 255)?;
    }
    let flush =
        args.text("flush-interval").map(|text| number("flush interval", &text, 0, MOST)).transpose()?;
    if let Some(engine) =
        args.text("aio").filter(|name| !matches!(name.as_str(), "threads" | "native" | "io_uring"))
    {
        return Err(Fail::new(format!("Invalid aio option: {engine}")));
    }
    context.cache = cache_mode(&args, "cache", "cache").map_err(|_| Fail::new("Invalid cache mode"))?;
    let file = args.one_file()?;
    let writing = args.has("write");
    if !writing && flush.is_some_and(|interval| interval > 0) {
        return Err(Fail::new("--flush-interval is only available in write tests"));
    }
    if flush.is_some_and(|interval| interval > 0 && interval < depth) {
        return Err(Fail::new("Flush interval can't be smaller than depth"));
    }
    if writing {
        return Err(Fail::new("bench -w is not supported: use a real workload to measure writes"));
    }
    let (_, image) = context.open(file)?;
    let len = len.unwrap_or(4096);
    let requests =
        Requests { count: requests, len, start, step: step.filter(|&step| step > 0).unwrap_or(len) };
    writeln!(
        stdout(),
        "Sending {} read requests, {len} bytes each, {depth} in parallel (starting at offset {start}, step size {})",
        requests.count,
        requests.step
    )?;
    let started = Instant::now();
    read(&image, &requests, depth)
        .map_err(|error| Fail::new(format!("Failed request: {}", messages::while_working(&error))))?;
    writeln!(stdout(), "Run completed in {:.3} seconds.", started.elapsed().as_secs_f64())?;
    Ok(0)
}

/// Does the requests from as many threads as there are processors, at most `depth`.
fn read(image: &Image, requests: &Requests, depth: u64) -> Result<(), Error> {
    let next = AtomicU64::new(0);
    let work = || {
        let mut reader = image.reader();
        let mut buf = vec![0; requests.len as usize];
        loop {
            let index = next.fetch_add(1, Relaxed);
            if index >= requests.count {
                return Ok(());
            }
            reader.read_at(&mut buf, requests.offset(index, image.size()))?;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64).min(depth);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut result = work();
        for other in others {
            result = result.and(other.join().unwrap_or(Ok(())));
        }
        result
    })
}
