//! Where clients come in.

use std::fmt::{self, Write as _};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

use crate::stream::Stream;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 64;

/// Where to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket of this name, for the current user alone (mode 0600). Shorter than 108 bytes, as the system wants.
    Unix(PathBuf),
    /// A TCP port; 0 for any that is free. The protocol has no password here: loopback, or a network that is trusted.
    Tcp(SocketAddr),
}

impl Address {
    /// The NBD URI of `export` here (<https://github.com/NetworkBlockDevice/nbd/blob/master/doc/uri.md>).
    #[must_use]
    pub fn uri(&self, export: &str) -> String {
        let export = percent(export.as_bytes());
        match self {
            Self::Unix(path) => {
                format!("nbd+unix:///{export}?socket={}", percent(path.as_os_str().as_bytes()))
            }
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

/// Escapes what may not stand in a URI.
fn percent(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                text.push(char::from(byte));
            }
            // Writing to a string does not fail.
            _ => drop(write!(text, "%{byte:02X}")),
        }
    }
    text
}

/// A socket that accepts clients; never blocks. Dropped, it removes its socket file.
pub(crate) struct Listener {
    socket: Socket,
    pub(crate) address: Address,
    _file: Option<SocketFile>,
}

enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let socket = bind_unix(path)?;
                let meta = path.symlink_metadata()?;
                let file = SocketFile { path: path.clone(), identity: (meta.dev(), meta.ino()) };
                Ok(Self { socket: Socket::Unix(socket), address: address.clone(), _file: Some(file) })
            }
            Address::Tcp(wanted) => {
                let socket = TcpListener::bind(wanted)?;
                socket.set_nonblocking(true)?;
                let address = Address::Tcp(socket.local_addr()?);
                Ok(Self { socket: Socket::Tcp(socket), address, _file: None })
            }
        }
    }

    /// The next client; `WouldBlock` if there is none.
    pub(crate) fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix(socket) => Ok(Stream::Unix(socket.accept()?.0)),
            Socket::Tcp(socket) => {
                let (stream, _) = socket.accept()?;
                // Replies are written whole: waiting for more only delays them.
                stream.set_nodelay(true)?;
                // A client that vanished without a word must not hold its place for ever.
                rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path).map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name of a Unix socket has at most 107 bytes: use a shorter folder, such as one in /tmp or /run",
        )
    })?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // Linux gives the file the permissions of the socket, so that there is no moment at which others may connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    match bind(&socket, &address) {
        Err(rustix::io::Errno::ADDRINUSE) => {
            remove_stale(path)?;
            bind(&socket, &address)?;
        }
        result => result?,
    }
    listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Removes the socket of a server that was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    let taken = |why| Err(io::Error::new(io::ErrorKind::AddrInUse, why));
    if !path.symlink_metadata()?.file_type().is_socket() {
        return taken("there is a file of this name, and it is no socket");
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => taken("another server listens at this socket"),
    }
}

/// The name of a bound socket.
struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let found = self.path.symlink_metadata().map(|meta| (meta.dev(), meta.ino()));
        if found.is_ok_and(|found| found == self.identity) {
            // Gone meanwhile is as good.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl fmt::Debug for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listener").field("address", &self.address).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_socket_is_private_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let address = Address::Unix(path.clone());
        let listener = Listener::bind(&address).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(Listener::bind(&address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(!path.exists());
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(Listener::bind(&Address::Unix(path.clone())).unwrap());
        std::fs::write(&path, "mine").unwrap();
        assert!(Listener::bind(&Address::Unix(path.clone())).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn somebody_elses_socket_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(listener);
        assert!(path.exists());
    }

    #[test]
    fn uris_are_escaped() {
        assert_eq!(Address::Unix("/a b/é".into()).uri("x?"), "nbd+unix:///x%3F?socket=/a%20b/%C3%A9");
        assert_eq!(Address::Tcp("127.0.0.1:10809".parse().unwrap()).uri(""), "nbd://127.0.0.1:10809/");
        assert_eq!(Address::Tcp("[::1]:9".parse().unwrap()).uri("d"), "nbd://[::1]:9/d");
    }

    #[test]
    fn a_name_that_is_too_long_is_explained() {
        let error = Listener::bind(&Address::Unix(format!("/{}", "a".repeat(120)).into())).unwrap_err();
        assert!(error.to_string().contains("107 bytes"), "{error}");
    }
}
