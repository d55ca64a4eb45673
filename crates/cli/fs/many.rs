//! Several images, each in a session of its own.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

use serde_json::{Value, json};

use super::args::ManyArgs;
use super::settings::asked_for;
use super::{defaults, memory};
use crate::exit::{Exit, Failure};
use crate::{names, say};

/// Does `one` to each image, several at the same time, and returns the results in the order of the images.
pub(crate) fn each<T: Send>(
    args: &ManyArgs,
    one: impl Fn(&Path) -> Result<T, Failure> + Sync,
) -> Result<Vec<Result<T, Failure>>, Failure> {
    let files = &args.files;
    let (settings, _) = asked_for(&args.image.settings)?;
    let free = memory::free();
    // With a share of the memory each, rather than all of it.
    let appliance = settings.memory_mib.unwrap_or_else(|| defaults::memory_mib(0, None));
    let wanted = args.jobs.map_or_else(cpus, usize::from).clamp(1, files.len().max(1));
    let jobs = wanted.min(fitting(appliance, free));
    if jobs < wanted && args.jobs.is_some() && !args.image.quiet {
        say::warning(format_args!(
            "{jobs} at a time instead of {wanted}: an appliance may take {appliance} MiB, and {} MiB are free; --memsize sets it",
            free.unwrap_or_default() >> 20
        ));
    }
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<Option<Result<T, Failure>>>> = Mutex::new(files.iter().map(|_| None).collect());
    let work = || {
        while let Some((index, file)) =
            Some(next.fetch_add(1, Relaxed)).and_then(|i| Some((i, files.get(i)?)))
        {
            let result = one(file);
            if let Some(slot) = results.lock().unwrap_or_else(|e| e.into_inner()).get_mut(index) {
                *slot = Some(result);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..jobs {
            scope.spawn(work);
        }
        work();
    });
    let results = results.into_inner().unwrap_or_else(|e| e.into_inner());
    let missing = || Err(Failure::failed("the image was not looked at"));
    Ok(results.into_iter().map(|result| result.unwrap_or_else(missing)).collect())
}

fn cpus() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// How many sessions fit into `free` bytes of memory at `appliance` MiB each; one in any case.
fn fitting(appliance: u32, free: Option<u64>) -> usize {
    let sessions = free.and_then(|free| (free >> 20).checked_div(appliance.into()));
    sessions.map_or(usize::MAX, |sessions| usize::try_from(sessions).unwrap_or(usize::MAX).max(1))
}

/// One text for all images: with several, each under its name.
pub(crate) fn texts<T>(
    files: &[PathBuf],
    results: &[Result<T, Failure>],
    text: impl Fn(&T) -> String,
) -> String {
    let found = files.iter().zip(results).filter_map(|(file, result)| Some((file, result.as_ref().ok()?)));
    let texts: Vec<String> = found
        .map(|(file, result)| match files.len() {
            1 => text(result),
            _ => format!("{}:\n{}", names::shown(&file.to_string_lossy()), text(result)),
        })
        .collect();
    texts.join("\n")
}

/// One JSON object for each image: what was found, as `key`, or the error.
pub(crate) fn values<T>(
    files: &[PathBuf],
    results: &[Result<T, Failure>],
    key: &str,
    value: impl Fn(&T) -> Value,
) -> Value {
    let one = |(file, result): (&PathBuf, &Result<T, Failure>)| {
        let image = file.to_string_lossy();
        match result {
            Ok(found) => json!({ "image": image, key: value(found) }),
            Err(failure) => {
                let message = failure.message.as_deref().unwrap_or_default();
                json!({ "image": image, "error": without_name(file, message) })
            }
        }
    };
    files.iter().zip(results).map(one).collect()
}

/// An error's text without the image's name in front, which the library quotes and the session does not.
fn without_name<'m>(file: &Path, message: &'m str) -> &'m str {
    let plain = names::shown(&file.to_string_lossy()).into_owned();
    let rest = message.strip_prefix(&plain).or_else(|| message.strip_prefix(&format!("{file:?}")));
    rest.and_then(|rest| rest.strip_prefix(": ")).unwrap_or(message)
}

/// The end of the program: the error of the only image, or each error under its image's name and a failure.
pub(crate) fn outcome<T>(files: &[PathBuf], results: &[Result<T, Failure>]) -> Result<Exit, Failure> {
    let mut worst = None;
    for (file, result) in files.iter().zip(results) {
        let Err(failure) = result else { continue };
        match &failure.message {
            Some(message) if files.len() > 1 => {
                let name = file.to_string_lossy();
                let message = format!("{}: {}", names::shown(&name), without_name(file, message));
                say::failure(&Failure { message: Some(message), ..*failure });
            }
            _ => say::failure(failure),
        }
        worst = Some(failure.exit);
    }
    Ok(worst.unwrap_or(Exit::Done))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_its_image_once() {
        let of = |message: &'static str| without_name(Path::new("a b"), message);
        assert_eq!([of("a b: x"), of("\"a b\": x"), of("a b c: x"), of("y")], ["x", "x", "a b c: x", "y"]);
    }

    #[test]
    fn memory_bounds_the_sessions() {
        assert_eq!(fitting(1280, Some(100)), 1);
        assert_eq!(fitting(1280, Some(2560 << 20)), 2);
        assert_eq!(fitting(1280, Some((2560 << 20) - 1)), 1);
        assert_eq!([fitting(1280, None), fitting(0, Some(1 << 40))], [usize::MAX; 2]);
    }
}
