//! The protocol, byte by byte, with a client that knows no manners.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

mod client;

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use diskmill_nbd::{Address, MAX_NAME, Settings};

use client::*;

#[test]
fn options_are_answered_by_the_specification() {
    let fixture = serve(&disk(false), |settings| settings.export_name = "disk".to_owned());
    let mut client = Client::greet(&fixture.socket());
    let cases: [(u32, Vec<u8>, &[u32]); 19] = [
        (LIST, vec![], &[2, ACK]),
        (LIST, vec![0], &[ERR_INVALID]),
        (STARTTLS, vec![], &[ERR_UNSUP]),
        (11, vec![], &[ERR_UNSUP]),
        (0xffff_ffff, vec![1; 100], &[ERR_UNSUP]),
        (INFO, info("", &[]), &[3, 3, ACK]),
        (INFO, info("disk", &[1, 2, 3, 99]), &[3, 3, 3, 3, ACK]),
        (INFO, info("other", &[]), &[ERR_UNKNOWN]),
        (INFO, vec![], &[ERR_INVALID]),
        (INFO, vec![0xff; 40], &[ERR_INVALID]),
        (INFO, [info("", &[1]), vec![0]].concat(), &[ERR_INVALID]),
        (INFO, vec![0; (64 << 10) + 1], &[ERR_TOO_BIG]),
        (LIST_META, contexts("disk", &[]), &[4, ACK]),
        (LIST_META, contexts("disk", &["base:"]), &[4, ACK]),
        (LIST_META, contexts("disk", &["qemu:", "base:allocation2"]), &[ACK]),
        (LIST_META, contexts("other", &[]), &[ERR_UNKNOWN]),
        // Structured replies come first.
        (SET_META, contexts("disk", &["base:allocation"]), &[ERR_INVALID]),
        (LIST_META, [string("disk"), vec![0xff; 4]].concat(), &[ERR_INVALID]),
        (STRUCTURED, vec![], &[ACK]),
    ];
    for (option, data, want) in cases {
        client.option(option, &data);
        assert_eq!(client.kinds(), want, "option {option}, {} bytes", data.len());
    }
    client.option(SET_META, &contexts("disk", &["base:"]));
    assert_eq!(client.kinds(), [ACK], "only whole names can be set");
    client.option(SET_META, &contexts("disk", &["x", "base:allocation"]));
    assert_eq!(client.kinds(), [4, ACK]);
    client.option(INFO, &info("disk", &[]));
    let (_, kind, export) = client.option_reply();
    assert_eq!((kind, &export[..2], &export[2..10]), (3, &[0, 0][..], &SIZE.to_be_bytes()[..]));
    // HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_DF, CAN_MULTI_CONN, SEND_CACHE.
    assert_eq!(u16::from_be_bytes([export[10], export[11]]), 0b101_1000_0111);
    assert_eq!(client.kinds(), [3, ACK]);
    client.option(ABORT, &[]);
    assert_eq!(client.kinds(), [ACK]);
    client.closed();
}

