//! Whether files can share blocks.

use std::io;
use std::path::Path;

use crate::{Storage, temporary};

/// A block of any file system.
const BLOCK: usize = 64 << 10;

/// Tries whether files in `directory` can share blocks, with two small files without a name.
///
/// # Errors
/// What the system says against it; as a rule that the file system cannot (`EOPNOTSUPP`).
pub fn reflinks_in(directory: &Path) -> io::Result<()> {
    let (source, target) = (temporary(directory)?, temporary(directory)?);
    let block = vec![1; BLOCK];
    let mut at = 0;
    while at < BLOCK {
        match source.write_at(&block[at..], at as u64)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => at += written,
        }
    }
    target.clone_range(0, &source, 0, BLOCK as u64)
}
