use std::io;

/// Lets programs that are started from now on inherit no open file but the standard ones: what the caller of this program
/// has open, such as the lock of a script, is no business of a process that outlives it. Our own files are not inherited
/// anyway.
///
/// # Errors
/// `ENOSYS` and `EINVAL` before Linux 5.11, which has no such call.
pub fn inherit_nothing() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: it closes nothing and takes no pointers: each descriptor stays what it is for whoever owns it.
    let result = unsafe { libc::close_range(FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::process::Command;

    #[test]
    fn children_do_not_see_our_files() {
        let file = File::open("/dev/null").unwrap();
        // SAFETY: a fresh descriptor, which is nobody's and stays open.
        let inherited = unsafe { libc::dup(file.as_raw_fd()) };
        let seen = || {
            let name = format!("/proc/self/fd/{inherited}");
            Command::new("test").args(["-e", &name]).status().unwrap().success()
        };
        assert!(seen());
        super::inherit_nothing().unwrap();
        assert!(!seen());
    }
}
