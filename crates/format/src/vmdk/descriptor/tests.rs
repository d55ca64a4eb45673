use super::*;
use crate::Problem;
use proptest::prelude::*;

fn parse(text: &[u8]) -> Descriptor {
    Descriptor::parse(text, &Limits::default()).unwrap()
}

/// By open-vmdk, in the corpus; the text ends without a line end.
const OPEN_VMDK: &[u8] = b"# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=7e6707b0\nparentCID=ffffffff\n\
createType=\"streamOptimized\"\n\n# Extent description\nRW 8192 SPARSE \"disk\"\n\n# The Disk Data Base\n#DDB\n\n\
ddb.longContentID = \"b0aca9069502b309f49539c57e6707b0\"\nddb.virtualHWVersion = \"4\"\n\
ddb.geometry.cylinders = \"1\"\nddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\n\
ddb.adapterType = \"lsilogic\"\nddb.toolsInstallType = \"4\"\nddb.toolsVersion = \"2147483647\"";

#[test]
fn open_vmdk_reads_and_writes_back() {
    let text = [OPEN_VMDK, &[0; 40]].concat();
    let it = parse(&text);
    assert_eq!(it.version, Some(1));
    assert_eq!(it.cid, Some(0x7e67_07b0));
    assert_eq!((it.parent_cid, it.parent()), (Some(NO_PARENT), None));
    assert_eq!(it.create_type, Some(CreateType::StreamOptimized));
    assert_eq!(it.encoding.as_deref(), Some(b"UTF-8".as_slice()));
    assert_eq!(it.capacity(), 8192);
    assert_eq!(it.extents[0].file.as_deref(), Some(b"disk".as_slice()));
    assert_eq!(it.adapter(), Some(AdapterType::LsiLogic));
    assert_eq!(it.chs(), Some(Chs { cylinders: 1, heads: 255, sectors: 63 }));
    assert_eq!(it.ddb_number("virtualhwversion"), Some(4));
    assert_eq!(it.long_content_id(), Some(0xb0ac_a906_9502_b309_f495_39c5_7e67_07b0));
    assert_eq!(it.doubts, Vec::<String>::new());
    assert_eq!(it.write().unwrap(), [OPEN_VMDK, b"\n"].concat());
}

#[test]
fn odd_spacing_line_ends_and_comments() {
    let comment = "# a comment of a licence, many times\r\n".repeat(40);
    let text = format!(
        "\u{feff}{comment}\r\n \t\r\n  Version = 1 \r\n  CID = \"A694B4\"\r\nPARENTCID=5c0d0308\r\n\
         createtype = 2GbMaxExtentFlat\r\nparentFileNameHint=\"a # b.vmdk\"\r\n\
         \tRW\t 63   FLAT  \"a b.vmdk\"  7 \r\nrdonly 5 zero\r\nNOACCESS 9 SPARSE x.vmdk\r\n\
         ddb.x=\r\nddb.adapterType=\"ide\"\r\n"
    );
    let it = parse(text.as_bytes());
    assert_eq!((it.version, it.cid, it.parent()), (Some(1), Some(0xa6_94b4), Some(0x5c0d_0308)));
    assert_eq!(it.create_type, Some(CreateType::TwoGbMaxExtentFlat));
    assert_eq!(it.parent_hint.as_deref(), Some(b"a # b.vmdk".as_slice()));
    let lines: Vec<_> = it.extents.iter().map(|e| (e.access, e.sectors, e.kind.clone(), e.offset)).collect();
    assert_eq!(
        lines,
        [
            (Access::ReadWrite, 63, ExtentKind::Flat, Some(7)),
            (Access::ReadOnly, 5, ExtentKind::Zero, None),
            (Access::NoAccess, 9, ExtentKind::Sparse, None),
        ]
    );
    assert_eq!(it.extents[0].file.as_deref(), Some(b"a b.vmdk".as_slice()));
    assert_eq!(it.extents[0].file_offset().unwrap(), 7 * 512);
    assert_eq!(it.extents[2].file.as_deref(), Some(b"x.vmdk".as_slice()));
    assert_eq!(it.capacity(), 77, "lines that QEMU skips count");
    assert_eq!(it.ddb("x"), Some(b"".as_slice()));
    assert!(it.doubts.is_empty(), "{:?}", it.doubts);
}

