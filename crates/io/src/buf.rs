//! Owned, page-aligned buffers.

use std::alloc::{self, Layout};
use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Alignment of every [`Buf`] in memory, in bytes: a page, which is at least what any device wants for `O_DIRECT`.
pub const BUF_ALIGN: usize = 4096;

/// Where a buffer is registered with an io_uring ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Registration {
    /// The ring's number, unique in the process for all time.
    pub(crate) ring: u64,
    /// The index in that ring's buffer table.
    pub(crate) index: u16,
}

/// An owned heap buffer, aligned to [`BUF_ALIGN`]. It dereferences to its first [`len`](Self::len) bytes.
///
/// Its memory never moves, so an engine may hand the address to the kernel for as long as it owns the buffer.
pub struct Buf {
    /// The first byte, aligned; dangling when `capacity` is 0.
    ptr: NonNull<u8>,
    /// What was allocated, which begins up to `BUF_ALIGN` bytes before that.
    block: NonNull<u8>,
    /// Initialised bytes from `ptr` on, a multiple of `BUF_ALIGN`.
    capacity: usize,
    len: usize,
    registration: Option<Registration>,
}

// SAFETY: a `Buf` owns its memory alone, like `Box<[u8]>`.
unsafe impl Send for Buf {}
// SAFETY: `&Buf` gives only `&[u8]`.
unsafe impl Sync for Buf {}

impl Buf {
    /// A buffer of `capacity` zero bytes: `len()` is `capacity`, and [`capacity()`](Self::capacity) is that rounded
    /// up to [`BUF_ALIGN`]. Big buffers cost memory only once they are touched.
    ///
    /// # Errors
    /// `OutOfMemory` where the allocator refuses (as under `RLIMIT_AS`).
    pub fn new(capacity: usize) -> io::Result<Buf> {
        let no_memory = || {
            io::Error::new(
                io::ErrorKind::OutOfMemory,
                format!(
                    "no memory for a buffer of {capacity} bytes: lower the memory limit or the number of threads"
                ),
            )
        };
        let size = capacity.checked_next_multiple_of(BUF_ALIGN).ok_or_else(no_memory)?;
        if size == 0 {
            let none = NonNull::dangling();
            return Ok(Buf { ptr: none, block: none, capacity: 0, len: 0, registration: None });
        }
        let layout = Self::layout(size).ok_or_else(no_memory)?;
        // SAFETY: the layout's size is not 0.
        let block = NonNull::new(unsafe { alloc::alloc_zeroed(layout) }).ok_or_else(no_memory)?;
        // SAFETY: the block is `BUF_ALIGN` bytes larger than the buffer, and the offset less than that.
        let ptr = unsafe { block.add(block.addr().get().wrapping_neg() % BUF_ALIGN) };
        Ok(Buf { ptr, block, capacity: size, len: capacity, registration: None })
    }

    /// What is allocated for `capacity` bytes. Were `BUF_ALIGN` asked for, the allocator would clear the memory by writing
    /// to all of it, instead of taking pages from the system that are zeros until they are touched.
    fn layout(capacity: usize) -> Option<Layout> {
        Layout::from_size_align(capacity.checked_add(BUF_ALIGN)?, 1).ok()
    }

    /// The bytes in use.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no bytes are in use.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes allocated: a multiple of [`BUF_ALIGN`].
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Sets the bytes in use to `len`, or to the capacity if that is less. Bytes that come into use keep what they
    /// last held (zeros at first).
    pub fn set_len(&mut self, len: usize) {
        self.len = len.min(self.capacity);
    }

    /// The address of the first byte, without a reference to the bytes.
    pub(crate) fn address(&self) -> usize {
        self.ptr.as_ptr().addr()
    }

    pub(crate) fn registration(&self) -> Option<Registration> {
        self.registration
    }

    pub(crate) fn set_registration(&mut self, registration: Option<Registration>) {
        self.registration = registration;
    }

    /// The address of the first byte, for the kernel; all `capacity` bytes behind it may be written through it.
    pub(crate) fn as_raw(&mut self) -> *mut u8 {
        self.ptr.as_ptr()
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.capacity).filter(|_| self.capacity != 0) {
            // SAFETY: allocated in `new` with this very layout.
            unsafe { alloc::dealloc(self.block.as_ptr(), layout) }
        }
    }
}

impl Deref for Buf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len <= capacity` bytes are allocated and initialised (zeroed at first); dangling is fine for 0.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`, and `&mut self` makes the access unique.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for Buf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buf")
            .field("len", &self.len)
            .field("capacity", &self.capacity)
            .field("registration", &self.registration)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_zero() {
        for n in [0, 1, 4095, 4096, 4097, 3 << 20] {
            let buf = Buf::new(n).unwrap();
            assert_eq!(buf.as_ptr().addr() % BUF_ALIGN, usize::from(n == 0), "{n}");
            assert_eq!(buf.len(), n);
            assert_eq!(buf.capacity(), n.next_multiple_of(BUF_ALIGN));
            assert!(buf.iter().all(|&b| b == 0));
        }
    }

    #[test]
    fn costs_memory_only_when_touched() {
        let resident = || {
            let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
            pages.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let before = resident();
        let buf = Buf::new(256 << 20).unwrap();
        assert!(resident() < before + (128 << 20));
        drop(buf);
    }

    #[test]
    fn length_is_clamped_and_content_kept() {
        let mut buf = Buf::new(5000).unwrap();
        buf[4999] = 7;
        buf.set_len(10);
        assert_eq!(buf.len(), 10);
        buf.set_len(usize::MAX);
        assert_eq!(buf.len(), 8192);
        assert_eq!(buf[4999], 7);
    }

    #[test]
    fn refuses_instead_of_aborting() {
        for n in [usize::MAX, isize::MAX as usize, 1 << 60] {
            assert_eq!(Buf::new(n).unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        }
    }
}
