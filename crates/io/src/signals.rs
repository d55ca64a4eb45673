use std::mem::MaybeUninit;
use std::ptr;

/// Whether this process ignores `signal`, as `nohup` and shells have the programs do that they start in the background.
/// False for what is no signal.
pub fn is_ignored(signal: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: without a new action the call changes nothing; it fills `action` if it succeeds.
    let known = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } == 0;
    // SAFETY: the call succeeded.
    known && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

#[cfg(test)]
mod tests {
    use super::is_ignored;

    #[test]
    fn tells_what_is_ignored() {
        // Rust programs ignore SIGPIPE from the start; nobody can ignore SIGKILL.
        assert!(is_ignored(libc::SIGPIPE));
        assert!(!is_ignored(libc::SIGKILL));
        assert!(!is_ignored(-1));
    }
}