#[test]
fn an_offset_right_behind_the_quote_counts() {
    let it = parse(b"version=1\nRW 96 FLAT \"a.vmdk\"96\n");
    assert_eq!((it.extents[0].offset, it.extents[0].rest.as_slice()), (Some(96), b"".as_slice()));
}

#[test]
fn every_kind_of_extent_is_kept() {
    for kind in ["FLAT", "SPARSE", "VMFS", "VMFSSPARSE", "VMFSRDM", "VMFSRAW", "SESPARSE", "VSANSPARSE"] {
        let line = format!("version=1\nRW 8 {kind} \"a.vmdk\" 0\n");
        let it = parse(line.as_bytes());
        assert_eq!(it.extents[0].kind.as_bytes(), kind.as_bytes());
        assert_eq!(it.extents[0].offset, Some(0), "real exports have an offset on {kind} lines");
    }
    let it = parse(
        b"version=1\nRW 976773168 FLAT \"\\\\.\\PhysicalDrive1\" 0 \"12 34\" ab-cd\nRW 63 FLAT \"pt\" part \"open\n",
    );
    let device = &it.extents[0];
    assert_eq!(device.file.as_deref(), Some(b"\\\\.\\PhysicalDrive1".as_slice()));
    assert_eq!(
        (device.partition_uuid(), device.device_id()),
        (Some(b"12 34".as_slice()), Some(b"ab-cd".as_slice()))
    );
    assert_eq!((it.extents[1].offset, it.extents[1].partition_uuid()), (None, Some(b"part".as_slice())));
    assert_eq!(it.extents[1].device_id(), None);
    assert_eq!(parse(&it.write().unwrap()).extents, it.extents);
}

#[test]
fn unknown_entries_keep_their_order() {
    let it = parse(
        b"version=3\nCID=1\ncreateType=\"newKind\"\nfoo=bar\nRW 8 FLAT \"a\" 0\nchangeTrackPath=\"a-ctk.vmdk\"\n\
          baz=\"q\"\nddb.b = \"1\"\nDDB.a = \"2\"\nisNativeSnapshot=\"no\"\n",
    );
    assert_eq!(it.create_type, Some(CreateType::Unknown(b"newKind".to_vec())));
    let keys: Vec<_> = it.other.iter().map(|entry| String::from_utf8_lossy(&entry.key)).collect();
    assert_eq!(keys, ["foo", "changeTrackPath", "baz"]);
    let keys: Vec<_> = it.ddb.iter().map(|entry| String::from_utf8_lossy(&entry.key)).collect();
    assert_eq!(keys, ["ddb.b", "DDB.a"]);
    assert_eq!(it.native_snapshot, Some(false));
    let text = String::from_utf8(it.write().unwrap()).unwrap();
    assert!(text.contains("\nfoo=bar\nbaz=\"q\"\n"), "{text}");
    assert!(text.contains("# Change Tracking File\nchangeTrackPath=\"a-ctk.vmdk\"\n"), "{text}");
}

#[test]
fn names_stay_bytes() {
    let it = parse(b"version=1\nencoding=\"windows-1252\"\nRW 8 FLAT \"f\xfcnf \x80.vmdk\" 0\n");
    let name = it.extents[0].file.as_deref().unwrap();
    assert_eq!(name, b"f\xfcnf \x80.vmdk");
    assert_eq!(it.decode(name).as_deref(), Some("fünf €.vmdk"));
    assert_eq!(parse(&it.write().unwrap()).extents, it.extents);
    let it = parse(b"version=1\nencoding=\"Shift_JIS\"\nRW 8 FLAT \"\x83e\" 0\n");
    assert_eq!(it.decode(b"\x83e"), None);
}

