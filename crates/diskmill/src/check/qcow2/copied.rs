use std::collections::HashMap;

use diskmill_format::qcow2::{COMPRESSED, COPIED, HOST_OFFSET_MASK};

use super::{Finding, Pass, Repair};
use crate::error::Result;

impl Pass<'_> {
    /// Compares the copied flags of the active state with the refcounts, and repairs them where that is asked for.
    pub(super) fn check_copied(&mut self) -> Result<()> {
        // Most images need no second look at their tables: all flags are set, and nothing is shared.
        let plain = !self.uncopied
            && self.counts.largest() <= 1
            && self.beyond.largest() == 0
            && !self.refcounts_differ();
        if plain {
            return Ok(());
        }
        // As QEMU: -r leaks makes flags fit only where nothing else is wrong.
        let repair = match self.repair {
            Repair::Nothing => false,
            Repair::Leaks => {
                self.report.corruptions == 0 && self.report.check_errors == 0 && self.report.leaks == 0
            }
            Repair::All => true,
        };
        let l1 = self.header.l1_offset.get();
        let entries = self.disk.table(l1, u64::from(self.header.l1_size))?;
        let mut times: HashMap<u64, u64> = HashMap::new();
        for &(_, entry) in &entries {
            *times.entry(entry & HOST_OFFSET_MASK).or_default() += 1;
        }
        let mut table = vec![0; self.cluster_size() as usize];
        for (index, entry) in entries {
            let offset = entry & HOST_OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let Some(refcount) = self.refcount(self.cluster_of(offset))? else { continue };
            if (refcount == 1) != (entry & COPIED != 0) {
                let finding = Finding::L2Copied { index, entry, refcount };
                self.flag(finding, repair, l1 + index * 8, entry, 1)?;
            }
            // A table that several entries share is looked at once, for all of them.
            if let Some(times) = times.remove(&offset) {
                self.check_l2(offset, times, repair, &mut table)?;
            }
        }
        Ok(())
    }

    fn check_l2(&mut self, offset: u64, times: u64, repair: bool, table: &mut [u8]) -> Result<()> {
        if !self.disk.read(table, offset)? {
            return Ok(());
        }
        let entry_size = self.geometry().l2_entry_size();
        for (at, entry) in (0usize..).step_by(entry_size).zip(table.chunks_exact(entry_size)) {
            let Some(entry) = entry.first_chunk().map(|word| u64::from_be_bytes(*word)) else { continue };
            let external = self.external();
            let host = entry & HOST_OFFSET_MASK;
            if entry & COMPRESSED != 0 || (host == 0 && !(external && entry & COPIED != 0)) {
                continue;
            }
            let refcount = if external { Some(1) } else { self.refcount(self.cluster_of(host))? };
            let Some(refcount) = refcount else { continue };
            if (refcount == 1) != (entry & COPIED != 0) {
                let finding = Finding::DataCopied { entry, refcount };
                self.flag(finding, repair, offset.saturating_add(at as u64), entry, times)?;
            }
        }
        Ok(())
    }

    /// Turns the copied flag of the entry at `at` over, or notes that it is wrong.
    fn flag(&mut self, finding: Finding, repair: bool, at: u64, entry: u64, times: u64) -> Result<()> {
        if !repair {
            self.error(&finding, times);
            return Ok(());
        }
        self.disk.write(&(entry ^ COPIED).to_be_bytes(), at)?;
        self.repaired(&finding);
        Ok(())
    }
}
