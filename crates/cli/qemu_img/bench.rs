//! `qemu-img bench`: how long a number of equal requests takes.

use std::io::{Write as _, stdout};
use std::panic::resume_unwind;
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
    /// The number of the next request; `None` if all are taken.
    fn take(&self, next: &AtomicU64) -> Option<u64> {
        Some(next.fetch_add(1, Relaxed)).filter(|&index| index < self.count)
    }

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
    let pattern = args.text("pattern").map(|text| number("pattern byte", &text, 0, 255)).transpose()?;
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
    let image = if writing {
        let Some((_, image)) = context.open_writable(file)? else {
            return Err(Fail::new("writing to images of this format is not supported"));
        };
        image
    } else {
        context.open(file)?.1
    };
    let len = len.unwrap_or(4096);
    let requests =
        Requests { count: requests, len, start, step: step.filter(|&step| step > 0).unwrap_or(len) };
    writeln!(
        stdout(),
        "Sending {} {} requests, {len} bytes each, {depth} in parallel (starting at offset {start}, step size {})",
        requests.count,
        if writing { "write" } else { "read" },
        requests.step
    )?;
    let flush = flush.filter(|&interval| interval > 0);
    if let Some(interval) = flush {
        writeln!(stdout(), "Sending flush every {interval} requests")?;
    }
    // The bounds of a pattern byte are checked above.
    let write = Write { pattern: pattern.unwrap_or(0) as u8, flush };
    let started = Instant::now();
    let done = if writing {
        write.run(&image, &requests, depth).and_then(|()| image.close())
    } else {
        read(&image, &requests, depth)
    };
    done.map_err(|error| Fail::new(format!("Failed request: {}", messages::while_working(&error))))?;
    writeln!(stdout(), "Run completed in {:.3} seconds.", started.elapsed().as_secs_f64())?;
    Ok(0)
}

/// Does the requests from as many threads as there are processors, at most `depth`.
fn read(image: &Image, requests: &Requests, depth: u64) -> Result<(), Error> {
    let next = AtomicU64::new(0);
    in_parallel(depth, || {
        let mut reader = image.reader();
        let mut buf = vec![0; requests.len as usize];
        while let Some(index) = requests.take(&next) {
            reader.read_at(&mut buf, requests.offset(index, image.size()))?;
        }
        Ok(())
    })
}

/// What is written, and after how many requests a flush comes.
struct Write {
    pattern: u8,
    flush: Option<u64>,
}

impl Write {
    fn run(&self, image: &Image, requests: &Requests, depth: u64) -> Result<(), Error> {
        let next = AtomicU64::new(0);
        // QEMU cuts requests at the end of the disk, too.
        let buf = vec![self.pattern; requests.len.min(image.size()) as usize];
        in_parallel(depth, || {
            while let Some(index) = requests.take(&next) {
                image.write_at(&buf, requests.offset(index, image.size()))?;
                if self.flush.is_some_and(|interval| (index + 1).is_multiple_of(interval)) {
                    image.flush()?;
                }
            }
            Ok(())
        })
    }
}

fn in_parallel(depth: u64, work: impl Fn() -> Result<(), Error> + Sync) -> Result<(), Error> {
    let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() as u64).min(depth);
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(&work)).collect();
        let mut result = work();
        for other in others {
            result = result.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        result
    })
}
