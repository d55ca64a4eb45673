//! Persistent bitmaps that a conversion carries over.

use super::{ConvertOptions, TargetFormat};
use crate::edit::{BitmapCopy, check_sum};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use crate::layout::FormatInfo;
use crate::qcow2::{Compat, lossy};

/// What becomes of the persistent bitmaps of the source (`--bitmaps`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CarryBitmaps {
    /// The output gets none.
    #[default]
    None,
    /// The output gets all that the image itself has. One that was not saved is an error.
    All,
    /// The same, but those that were not saved are left out (`--skip-broken-bitmaps`).
    Sound,
}

/// The bitmaps that the output is to get.
#[derive(Default)]
pub(super) struct Carried {
    pub(super) bitmaps: Vec<BitmapCopy>,
    /// Those that are left out.
    pub(super) skipped: Vec<String>,
}

impl Carried {
    /// Finds the bitmaps of the source and looks at their tables, so that damage shows before anything is written.
    ///
    /// # Errors
    /// [`Kind::Invalid`] if there is not exactly one source; [`Kind::Unsupported`] if a format has no bitmaps;
    /// [`Kind::Corrupt`] for one that is damaged or was not saved; [`Kind::Limit`] for too much.
    pub(super) fn collect(sources: &[Image], options: &ConvertOptions) -> Result<Self> {
        if options.bitmaps == CarryBitmaps::None {
            return Ok(Self::default());
        }
        // The words are QEMU's.
        let [source] = sources else {
            return Err(Error::invalid("Copying bitmaps only possible with single source"));
        };
        if !matches!(source.info().specific, FormatInfo::Qcow2(_))
            || source.size() != source.info().virtual_size
        {
            return Err(Error::new(Kind::Unsupported, "Source lacks bitmap support"));
        }
        let mut carried = Self::default();
        let mut bytes = 0;
        // QEMU tells of them in this order.
        for bitmap in source.bitmaps()?.into_iter().rev() {
            let name = || lossy(&bitmap.name);
            match (bitmap.in_use, options.bitmaps) {
                (true, CarryBitmaps::Sound) => carried.skipped.push(name()),
                (true, _) => {
                    let why = format!("Cannot copy inconsistent bitmap '{}'", name());
                    return Err(Error::new(Kind::Corrupt, why).hint(
                        "--skip-broken-bitmaps leaves it out, and 'bitmap --remove' removes it from the source",
                    ));
                }
                (false, _) => {
                    let copy = source.bitmap_to_copy(bitmap)?;
                    bytes = copy.stored_bytes()?.saturating_add(bytes);
                    check_sum(bytes)?;
                    carried.bitmaps.push(copy);
                }
            }
        }
        carried.bitmaps.reverse();
        match &options.format {
            TargetFormat::Qcow2(qcow2) if qcow2.compat != Compat::V2 => Ok(carried),
            format => {
                let why = format!("Format driver '{}' does not support bitmaps", format.name());
                Err(Error::new(Kind::Unsupported, why))
            }
        }
    }
}
