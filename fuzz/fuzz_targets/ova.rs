//! OVA: the tar walk, the envelope and the manifest, each with what we write read back.
#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use diskmill_format::Limits;
use diskmill_format::ova::tar::{self, MemberKind, Scanner, Step};
use diskmill_format::ova::{Manifest, Ovf, OvfBuilder};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Written<'a> {
    name: &'a str,
    file: &'a str,
    size: Option<u64>,
    capacity: u64,
    mtime: u32,
}

fuzz_target!(|data: &[u8]| {
    let limits = Limits::default();
    walk(data, &limits);

    match Ovf::parse(data, &limits) {
        Ok(ovf) => envelope(&ovf),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    if let Ok(manifest) = Manifest::parse(data, &limits) {
        for digest in &manifest.digests {
            assert_eq!(digest.digest.len(), digest.algorithm.digest_bytes());
            assert!(manifest.get(&digest.name).is_some());
        }
        assert_eq!(Manifest::parse(&manifest.write(), &limits).as_ref(), Ok(&manifest));
    }

    if let Ok(input) = Written::arbitrary(&mut Unstructured::new(data)) {
        written(&input, &limits);
    }
});

/// Walks an archive, feeding what is wanted as far as it is there. Returns the members.
fn walk(data: &[u8], limits: &Limits) -> Vec<tar::Member> {
    let mut scanner = Scanner::new(limits);
    let mut members = Vec::new();
    let mut before = None;
    loop {
        let (at, len) = scanner.want();
        assert!(len > 0 && len as u64 <= limits.tar_extension_bytes);
        assert!(before.is_none_or(|before| before < at), "the walk does not get on");
        before = Some(at);
        let rest = usize::try_from(at.get()).ok().and_then(|at| data.get(at..)).unwrap_or_default();
        match scanner.feed(&rest[..len.min(rest.len())]) {
            Ok(Step::More) => {}
            Ok(Step::Member(member)) => {
                assert!(member.next.get() % 512 == 0 && member.next == scanner.want().0);
                assert!(member.data.get() + member.size <= member.next.get());
                assert!(member.kind != MemberKind::Directory || member.size == 0);
                members.push(member);
            }
            Ok(Step::End) => {
                assert_eq!(scanner.feed(&[]), Ok(Step::End));
                return members;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return members;
            }
        }
    }
}

fn envelope(ovf: &Ovf) {
    let uses = ovf.disk_uses();
    assert_eq!(uses.len(), ovf.disks.len(), "each disk once");
    for used in uses {
        assert!(ovf.disks.iter().any(|disk| std::ptr::eq(disk, used.disk)));
        assert!(used.file.is_none_or(|file| Some(&file.id) == used.disk.file_ref.as_ref()));
        let _ = (used.adapter(), used.disk.capacity_bytes());
    }
}

fn written(input: &Written, limits: &Limits) {
    let size = input.size.unwrap_or(0);
    if let Ok(mut head) = tar::encode_file(input.file.as_bytes(), size, input.mtime) {
        assert_eq!(head.len() % tar::BLOCK, 0);
        let data = head.len() as u64;
        assert_eq!((size % 512 + tar::padding(size) as u64) % 512, 0);
        head.extend(tar::END);
        let members = walk(&head, limits);
        // Names that ustar and pax hold come back; a size that ends past 2^63 does not.
        if size < 1 << 62 {
            assert_eq!(members.len(), 1);
            assert_eq!(members[0].name, input.file.as_bytes());
            assert_eq!((members[0].size, members[0].data.get()), (size, data));
        }
    }
    let builder =
        OvfBuilder { disk_file_size: input.size, ..OvfBuilder::new(input.name, input.file, input.capacity) };
    if let Ok(text) = builder.write() {
        let ovf = Ovf::parse(text.as_bytes(), limits).expect("what was written is read");
        envelope(&ovf);
        assert_eq!((ovf.disks.len(), ovf.files.len(), ovf.systems.len()), (1, 1, 1));
        assert_eq!(ovf.disks[0].capacity_bytes(), Some(input.capacity));
        assert!(
            ovf.files[0].is_named(input.file.as_bytes()),
            "{:?} is not {:?}",
            ovf.files[0].href,
            input.file
        );
        assert_eq!(ovf.files[0].size, input.size);
        assert_eq!(ovf.systems[0].name.as_deref().map(str::trim), Some(input.name.trim()));
    }
}
