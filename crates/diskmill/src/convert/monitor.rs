use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Watches a conversion from other threads, and cancels it. All numbers are bytes.
#[derive(Debug, Default)]
pub struct Monitor {
    total: AtomicU64,
    done: AtomicU64,
    read: AtomicU64,
    written: AtomicU64,
    zero: AtomicU64,
    passed: AtomicU64,
    packed: AtomicU64,
    cloned: AtomicU64,
    copied: AtomicU64,
    cancelled: AtomicBool,
}

impl Monitor {
    /// A monitor for one conversion.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the conversion soon, with [`Kind::Cancelled`](crate::Kind::Cancelled).
    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// Guest bytes in all; 0 while unknown (a pipe).
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Guest bytes that are dealt with, zeros included.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Bytes read from the source's files.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Relaxed)
    }

    /// Bytes written to the output's files.
    pub fn bytes_written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    /// Guest bytes that are zeros and were not written.
    pub fn bytes_zero(&self) -> u64 {
        self.zero.load(Relaxed)
    }

    /// Guest bytes whose packed form was taken over from the source.
    pub fn bytes_passed(&self) -> u64 {
        self.passed.load(Relaxed)
    }

    /// Guest bytes that were packed anew.
    pub fn bytes_packed(&self) -> u64 {
        self.packed.load(Relaxed)
    }

    /// Bytes whose blocks the output shares with the source.
    pub fn bytes_cloned(&self) -> u64 {
        self.cloned.load(Relaxed)
    }

    /// Bytes that were copied inside the kernel.
    pub fn bytes_copied(&self) -> u64 {
        self.copied.load(Relaxed)
    }

    pub(super) fn add_packed(&self, bytes: u64) {
        self.packed.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_cloned(&self, bytes: u64) {
        self.cloned.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_copied(&self, bytes: u64) {
        self.copied.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_passed(&self, bytes: u64) {
        self.passed.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn start(&self, total: u64) {
        self.total.store(total, Relaxed);
    }

    pub(super) fn finish(&self) {
        self.total.store(self.done(), Relaxed);
    }

    pub(crate) fn add_done(&self, bytes: u64) {
        self.done.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_read(&self, bytes: u64) {
        self.read.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_written(&self, bytes: u64) {
        self.written.fetch_add(bytes, Relaxed);
    }

    pub(super) fn add_zero(&self, bytes: u64) {
        self.zero.fetch_add(bytes, Relaxed);
    }
}