#[test]
fn what_is_wrong_is_said_with_its_place() {
    let error = |text: &[u8]| Descriptor::parse(text, &Limits::default()).unwrap_err();
    let bad = error(b"version=1\nRW x FLAT \"a\"\n");
    assert_eq!((bad.problem, bad.offset), (Problem::Corrupt, Some(10)));
    assert!(bad.structure.contains("line 2"), "{bad}");
    for line in ["RW", "RW 5", "RW 5 FLAT", "RW 5 FLAT \"a", "RW 5 FLAT \"\" 0", "RW -5 FLAT \"a\"", "RW=1"] {
        assert_eq!(error(format!("version=1\n{line}\n").as_bytes()).problem, Problem::Corrupt, "{line}");
    }
    assert_eq!(error(b"RW 18014398509481984 FLAT \"a\"").problem, Problem::Corrupt);
    assert_eq!(error(b"RW 9007199254740992 ZERO\nRW 9007199254740992 ZERO").problem, Problem::Corrupt);
    assert_eq!(error(b"RW 99999999999999999999 ZERO").problem, Problem::Corrupt);
    assert_eq!(error(b"RW 1 FLAT \"a\" 18014398509481984").problem, Problem::Corrupt);
    assert_eq!(error(b"# Disk DescriptorFile\nhello\n").problem, Problem::NotThisFormat);
    assert_eq!(error(&vec![b'\n'; (2 << 20) + 1]).problem, Problem::Limit);
    assert_eq!(error(&b"a=b\n".repeat(MAX_ENTRIES + 1)).problem, Problem::Limit);
    assert_eq!(error(&b"RW 1 ZERO\n".repeat(65_537)).problem, Problem::Limit);
}

#[test]
fn odd_things_are_doubted() {
    let it =
        parse(b"version=1\nCID=12\nCID=13\nCID=zz\nwhat is this\nparentFileNameHint=\"a\"b\nRW 0 ZERO\n");
    assert_eq!(it.cid, Some(0x12), "the first holds");
    assert_eq!(it.parent_hint.as_deref(), Some(b"a".as_slice()));
    assert_eq!(it.doubts.len(), 6, "{:?}", it.doubts);
    let it = parse(b"version=1\nparentFileNameHint = \"5\" disk.vmdk\" \n");
    assert_eq!(it.parent_hint.as_deref(), Some(b"5\" disk.vmdk".as_slice()), "no writer escapes a quote");
    let it = parse(&[b"version=1\n".as_slice(), &b"junk\n".repeat(100)].concat());
    assert_eq!(it.doubts.len(), MAX_DOUBTS);
}

#[test]
fn a_value_is_replaced_in_place() {
    let text = b"# c\r\nparentCID = ffffffff\r\nCID=7e6707b0 \r\ncreateType=\"custom\" \r\nRW 8 ZERO\0rest";
    let with = |key, value: &[u8]| replace_value(text, key, value).map(|t| String::from_utf8(t).unwrap());
    let cid = with("CID", b"00000001").unwrap();
    assert_eq!(
        cid,
        "# c\r\nparentCID = ffffffff\r\nCID=00000001 \r\ncreateType=\"custom\" \r\nRW 8 ZERO\0rest"
    );
    assert!(with("createType", b"vmfs").unwrap().contains("createType=\"vmfs\" \r\n"));
    assert!(with("parentcid", b"2").unwrap().contains("parentCID = 2\r\nCID=7e6707b0"));
    assert_eq!(with("nothing", b"2"), None);
    assert_eq!(with("CID", b"a\nb"), None);
    assert_eq!(replace_value(b"\xef\xbb\xbfCID=1", "CID", b"2").unwrap(), b"\xef\xbb\xbfCID=2");
    assert_eq!(replace_value(b"a=\"open", "a", b"x").unwrap(), b"a=\"x");
    assert_eq!(replace_value(b"a=\"open\t", "a", b"x").unwrap(), b"a=\"x\t");
}

