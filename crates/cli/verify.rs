//! `--verify`: the manifest of an OVA.

use std::path::Path;

use diskmill::Limits;
use diskmill::ova::{FileCheck, Outcome};

use crate::exit::Failure;

/// Files that are listed; more would say nothing new.
const LISTED_FILES: usize = 20;

/// Checks all files of the OVA at `path` against its manifest.
pub(crate) fn verify(path: &Path) -> Result<(), Failure> {
    let checks = diskmill::ova::verify(path, &Limits::default())?;
    let bad: Vec<String> = checks.iter().filter_map(complaint).take(LISTED_FILES).collect();
    if bad.is_empty() {
        return Ok(());
    }
    Err(Failure::failed(format!("{path:?}: the archive is not what its manifest says: {}", bad.join("; "))))
}

fn complaint(check: &FileCheck) -> Option<String> {
    let what = match check.outcome {
        Outcome::Same => return None,
        Outcome::Differs => "has another digest",
        Outcome::Missing => "is not in the archive",
        Outcome::Unlisted => "has no digest in the manifest",
    };
    Some(format!("{:?} {what}", check.name))
}
