//! How much was copied.

use std::io::{self, Read, Write};

use serde_json::{Value, json};

/// What was copied between host and guest.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    pub(crate) files: u64,
    pub(crate) folders: u64,
    pub(crate) links: u64,
    pub(crate) bytes: u64,
    /// Device nodes, FIFOs and sockets, which are left out.
    pub(crate) left_out: u64,
}

impl Copied {
    /// One file.
    pub(crate) fn file(bytes: u64) -> Self {
        Self { files: 1, bytes, ..Self::default() }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.files = self.files.saturating_add(other.files);
        self.folders = self.folders.saturating_add(other.folders);
        self.links = self.links.saturating_add(other.links);
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.left_out = self.left_out.saturating_add(other.left_out);
    }

    /// What people should hear of.
    pub(crate) fn remark(&self) -> Option<String> {
        (self.left_out > 0)
            .then(|| format!("{} device nodes, FIFOs and sockets were left out", self.left_out))
    }

    pub(crate) fn as_json(&self) -> Value {
        json!({
            "files": self.files,
            "directories": self.folders,
            "links": self.links,
            "bytes": self.bytes,
            "left-out": self.left_out,
        })
    }
}

/// Counts the bytes that go through.
pub(crate) struct Counted<T> {
    pub(crate) inner: T,
    pub(crate) bytes: u64,
}

impl<T> Counted<T> {
    pub(crate) fn new(inner: T) -> Self {
        Self { inner, bytes: 0 }
    }

    fn count(&mut self, bytes: usize) -> usize {
        self.bytes = self.bytes.saturating_add(bytes as u64);
        bytes
    }
}

impl<T: Read> Read for Counted<T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.inner.read(buf).map(|bytes| self.count(bytes))
    }
}

impl<T: Write> Write for Counted<T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.inner.write(buf).map(|bytes| self.count(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