#[test]
fn names_and_descriptions_are_as_long_as_clients_may_take_them() {
    let name = "n".repeat(MAX_NAME);
    let disk = Disk { description: "é".repeat(5000), ..disk(false) };
    let fixture = serve(&disk, |settings| settings.export_name.clone_from(&name));
    let mut client = Client::greet(&fixture.socket());
    client.option(INFO, &info(&name, &[2]));
    let texts: Vec<_> = [3, 3, 3, ACK].map(|kind| (client.option_reply(), kind)).into();
    for ((_, got, text), want) in texts {
        assert!(got == want && text.len() <= 2 + MAX_NAME, "{got} of {} bytes", text.len());
    }
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("s"));
    let settings = Settings { export_name: name + "n", ..Settings::default() };
    assert_eq!(diskmill_nbd::serve(disk, &address, settings).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn the_old_way_in_works() {
    let fixture = serve(&disk(false), |_| ());
    for (flags, padding) in [(3u32, 0), (1, 124)] {
        let mut client = Client::connect(&fixture.socket());
        client.put(&[&flags.to_be_bytes()]);
        client.option(EXPORT_NAME, b"");
        assert_eq!(client.u64(), SIZE);
        assert_eq!(client.u16(), 0b101_0000_0111);
        assert_eq!(client.take(padding), vec![0; padding]);
        assert!(client.read(5, 300).unwrap().bytes == expected(5, 300));
    }
}

#[test]
fn reads_show_holes_and_reach_the_last_byte() {
    let fixture = serve(&disk(false), |_| ());
    let mut plain = Client::go(&fixture.socket(), false);
    let mut chunked = Client::go(&fixture.socket(), true);
    let ranges =
        [(0, 1), (1, 512), (HOLE - 10, 20), (HOLE - 5000, 10_000), (SIZE - 512, 512), (0, 32 << 20), (7, 0)];
    for (at, len) in ranges {
        for client in [&mut plain, &mut chunked] {
            let reply = client.read(at, len).unwrap();
            assert!(reply.bytes == expected(at, len.into()), "{len} bytes at {at}");
        }
    }
    let reply = chunked.read(HOLE - 5000, 10_000).unwrap();
    assert_eq!(reply.chunks, [(HOLE - 5000, 5000, false), (HOLE, 5000, true)]);
    let reply = chunked.read(HOLE - MIB, 20 << 20).unwrap();
    let holes: Vec<_> = reply.chunks.iter().filter(|chunk| chunk.2).collect();
    assert_eq!(holes, [&(HOLE, 16 * MIB, true)]);
    // In one piece.
    for (at, len) in [(HOLE - 5000, 10_000), (HOLE - MIB, 20 << 20)] {
        chunked.request(DF, READ, at, len);
        let reply = chunked.reply(at, len.into()).unwrap();
        assert_eq!(reply.chunks, [(at, u64::from(len), false)]);
        assert!(reply.bytes == expected(at, len.into()));
    }
    // A chunk of data has at least one byte, and the end of the disk is no place beyond it.
    for (flags, at) in [(0, 7), (DF, 7), (DF, HOLE), (DF, SIZE)] {
        chunked.request(flags, READ, at, 0);
        assert_eq!(chunked.reply(at, 0).unwrap().chunks, []);
    }
}

#[test]
fn bad_requests_are_refused_and_the_next_is_served() {
    let fixture = serve(&disk(false), |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        let refused: [(u16, u16, u64, u32, u32); 12] = [
            (0, READ, SIZE, 1, EINVAL),
            (0, READ, SIZE - 1, 2, EINVAL),
            (0, READ, u64::MAX, 1, EINVAL),
            (0, READ, u64::MAX - 5, u32::MAX, EINVAL),
            (0, READ, 0, (32 << 20) + 1, EINVAL),
            (0x4000, READ, 0, 1, EINVAL),
            (0, TRIM, 0, 512, EPERM),
            (0, WRITE_ZEROES, 0, 512, EPERM),
            (0, 99, 0, 512, EINVAL),
            (0, 0xffff, 0, 0, EINVAL),
            (0, CACHE, SIZE, 512, EINVAL),
            (0, BLOCK_STATUS, 0, 0, EINVAL),
        ];
        for (flags, command, at, len, error) in refused {
            assert_eq!(client.ask(flags, command, at, len).unwrap_err(), error, "{command} {at} {len}");
        }
        assert_eq!(client.write(0, 0, &[1; 512]).unwrap_err(), EPERM);
        assert_eq!(client.write(FUA, 0, &vec![1; 3 << 20]).unwrap_err(), EPERM);
        client.ask(0, FLUSH, 0, 0).unwrap();
        client.ask(0, CACHE, 0, 512).unwrap();
        assert!(client.read(9, 9).unwrap().bytes == expected(9, 9));
    }
}

#[test]
fn damage_ends_a_reply_and_not_the_connection() {
    let fixture = serve(&disk(false), |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        for (at, len) in [(BAD, 1), (BAD - 4 * MIB, 8 << 20)] {
            assert_eq!(client.read(at, len).unwrap_err(), EIO);
        }
        assert!(client.read(BAD + 1, 10).unwrap().bytes == expected(BAD + 1, 10));
    }
    fixture.says("a bad spot");
}

#[test]
fn block_status_tells_holes() {
    let fixture = serve(&disk(false), |_| ());
    let mut client = Client::go(&fixture.socket(), true);
    let all = SIZE as u32;
    let (hole, len) = (HOLE as u32, 16 << 20);
    let reply = client.ask(0, BLOCK_STATUS, 0, all).unwrap();
    assert_eq!(reply.status, [(hole, 0), (len, 3), (all - hole - len, 0)]);
    let reply = client.ask(REQ_ONE, BLOCK_STATUS, HOLE + 5, all - hole - 5).unwrap();
    assert_eq!(reply.status, [(len - 5, 3)]);
    assert_eq!(client.ask(0, BLOCK_STATUS, 5, all).unwrap_err(), EINVAL);
    // Not without the context.
    let mut client = Client::go(&fixture.socket(), false);
    assert_eq!(client.ask(0, BLOCK_STATUS, 0, 512).unwrap_err(), EINVAL);
}

#[test]
fn writes_arrive_where_they_are_allowed() {
    let disk = disk(true);
    let fixture = serve(&disk, |_| ());
    for structured in [false, true] {
        let mut client = Client::go(&fixture.socket(), structured);
        for len in [1, 4096, 1 << 20, (3 << 20) + 7] {
            let data: Vec<u8> = (0..len).map(|i| (i % 199) as u8).collect();
            client.write(0, 1000, &data).unwrap();
            assert!(client.read(1000, len).unwrap().bytes == data, "{len}");
        }
        client.ask(0, WRITE_ZEROES, 1000, 100).unwrap();
        client.ask(0, TRIM, 1100, 100).unwrap();
        assert!(client.read(1000, 200).unwrap().bytes == [0; 200]);
        assert_eq!(client.write(0, SIZE - 1, &[1, 2]).unwrap_err(), ENOSPC);
        assert_eq!(client.write(0, SIZE - 1, &vec![1; 2 << 20]).unwrap_err(), ENOSPC);
        // A trim needs no space.
        for (command, error) in [(TRIM, EINVAL), (WRITE_ZEROES, ENOSPC)] {
            for (at, len) in [(SIZE, 1), (SIZE - 1, 2), (u64::MAX, 1)] {
                assert_eq!(client.ask(0, command, at, len).unwrap_err(), error, "{command} {at} {len}");
            }
        }
        let before = *disk.flushes.lock().unwrap();
        client.write(FUA, 0, &[1]).unwrap();
        client.ask(0, FLUSH, 0, 0).unwrap();
        assert_eq!(*disk.flushes.lock().unwrap(), before + 2);
    }
}

#[test]
fn requests_overlap() {
    let fixture = serve(&disk(false), |_| ());
    let mut client = Client::go(&fixture.socket(), false);
    // All at once; the answers come in any order.
    let first = client.cookie + 1;
    for i in 0..200 {
        client.request(0, READ, i * 1000, 1000);
    }
    let mut seen = [false; 200];
    for _ in 0..200 {
        assert_eq!((client.u32(), client.u32()), (0x6744_6698, 0));
        let i = client.u64() - first;
        assert!(client.take(1000) == expected(i * 1000, 1000));
        assert!(!std::mem::replace(&mut seen[i as usize], true));
    }
}

#[test]
fn nonsense_ends_the_connection_and_nothing_else() {
    let fixture = serve(&disk(false), |_| ());
    let socket = fixture.socket();
    let before: [&dyn Fn(&mut Client); 7] = [
        &|client| client.put(&[b"GET / HTTP/1.1\r\n\r\n"]),
        &|client| client.put(&[&0xffff_ffffu32.to_be_bytes()]),
        &|client| client.put(&[&0u32.to_be_bytes()]),
        &|client| client.put(&[&3u32.to_be_bytes(), &[0x55; 16]]),
        &|client| client.put(&[&3u32.to_be_bytes(), &OPTION.to_be_bytes(), &[0xff; 8]]),
        &|client| {
            client.put(&[&3u32.to_be_bytes()]);
            client.option(EXPORT_NAME, b"no such export");
        },
        &|client| {
            client.put(&[&3u32.to_be_bytes()]);
            // More may not fit into the socket once the server has gone.
            let option = [&OPTION.to_be_bytes()[..], &[0, 0, 0, 77, 0, 0, 0, 0]].concat();
            let _ = client.socket.write_all(&option.repeat(300));
        },
    ];
    for (i, act) in before.into_iter().enumerate() {
        let mut client = Client::connect(&socket);
        act(&mut client);
        client.closed();
        println!("case {i} closed");
    }
    for structured in [false, true] {
        let mut client = Client::go(&socket, structured);
        client.put(&[&[0x11; 28]]);
        client.closed();
        let mut client = Client::go(&socket, structured);
        client.request(0, WRITE, 0, (32 << 20) + 1);
        client.closed();
        let mut client = Client::go(&socket, structured);
        client.request(0, DISC, 0, 0);
        client.closed();
    }
    fixture.says("broke the protocol");
    fixture.still_serves();
}

#[test]
fn clients_may_vanish_at_any_byte() {
    let fixture = serve(&disk(false), |settings| settings.connections = 1000);
    let mut script = 3u32.to_be_bytes().to_vec();
    for (option, data) in
        [(STRUCTURED, vec![]), (SET_META, contexts("", &["base:allocation"])), (GO, info("", &[3]))]
    {
        script.extend(OPTION.to_be_bytes());
        script.extend(option.to_be_bytes());
        script.extend((data.len() as u32).to_be_bytes());
        script.extend(data);
    }
    script.extend(REQUEST.to_be_bytes());
    script.extend([0; 12]);
    script.extend(0u64.to_be_bytes());
    script.extend((8u32 << 20).to_be_bytes());
    for end in 0..script.len() {
        let mut socket = UnixStream::connect(fixture.socket()).unwrap();
        socket.write_all(&script[..end]).unwrap();
    }
    fixture.log.lock().unwrap().clear();
    // Leaves in the middle of its reply, which is nothing to speak of.
    for _ in 0..20 {
        let mut client = Client::go(&fixture.socket(), true);
        client.request(0, READ, 0, 8 << 20);
        client.take(100_000);
    }
    std::thread::sleep(Duration::from_millis(200));
    fixture.still_serves();
    let log = fixture.log.lock().unwrap().clone();
    assert!(!log.iter().any(|line| line.contains("panicked") || line.contains("pipe")), "{log:?}");
}

#[test]
fn negotiation_has_a_deadline_even_for_those_who_trickle() {
    let fixture = serve(&disk(false), |settings| settings.negotiation_time = Duration::from_millis(300));
    let silent = Client::connect(&fixture.socket());
    let mut trickling = Client::greet(&fixture.socket());
    let start = Instant::now();
    let option = [&OPTION.to_be_bytes()[..], &[0, 0, 0, 77, 1, 0, 0, 0]].concat();
    trickling.put(&[&option]);
    while trickling.socket.write_all(&[0]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(5), "still open");
        std::thread::sleep(Duration::from_millis(20));
    }
    silent.closed();
    fixture.says("not finished within");
    // Nobody is hurried after that.
    let mut client = Client::go(&fixture.socket(), true);
    std::thread::sleep(Duration::from_millis(500));
    assert!(client.read(1, 1).is_ok());
}

