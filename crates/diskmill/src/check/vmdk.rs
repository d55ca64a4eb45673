use diskmill_format::Limits;

use super::counts::Budget;
use super::{Finding, Report, Verdict};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::layout::{FileId, LayerSource, Source};

/// Bytes that a run takes while it is remembered.
const RUN: u64 = 24;

/// Looks whether each grain of a VMDK can be found in its file, and whether two lie on the same bytes.
///
/// QEMU's check (`vmdk_co_check`) stops at the first grain that it cannot find, and does not look for overlaps.
pub(super) fn check(
    image: &Image,
    limits: &Limits,
    found: &mut dyn FnMut(Verdict, &Finding),
) -> Result<Report> {
    let mut report = Report::default();
    let mut budget = Budget::new(limits.check_bytes);
    // File, first byte, bytes; runs that continue each other are one.
    let mut runs: Vec<(FileId, u64, u64)> = Vec::new();
    let (mut at, size) = (0, image.size());
    // Once the grains take more than the files have, two lie on the same bytes. So a forged disk, of which all tables are
    // one and the same, costs no more than its file could hold.
    let mut room = image.files().iter().try_fold(0u64, |sum, file| {
        file.storage
            .len()
            .map(|len| sum.saturating_add(len))
            .map_err(|error| Error::io("cannot tell the size", error))
    })?;
    while at < size {
        let extent = match image.map_top(at, size - at) {
            Ok(extent) => extent,
            Err(error) => {
                let finding =
                    Finding::Unmappable { guest: at, len: error.len, reason: error.error.to_string() };
                report.corruptions += 1;
                found(Verdict::Error, &finding);
                at = at.saturating_add(error.len);
                continue;
            }
        };
        let run = match extent.source {
            LayerSource::Data(Source::Raw { file, at }) => Some((file, at.get(), extent.len)),
            LayerSource::Data(Source::Packed { file, at, .. }) => Some((file, at.get(), 1)),
            _ => None,
        };
        match (run, runs.last_mut()) {
            (Some((file, start, len)), Some(last)) if (file, start) == (last.0, last.1 + last.2) => {
                last.2 += len;
            }
            (Some(run), _) => {
                budget.charge(RUN)?;
                runs.push(run);
            }
            (None, _) => {}
        }
        let Some(left) = room.checked_sub(run.map_or(0, |(_, _, len)| len)) else { break };
        room = left;
        at = at.saturating_add(extent.len);
    }
    for damage in image.bypassed() {
        report.corruptions += 1;
        found(Verdict::Error, &Finding::Bypassed { damage });
    }
    runs.sort_unstable();
    let mut end = (FileId(0), 0);
    for (file, start, len) in runs {
        let until = start.saturating_add(len);
        if file == end.0 && start < end.1 {
            report.corruptions += 1;
            found(Verdict::Error, &Finding::Overlap { offset: start, len: end.1.min(until) - start });
        }
        end = if file == end.0 { (file, until.max(end.1)) } else { (file, until) };
    }
    Ok(report)
}