#[test]
fn names_that_cannot_be_written_are_refused() {
    let mut it = parse(b"version=1\nRW 8 FLAT \"a\" 0\n");
    for name in [b"a\"b".as_slice(), b"a\nb", b"a\0b", b"a\rb"] {
        it.extents[0].file = Some(name.to_vec());
        assert_eq!(it.write().unwrap_err().problem, Problem::Unsupported);
    }
    it.extents[0].file = None;
    assert!(it.write().is_err());
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![4 => 0x20u8..0x7f, 1 => 0x80u8..];
    proptest::collection::vec(byte.prop_filter("quote", |b| *b != b'"'), 1..20)
}

fn key() -> impl Strategy<Value = Vec<u8>> {
    "[a-z]{1,3}(\\.[a-z]{1,6}){0,2}"
        .prop_filter("known keys", |k| !["rw", "cid", "version", "encoding"].contains(&k.as_str()))
        .prop_map(String::into_bytes)
}

prop_compose! {
    fn extent()(
        access in prop_oneof![Just(Access::ReadWrite), Just(Access::ReadOnly), Just(Access::NoAccess)],
        sectors in 1u64..1 << 40, kind in 0usize..8, file in name(), offset in proptest::option::of(0u64..1 << 50),
    ) -> Extent {
        let kind = ExtentKind::KNOWN[kind].0.clone();
        let file = (kind != ExtentKind::Zero).then_some(file);
        let offset = offset.filter(|_| file.is_some());
        Extent { access, sectors, kind, file, offset, rest: Vec::new() }
    }
}

proptest! {
    #[test]
    fn descriptors_round_trip(
        version in 1u32..4, cid: u32, parent_cid: u32, native: Option<bool>, kind in 0usize..18,
        hint in proptest::option::of(name()), encoding in proptest::option::of(name()),
        extents in proptest::collection::vec(extent(), 0..5),
        other in proptest::collection::vec((key(), name()), 0..4), ddb in proptest::collection::vec((key(), name()), 0..6),
    ) {
        let it = Descriptor {
            version: Some(version), encoding, cid: Some(cid), parent_cid: Some(parent_cid),
            native_snapshot: native, create_type: Some(CREATE_TYPES[kind].0.clone()), parent_hint: hint, extents,
            other: other.into_iter().map(|(k, v)| Entry::quoted(k, v)).filter(|e| !e.key.starts_with(b"ddb.")).collect(),
            ddb: ddb.into_iter().map(|(k, v)| Entry::quoted([b"ddb.".as_slice(), &k].concat(), v)).collect(),
            doubts: Vec::new(),
        };
        let text = it.write().unwrap();
        prop_assert_eq!(super::super::probe(&text), Some(super::super::Kind::Descriptor));
        prop_assert_eq!(parse(&text), it);
    }

    #[test]
    fn arbitrary_text_never_panics(text in "([ \\t]|RW|RDONLY|ZERO|FLAT|[0-9]|\"|=|ddb\\.|CID|\\n|\\r|#|.){0,60}") {
        if let Ok(it) = Descriptor::parse(text.as_bytes(), &Limits::default()) {
            let _ = (it.write(), it.chs(), it.adapter(), it.long_content_id());
            for extent in &it.extents {
                let _ = (extent.bytes(), extent.device_id());
            }
        }
        let _ = replace_value(text.as_bytes(), "CID", b"1");
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
        let _ = Descriptor::parse(&bytes, &Limits::default());
        let _ = replace_value(&bytes, "CID", b"1");
    }
}