#[test]
fn there_may_be_no_deadline() {
    for time in [Duration::MAX, Duration::from_secs(1 << 62)] {
        let fixture = serve(&disk(false), |settings| settings.negotiation_time = time);
        fixture.still_serves();
        assert_eq!(*fixture.log.lock().unwrap(), [""; 0]);
    }
}

#[test]
fn there_are_only_so_many_clients() {
    let fixture = serve(&disk(false), |settings| settings.connections = 2);
    let first = Client::go(&fixture.socket(), true);
    let _second = Client::go(&fixture.socket(), true);
    let mut third = UnixStream::connect(fixture.socket()).unwrap();
    assert_eq!(third.read(&mut [0; 18]).unwrap(), 0, "closed without a word");
    fixture.says("turned away");
    drop(first);
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let mut next = UnixStream::connect(fixture.socket()).unwrap();
        if next.read(&mut [0; 18]).unwrap() == 18 {
            return;
        }
        assert!(Instant::now() < until, "the place of the first is not free");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn one_connection_is_no_invitation_to_more() {
    for (connections, flags) in [(1, 0b100_0000_0111), (2, 0b101_0000_0111)] {
        let fixture = serve(&disk(false), |settings| settings.connections = connections);
        let mut client = Client::greet(&fixture.socket());
        client.option(EXPORT_NAME, b"");
        assert_eq!((client.u64(), client.u16()), (SIZE, flags));
    }
}

#[test]
fn stopping_ends_all_and_removes_the_socket() {
    let fixture = serve(&disk(false), |_| ());
    let socket = fixture.socket();
    let mut busy = Client::go(&socket, true);
    let idle = Client::go(&socket, true);
    let silent = Client::connect(&socket);
    // More than the socket holds, and never read.
    for _ in 0..8 {
        busy.request(0, READ, 0, 8 << 20);
    }
    let start = Instant::now();
    fixture.server.stop().unwrap();
    assert!(start.elapsed() < Duration::from_secs(5));
    assert!(!socket.exists());
    for client in [busy, idle, silent] {
        client.closed();
    }
}

#[test]
fn the_last_client_may_end_it() {
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let socket = fixture.socket();
    let first = Client::go(&socket, true);
    let second = Client::go(&socket, true);
    drop(first);
    std::thread::sleep(Duration::from_millis(100));
    assert!(socket.exists());
    drop(second);
    fixture.server.wait().unwrap();
    assert!(!socket.exists());
}

#[test]
fn who_never_was_a_client_does_not_end_it() {
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let socket = fixture.socket();
    drop(UnixStream::connect(&socket).unwrap());
    drop(Client::greet(&socket));
    let mut lister = Client::greet(&socket);
    for (option, data, want) in [(LIST, vec![], &[2, ACK][..]), (INFO, info("", &[]), &[3, 3, ACK])] {
        lister.option(option, &data);
        assert_eq!(lister.kinds(), want);
    }
    lister.option(ABORT, &[]);
    assert_eq!(lister.kinds(), [ACK]);
    lister.closed();
    // Another server looks whether the socket is stale.
    let other = diskmill_nbd::serve(disk(false), &Address::Unix(socket.clone()), Settings::default());
    assert_eq!(other.unwrap_err().kind(), ErrorKind::AddrInUse);
    std::thread::sleep(Duration::from_millis(200));
    fixture.still_serves();
    fixture.server.wait().unwrap();
    // The old way in counts.
    let fixture = serve(&disk(false), |settings| settings.exit_with_last_client = true);
    let mut client = Client::greet(&fixture.socket());
    client.option(EXPORT_NAME, b"");
    client.take(10);
    drop(client);
    fixture.server.wait().unwrap();
}

#[test]
fn tcp_works_too() {
    let address = Address::Tcp("127.0.0.1:0".parse().unwrap());
    let server = diskmill_nbd::serve(disk(false), &address, Settings::default()).unwrap();
    let Address::Tcp(address) = *server.address() else { panic!("no TCP") };
    assert!(address.port() != 0 && server.uri() == format!("nbd://{address}/"));
    let mut socket = std::net::TcpStream::connect(address).unwrap();
    let mut hello = [0; 18];
    socket.read_exact(&mut hello).unwrap();
    assert_eq!(&hello[..8], b"NBDMAGIC");
}
