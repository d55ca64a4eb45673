//! What an output needs, and so must not replace: the files of its sources, and those of its own backing chain.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use diskmill_io::{FileStorage, ImageLock, LockMode, OpenHow, SharedStorage};

use super::TargetFormat;
use crate::error::{Error, Result};
use crate::image::{Image, OpenOptions, resolve};
use crate::layout::FormatInfo;
use crate::policy::{Allow, OpenPolicy};
use crate::probe::Format;
use crate::qcow2::Qcow2Options;
use crate::vmdk::VmdkOptions;

const OWN_CHAIN: &str = "the output is a file of its own backing chain";

/// The images that an output needs.
pub(super) struct Needed<'a> {
    sources: &'a [Image],
    /// With all that stands under it, as far as that can be opened.
    backing: Option<Image>,
}

impl<'a> Needed<'a> {
    pub(super) const fn new(sources: &'a [Image]) -> Self {
        Self { sources, backing: None }
    }

    /// Finds the backing file or parent that `format` names for the output at `path`, and writes down what else the output
    /// must know of it: a qcow2 image its format, a VMDK its CID.
    pub(super) fn find_backing(&mut self, format: &mut TargetFormat, path: &Path) -> Result<()> {
        match format {
            TargetFormat::Raw(_) => Ok(()),
            TargetFormat::Qcow2(options) => self.backing_file(options, path),
            TargetFormat::Vmdk(options) | TargetFormat::Ova(options) => self.parent(options, path),
        }
    }

    /// Finds the backing file of a qcow2 output.
    fn backing_file(&mut self, options: &mut Qcow2Options, path: &Path) -> Result<()> {
        let Some(name) = &options.backing_file else { return Ok(()) };
        let format = options.backing_format.as_deref().map(str::parse).transpose()?;
        let (backing, _) = self.open(name, format, path)?;
        if options.backing_format.is_none() {
            options.backing_format = Some(backing.info().format.name().to_owned());
        }
        Ok(())
    }

    /// Finds the parent of a VMDK output.
    fn parent(&mut self, options: &mut VmdkOptions, path: &Path) -> Result<()> {
        let Some(name) = &options.backing_file else { return Ok(()) };
        let (image, parent) = self.open(name, Some(Format::Vmdk), path)?;
        let cid = match &image.info().specific {
            FormatInfo::Vmdk(vmdk) => vmdk.descriptor.as_ref().and_then(|descriptor| descriptor.cid),
            _ => None,
        };
        let no_cid = || {
            Error::invalid("the backing file has no descriptor with a CID, so no delta can name it")
                .of(&parent)
        };
        options.parent_cid = Some(cid.ok_or_else(no_cid)?);
        Ok(())
    }

    /// Opens the backing file that the output at `path` is to have, and of whose chain it must not be. Returns its path too.
    fn open(&mut self, name: &str, format: Option<Format>, path: &Path) -> Result<(&Image, PathBuf)> {
        if self.sources.len() != 1 {
            return Err(Error::invalid("an output with a backing file takes exactly one source image"));
        }
        let backing = resolve(name.as_bytes(), path, "backing file")?;
        let mut open = OpenOptions {
            format,
            // The user named it, and only its metadata is looked at.
            policy: OpenPolicy { allow: Allow::Anything, paths: Vec::new() },
            locked: true,
            ..OpenOptions::default()
        };
        let image = Image::open(&backing, &open).or_else(|_| {
            // What it needs itself may be missing.
            open.metadata_only = true;
            Image::open(&backing, &open)
        })?;
        let image = self.backing.insert(image);
        refuse(path, std::slice::from_ref(image), OWN_CHAIN)?;
        Ok((image, backing))
    }

    /// Refuses an output at `path` that would destroy what is being read, or what it will need itself.
    pub(super) fn refuse(&self, path: &Path) -> Result<()> {
        refuse(path, self.sources, "the output is a file of the source")?;
        refuse(path, self.backing.as_slice(), OWN_CHAIN)
    }
}

/// Refuses an output at `path` if that is a file of one of the `images`.
fn refuse(path: &Path, images: &[Image], why: &str) -> Result<()> {
    let Ok(output) = std::fs::metadata(path) else { return Ok(()) };
    let mut files = images.iter().flat_map(Image::files);
    if files.any(|file| std::fs::metadata(&file.path).is_ok_and(|meta| same(&meta, &output))) {
        return Err(Error::invalid(why));
    }
    Ok(())
}

pub(super) fn same(one: &Metadata, other: &Metadata) -> bool {
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Keeps all others from using a file that is to be written.
pub(super) fn acquire(storage: &SharedStorage) -> Result<ImageLock> {
    ImageLock::acquire(storage, LockMode::Writer).map_err(Error::lock)
}

/// The file that will be replaced must not be in use: its user would go on with a file that has no name any more.
pub(super) fn lock_old(path: &Path) -> Result<Option<ImageLock>> {
    if !std::fs::metadata(path).is_ok_and(|meta| meta.is_file()) {
        return Ok(None);
    }
    match FileStorage::open(path, &OpenHow { read: true, ..OpenHow::default() }) {
        Ok(old) => {
            let old: SharedStorage = Arc::new(old);
            acquire(&old).map(Some)
        }
        // Unreadable for us: whether it can be replaced is seen when that is tried.
        Err(_) => Ok(None),
    }
}
