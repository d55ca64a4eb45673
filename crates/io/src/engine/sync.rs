//! The engine of plain positioned system calls.

use std::io;

use super::transfer_all;
use crate::{Batch, Buf, Done, Engine, Full};

/// Performs each batch in [`submit`](Engine::submit), one at a time. Merging neighbouring pieces is the caller's job.
#[derive(Debug, Default)]
pub struct SyncEngine {
    done: Option<Done>,
}

impl SyncEngine {
    /// An idle engine.
    pub fn new() -> SyncEngine {
        SyncEngine::default()
    }
}

impl Engine for SyncEngine {
    fn name(&self) -> &'static str {
        "sync"
    }

    fn depth(&self) -> usize {
        1
    }

    fn submit(&mut self, batch: Batch, mut buf: Buf, tag: u64) -> Result<(), Full> {
        if self.done.is_some() {
            return Err(Full(batch, buf));
        }
        let failed = transfer_all(&batch, &mut buf);
        self.done = Some(Done { tag, batch, buf, failed });
        Ok(())
    }

    fn reap(&mut self, _at_least: usize, out: &mut Vec<Done>) -> io::Result<()> {
        out.extend(self.done.take());
        Ok(())
    }

    fn in_flight(&self) -> usize {
        usize::from(self.done.is_some())
    }
}
