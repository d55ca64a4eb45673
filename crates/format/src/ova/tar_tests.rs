use super::*;
use crate::Problem;
use proptest::prelude::*;

/// Walks an archive in memory.
fn scan(archive: &[u8]) -> Result<Vec<Member>, FormatError> {
    let mut scanner = Scanner::new(&Limits::default());
    let mut members = Vec::new();
    loop {
        let (at, len) = scanner.want();
        let start = usize::try_from(at.get()).unwrap().min(archive.len());
        let end = start.saturating_add(len).min(archive.len());
        match scanner.feed(&archive[start..end])? {
            Step::More => {}
            Step::Member(member) => members.push(member),
            Step::End => return Ok(members),
        }
    }
}

fn archive(files: &[(&[u8], &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, content) in files {
        out.extend_from_slice(&encode_file(name, content.len() as u64, 7).unwrap());
        out.extend_from_slice(content);
        out.resize(out.len() + padding(content.len() as u64), 0);
    }
    [out, END.to_vec()].concat()
}

#[test]
fn plain_archives_read_back() {
    let bytes = archive(&[(b"vm.ovf", b"<x/>"), (b"disk.vmdk", &[1; 512]), (b"e", b"")]);
    let members = scan(&bytes).unwrap();
    let found: Vec<_> =
        members.iter().map(|m| (m.name.as_slice(), m.size, m.data.get(), m.next.get())).collect();
    assert_eq!(
        found,
        [
            (b"vm.ovf".as_slice(), 4, 512, 1024),
            (b"disk.vmdk".as_slice(), 512, 1536, 2048),
            (b"e".as_slice(), 0, 2560, 2560)
        ]
    );
    assert_eq!(scan(&bytes[..2560]).unwrap(), members, "the end blocks may be missing");
}

#[test]
fn gnu_and_virtualbox_headers_read() {
    // The head of an OVA by GNU tar in the corpus: magic `ustar  `, owner names.
    let mut b = [0; BLOCK];
    b[..14].copy_from_slice(b"descriptor.ovf");
    b[100..156].copy_from_slice(b"0000664\x000001750\x000001750\x0000000024676\x0013715112170\x00013033\0 ");
    b[156] = b'0';
    b[257..265].copy_from_slice(b"ustar  \0");
    b[265..270].copy_from_slice(b"larry");
    b[297..302].copy_from_slice(b"larry");
    let members = scan(&b).unwrap();
    assert_eq!((members[0].name.as_slice(), members[0].size), (b"descriptor.ovf".as_slice(), 10_686));
    b[0] = b'D';
    assert_eq!(scan(&b).unwrap_err().problem, Problem::NotThisFormat);
    let bad = scan(&[&archive(&[(b"a", b"")])[..512], &b].concat()).unwrap_err();
    assert_eq!((bad.problem, bad.offset), (Problem::Corrupt, Some(512)));
}

#[test]
fn large_sizes_are_base_256() {
    for size in [OCTAL_SIZES_END - 1, OCTAL_SIZES_END, (1 << 40) + 5] {
        let mut scanner = Scanner::new(&Limits::default());
        let Step::Member(member) = scanner.feed(&encode_file(b"big", size, 0).unwrap()).unwrap() else {
            panic!()
        };
        assert_eq!((member.size, member.next.get()), (size, 512 + size.next_multiple_of(512)));
    }
    assert!(encode_file(b"big", u64::MAX, 0).is_err());
    let mut header = block(b"", b"x", 0, 0, b'0');
    for size in [[0xff; 12], [0xbf; 12], *b"77777777777x"] {
        header[124..136].copy_from_slice(&size);
        header[148..156].fill(b' ');
        let sum = format!("{:06o}\0 ", checksums(&header).0);
        header[148..156].copy_from_slice(sum.as_bytes());
        assert_eq!(scan(&header).unwrap_err().problem, Problem::Corrupt);
    }
}

#[test]
fn long_names_read_back() {
    let in_folder = [&[b'p'; 150][..], b"/", &[b'n'; 90]].concat();
    let longest = [&[b'p'; 155][..], b"/", &[b'n'; 100]].concat();
    let pax = [b'x'; 300];
    for name in [&in_folder[..], &longest, &pax, &[b'y'; 100], &[b'y'; 101]] {
        let members = scan(&archive(&[(name, b"c"), (b"next", b"")])).unwrap();
        assert_eq!(members[0].name, name);
        assert_eq!(members[1].name, b"next", "an extended header holds for one member");
    }
    assert_eq!(pax_record(b"path", &[b'a'; 90]).len(), 99);
    assert_eq!(pax_record(b"path", &[b'a'; 91]).len(), 101, "the length grows by its own digit");
    // GNU long name.
    let gnu = [
        &block(b"", b"././@LongLink", 201, 0, b'L')[..],
        &[b'g'; 200],
        &[0; 312],
        &block(b"", b"ggg", 0, 0, b'0'),
    ];
    assert_eq!(scan(&gnu.concat()).unwrap()[0].name, [b'g'; 200]);
}

#[test]
fn pax_records_override_the_header() {
    let with = |records: &[u8]| {
        let mut out = block(b"", b"pax", records.len() as u64, 0, b'x').to_vec();
        out.extend_from_slice(records);
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out.extend_from_slice(&block(b"", b"short", 0, 0, b'0'));
        out.resize(out.len() + 512, 0);
        scan(&out)
    };
    let members = with(b"12 size=300\n14 path=a/b/c\n19 comment=x\ny=z..\n").unwrap();
    assert_eq!((members[0].name.as_slice(), members[0].size), (b"a/b/c".as_slice(), 300));
    for bad in [b"9 size=-1\n".as_slice(), b"99 path=a\n", b"x path=a\n", b"4 a\n", b"10 path=ab", b"1 =\n"] {
        assert_eq!(with(bad).unwrap_err().problem, Problem::Corrupt, "{}", String::from_utf8_lossy(bad));
    }
    assert_eq!(with(b"22 GNU.sparse.major=1\n").unwrap_err().problem, Problem::Unsupported);
}

#[test]
fn hostile_archives_are_refused() {
    let problem = |bytes: &[u8]| scan(bytes).unwrap_err().problem;
    assert_eq!(problem(&[0; 2048]), Problem::NotThisFormat);
    assert_eq!(problem(b""), Problem::Corrupt);
    assert_eq!(problem(&block(b"", b"x", 2 << 20, 0, b'x')), Problem::Limit);
    assert_eq!(problem(&block(b"", b"x", 9, 0, b'S')), Problem::Unsupported);
    assert_eq!(problem(&block(b"", b"x", i64::MAX as u64, 0, b'0')), Problem::Corrupt);
    assert_eq!(problem(&[&block(b"", b"x", 9, 0, b'x')[..], b"9 si"].concat()), Problem::Corrupt);
    assert_eq!(problem(&block(b"", b"x", 0, 0, b'0').repeat(65_537)), Problem::Limit);
    let link = scan(&block(b"", b"x", 4096, 0, b'2')).unwrap();
    assert_eq!((link[0].kind, link[0].size), (MemberKind::Other(b'2'), 0));
    assert!(encode_file(b"a\nb", 0, 0).is_err() && encode_file(b"", 0, 0).is_err());
}

proptest! {
    #[test]
    fn archives_round_trip(
        files in proptest::collection::vec(("[a-z/]{1,260}", proptest::collection::vec(any::<u8>(), 0..1200)), 1..6),
    ) {
        let borrowed: Vec<_> = files.iter().map(|(n, c)| (n.as_bytes(), c.as_slice())).collect();
        let bytes = archive(&borrowed);
        let members = scan(&bytes).unwrap();
        prop_assert_eq!(members.len(), files.len());
        for (member, (name, content)) in members.iter().zip(&borrowed) {
            prop_assert_eq!(&member.name[..], *name);
            let start = usize::try_from(member.data.get()).unwrap();
            prop_assert_eq!(&bytes[start..start + content.len()], *content);
        }
    }

    #[test]
    fn arbitrary_headers_never_panic(kind: u8, field in any::<[u8; 12]>(), tail: Vec<u8>) {
        let mut header = block(b"", b"x", 0, 0, kind);
        header[124..136].copy_from_slice(&field);
        header[148..156].fill(b' ');
        let sum = format!("{:06o}\0 ", checksums(&header).0);
        header[148..156].copy_from_slice(sum.as_bytes());
        let _ = scan(&[&header[..], &tail].concat());
        let _ = scan(&tail);
        let _ = PaxRecords(&tail).take(1000).count();
    }
}
