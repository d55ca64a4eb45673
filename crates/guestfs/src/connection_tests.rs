//! The client's side of the protocol against servers that play guestfish, well and badly.

use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketAddrUnix, SocketFlags,
    SocketType, bind, connect, listen, recvmsg, socket_with,
};

use super::{Connection, Input, Patience};
use crate::wire::{self, Status, decode};
use crate::{Cancel, Kind, Result};

/// The server's end: the socket, the client's output, what has been received and not yet looked at.
struct Server {
    socket: UnixStream,
    output: std::fs::File,
    received: Vec<u8>,
}

impl Server {
    /// Takes the byte with the descriptor and the hello.
    fn accept(socket: UnixStream) -> Self {
        let mut byte = [0xff];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = recvmsg(&socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC);
        assert_eq!((got.unwrap().bytes, byte), (1, [0]));
        let mut fds: Vec<OwnedFd> = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        assert_eq!(fds.len(), 1, "exactly one descriptor");
        let mut server = Self { socket, output: fds.remove(0).into(), received: Vec::new() };
        assert_eq!(server.next(|bytes| Ok(decode::string(bytes)?.map(<[u8]>::to_vec))), b"1.48.6");
        server
    }

    fn next<T>(&mut self, parse: impl Fn(&mut &[u8]) -> Result<Option<T>>) -> T {
        loop {
            let mut rest = &self.received[..];
            if let Some(found) = parse(&mut rest).unwrap() {
                self.received = rest.to_vec();
                return found;
            }
            let mut chunk = [0; 4096];
            let len = self.socket.read(&mut chunk).unwrap();
            assert!(len > 0, "the client has gone");
            self.received.extend_from_slice(&chunk[..len]);
        }
    }

    fn call(&mut self) -> decode::Call {
        self.next(decode::call)
    }

    fn answer(&mut self, status: i32) {
        self.socket.write_all(&status.to_be_bytes()).unwrap();
    }
}

/// A connection to a server that does as `play` says.
fn with(play: impl FnOnce(Server) + Send + 'static) -> (Connection, JoinHandle<()>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || play(Server::accept(theirs)));
    (Connection::over(ours, "1.48.6").unwrap(), server)
}

fn call(connection: &mut Connection, silence: Duration) -> Result<(Status, Vec<u8>)> {
    let cancel = Cancel::new().unwrap();
    let mut out = Vec::new();
    let mut sink = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        Ok(())
    };
    let mut patience = Patience {
        cancel: &cancel,
        silence: Some(silence),
        until: None,
        alive: &mut || false,
        grace: Duration::ZERO,
    };
    let request = wire::call("ls", &[b"/".to_vec()]).unwrap();
    let status = connection.call(&request, None, &mut sink, &mut patience)?;
    Ok((status, out))
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_call_its_output_and_an_answer_in_pieces() {
    let (mut connection, server) = with(|mut server| {
        let call = server.call();
        assert_eq!(
            (&call.name[..], &call.args[..], call.exit_on_error),
            (&b"ls"[..], &[b"/".to_vec()][..], false)
        );
        server.output.write_all(b"bin\0\xff\n").unwrap();
        for byte in 0i32.to_be_bytes() {
            server.socket.write_all(&[byte]).unwrap();
            std::thread::sleep(Duration::from_millis(5));
        }
        server.call();
        server.answer(-1);
    });
    assert_eq!(call(&mut connection, LONG).unwrap(), (Status::Done, b"bin\0\xff\n".to_vec()));
    assert_eq!(call(&mut connection, LONG).unwrap(), (Status::Failed, Vec::new()));
    server.join().unwrap();
}

#[test]
fn a_giant_output_is_whole_before_the_answer() {
    let (mut connection, server) = with(|mut server| {
        server.call();
        // Far more than the pipe holds: the client must read while it waits.
        server.output.write_all(&vec![7; 40 << 20]).unwrap();
        server.answer(0);
    });
    let (status, out) = call(&mut connection, LONG).unwrap();
    assert_eq!((status, out.len(), out.iter().all(|&b| b == 7)), (Status::Done, 40 << 20, true));
    server.join().unwrap();
}

#[test]
fn a_server_that_refuses_the_version_or_dies_in_the_middle() {
    let (mut connection, server) = with(drop);
    server.join().unwrap();
    assert_eq!(call(&mut connection, LONG).unwrap_err().kind(), Kind::Version);

    let (mut connection, server) = with(|mut server| {
        server.call();
        server.answer(0);
        server.call();
        server.socket.write_all(&[0, 0]).unwrap();
    });
    call(&mut connection, LONG).unwrap();
    assert_eq!(call(&mut connection, LONG).unwrap_err().kind(), Kind::Died);
    server.join().unwrap();
}

#[test]
fn an_answer_that_is_neither_0_nor_minus_1() {
    let (mut connection, server) = with(|mut server| {
        server.call();
        server.answer(7);
    });
    assert_eq!(call(&mut connection, LONG).unwrap_err().kind(), Kind::Protocol);
    server.join().unwrap();
}

#[test]
fn silence_ends_the_wait_and_output_is_a_sign_of_life() {
    let (mut connection, server) = with(|mut server| {
        server.call();
        for _ in 0..10 {
            server.output.write_all(b".").unwrap();
            std::thread::sleep(Duration::from_millis(200));
        }
        server.answer(0);
        server.call();
        let _ = server.socket.read(&mut [0]);
    });
    // Two seconds in all, but never one without output.
    assert_eq!(
        call(&mut connection, Duration::from_secs(1)).unwrap(),
        (Status::Done, b"..........".to_vec())
    );
    let began = Instant::now();
    assert_eq!(call(&mut connection, Duration::from_millis(300)).unwrap_err().kind(), Kind::Timeout);
    assert!(began.elapsed() < Duration::from_secs(10));
    drop(connection);
    server.join().unwrap();
}

