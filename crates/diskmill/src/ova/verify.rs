use std::collections::HashMap;
use std::path::Path;

use diskmill_format::Limits;
use diskmill_format::ova::manifest::{Algorithm, Manifest};
use diskmill_format::ova::tar::Member;
use diskmill_io::{FileStorage, OpenHow, Storage};
use sha1::Sha1;
use sha2::{Digest, Sha256, Sha512};

use super::{content, has_suffix, members};
use crate::error::{Error, Kind, Result};
use crate::qcow2::lossy;
use crate::reader::read_exact;

const STEP: u64 = 1 << 20;

/// What the check of one file of a manifest showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The file has the digest of the manifest.
    Same,
    /// It has another one: it was changed or damaged.
    Differs,
    /// It is not in the archive.
    Missing,
    /// It is in the archive, and the manifest has no digest of it.
    Unlisted,
}

/// A file of an archive or its manifest, and what its check showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileCheck {
    /// Name of the file in the archive.
    pub name: String,
    /// What was found.
    pub outcome: Outcome,
}

/// Checks the digests (SHA-1, SHA-256 or SHA-512) of the manifest in the archive at `path`, in its order; then come the
/// files that have none. Only the manifest itself and its certificate need none.
///
/// # Errors
/// [`Kind::Invalid`] if the archive has no manifest; [`Kind::Corrupt`] for
/// a damaged archive or manifest, or two files of one name. A wrong digest is an [`Outcome`], not an error.
pub fn verify(path: impl AsRef<Path>, limits: &Limits) -> Result<Vec<FileCheck>> {
    let path = path.as_ref();
    check(path, limits).map_err(|error| error.of(path))
}

fn check(path: &Path, limits: &Limits) -> Result<Vec<FileCheck>> {
    let how = OpenHow { read: true, ..OpenHow::default() };
    let file = FileStorage::open(path, &how).map_err(|error| Error::io("cannot open", error))?;
    let members = members(&file, limits).map_err(|error| match error.kind() {
        Kind::NotThisFormat => Error::invalid("not an archive: only OVAs have a manifest"),
        _ => error,
    })?;
    let Some(manifest) = members.iter().find(|member| has_suffix(&member.name, ".mf")) else {
        return Err(Error::invalid("the archive has no manifest (.mf)"));
    };
    let manifest = Manifest::parse(&content(&file, manifest, limits.manifest_bytes)?, limits)?;
    let mut unlisted = HashMap::with_capacity(members.len());
    for (index, member) in members.iter().enumerate() {
        if unlisted.insert(member.name.as_slice(), (index, member)).is_some() {
            // Which of them a reader takes is open.
            let message = format!("it has two files {:?}", lossy(&member.name));
            return Err(Error::corrupt("tar", None, message));
        }
    }
    let mut checks = Vec::with_capacity(manifest.digests.len());
    for entry in manifest.digests {
        let outcome = match unlisted.remove(entry.name.as_slice()) {
            None => Outcome::Missing,
            Some((_, member)) if digest(&file, member, entry.algorithm)? == entry.digest => Outcome::Same,
            Some(_) => Outcome::Differs,
        };
        checks.push(FileCheck { name: lossy(&entry.name), outcome });
    }
    let mut unlisted: Vec<_> = unlisted.into_values().collect();
    unlisted.sort_by_key(|(index, _)| *index);
    let unlisted = unlisted
        .into_iter()
        .filter(|(_, member)| ![".mf", ".cert"].iter().any(|suffix| has_suffix(&member.name, suffix)))
        .map(|(_, member)| FileCheck { name: lossy(&member.name), outcome: Outcome::Unlisted });
    checks.extend(unlisted);
    Ok(checks)
}

fn digest(file: &dyn Storage, member: &Member, algorithm: Algorithm) -> Result<Vec<u8>> {
    match algorithm {
        Algorithm::Sha1 => hash::<Sha1>(file, member),
        Algorithm::Sha256 => hash::<Sha256>(file, member),
        Algorithm::Sha512 => hash::<Sha512>(file, member),
    }
}

pub(super) fn hash<D: Digest>(file: &dyn Storage, member: &Member) -> Result<Vec<u8>> {
    let mut digest = D::new();
    let mut buf = vec![0; STEP.min(member.size) as usize];
    let mut done = 0;
    while done < member.size {
        let step = (member.size - done).min(STEP) as usize;
        let part = buf.get_mut(..step).unwrap_or_default();
        read_exact(file, part, member.data.get().saturating_add(done))?;
        digest.update(&*part);
        done += step as u64;
    }
    Ok(digest.finalize().to_vec())
}