#[test]
fn a_switch_ends_the_wait_at_once() {
    // Silent, whether or not the call gets through before it is cancelled.
    let (mut connection, server) = with(|mut server| {
        let _ = server.socket.read_to_end(&mut Vec::new());
    });
    let cancel = Cancel::new().unwrap();
    cancel.cancel();
    let mut patience =
        Patience { cancel: &cancel, silence: None, until: None, alive: &mut || false, grace: Duration::ZERO };
    let request = wire::call("ls", &[]).unwrap();
    let error = connection.call(&request, None, &mut |_| Ok(()), &mut patience).unwrap_err();
    assert_eq!(error.kind(), Kind::Cancelled);
    drop(connection);
    server.join().unwrap();
}

/// A call that uploads `source`, of which the server reads all before it answers.
fn upload(source: &mut dyn io::Read) -> (Result<Status>, Vec<u8>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = std::thread::spawn(move || {
        let mut server = Server::accept(theirs);
        let name = String::from_utf8(server.call().args.remove(0)).unwrap();
        let content = std::fs::read(name).unwrap();
        server.answer(0);
        content
    });
    let mut connection = Connection::over(ours, "1.48.6").unwrap();
    let cancel = Cancel::new().unwrap();
    let mut input = Input::new(source).unwrap();
    let request = wire::call("upload", &[input.name(), b"/x".to_vec()]).unwrap();
    let mut patience = Patience {
        cancel: &cancel,
        silence: Some(LONG),
        until: None,
        alive: &mut || false,
        grace: Duration::ZERO,
    };
    let status = connection.call(&request, Some(&mut input), &mut |_| Ok(()), &mut patience);
    (status, server.join().unwrap())
}

#[test]
fn a_stream_in_is_whole_and_its_failure_is_told() {
    let content: Vec<u8> = (0..=255u8).cycle().take(5_000_003).collect();
    let (status, got) = upload(&mut &content[..]);
    assert!(status.unwrap() == Status::Done && got == content);
    let (status, got) = upload(&mut &b""[..]);
    assert!(status.unwrap() == Status::Done && got.is_empty());

    struct Broken;
    impl io::Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("worn out"))
        }
    }
    let error = upload(&mut Broken).0.unwrap_err();
    assert!(error.kind() == Kind::Io && error.to_string().contains("worn out"), "{error}");
}

/// A cancelled call is waited for, so that the next one can be made; not for ever.
#[test]
fn a_call_that_is_cancelled_ends_or_is_known_to_go_on() {
    let (mut connection, server) = with(|mut server| {
        let name = String::from_utf8(server.call().args.remove(0)).unwrap();
        assert_eq!(std::fs::read(name).unwrap(), b"begun");
        server.answer(0);
        server.call();
        let _ = server.socket.read_to_end(&mut Vec::new());
    });
    let cancel = Cancel::new().unwrap();
    let theirs = cancel.clone();
    /// Begins, then is interrupted.
    struct Begun(Cancel, bool);
    impl io::Read for Begun {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if std::mem::replace(&mut self.1, true) {
                self.0.cancel();
                return Err(io::Error::other("interrupted"));
            }
            buf[..5].copy_from_slice(b"begun");
            Ok(5)
        }
    }
    let mut source = Begun(theirs, false);
    let mut input = Input::new(&mut source).unwrap();
    let request = wire::call("upload", &[input.name(), b"/x".to_vec()]).unwrap();
    let mut patience =
        Patience { cancel: &cancel, silence: None, until: None, alive: &mut || false, grace: LONG };
    let error = connection.call(&request, Some(&mut input), &mut |_| Ok(()), &mut patience).unwrap_err();
    assert_eq!((error.kind(), connection.is_busy()), (Kind::Cancelled, false));

    let cancel = Cancel::new().unwrap();
    let theirs = cancel.clone();
    let switch = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        theirs.cancel();
    });
    let grace = Duration::from_millis(300);
    let mut patience = Patience { cancel: &cancel, silence: None, until: None, alive: &mut || false, grace };
    let request = wire::call("ls", &[]).unwrap();
    let error = connection.call(&request, None, &mut |_| Ok(()), &mut patience).unwrap_err();
    assert_eq!((error.kind(), connection.is_busy()), (Kind::Cancelled, true));
    switch.join().unwrap();
    drop(connection);
    server.join().unwrap();
}

#[test]
fn a_server_that_takes_no_more_clients_is_not_waited_for_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket");
    let address = SocketAddrUnix::new(&path).unwrap();
    let socket =
        || socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
    let listening = socket();
    bind(&listening, &address).unwrap();
    listen(&listening, 0).unwrap();
    let mut clients = Vec::new();
    loop {
        clients.push(socket());
        if connect(clients.last().unwrap(), &address).is_err() {
            break;
        }
    }
    let open = |cancel: &Cancel, silence: Option<Duration>, until: Option<Instant>| {
        let grace = Duration::ZERO;
        let mut patience = Patience { cancel, silence, until, alive: &mut || false, grace };
        Connection::open(&path, "1.48.6", &mut patience).unwrap_err().kind()
    };
    let cancel = Cancel::new().unwrap();
    let short = Duration::from_millis(200);
    assert_eq!(open(&cancel, Some(short), None), Kind::Timeout);
    assert_eq!(open(&cancel, None, Some(Instant::now() + short)), Kind::Timeout);
    cancel.cancel();
    assert_eq!(open(&cancel, None, None), Kind::Cancelled);
}
