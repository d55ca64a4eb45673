//! VMDK descriptors: what is read is written to the same descriptor, and one value changes alone.
#![no_main]

use diskmill_format::Limits;
use diskmill_format::vmdk::{Descriptor, descriptor, probe};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    let limits = Limits::default();
    let _ = probe(text);
    let found = match Descriptor::parse(text, &limits) {
        Ok(found) => found,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(error.offset.is_none_or(|at| at <= text.len() as u64));
            return;
        }
    };
    assert!(found.capacity().checked_mul(512).is_some_and(|bytes| bytes <= i64::MAX as u64));
    assert!(found.doubts.len() <= 32);
    for extent in &found.extents {
        assert!(extent.bytes().is_ok() && extent.file_offset().is_ok());
        assert!(extent.file.is_some() || extent.kind == descriptor::ExtentKind::Zero);
        let _ = (
            extent.partition_uuid(),
            extent.device_id(),
            extent.file.as_ref().map(|name| found.decode(name)),
        );
    }
    let _ = (found.adapter(), found.chs(), found.long_content_id(), found.parent());

    if let Ok(written) = found.write() {
        let back = Descriptor::parse(&written, &limits).expect("what was written is read");
        // The writer's defaults and order.
        let mut expected = found.clone();
        expected.version.get_or_insert(1);
        expected.parent_cid.get_or_insert(descriptor::NO_PARENT);
        expected.other.sort_by_key(|entry| entry.key.eq_ignore_ascii_case(b"changeTrackPath"));
        expected.ddb.iter_mut().for_each(|entry| entry.quoted = true);
        expected.doubts = back.doubts.clone();
        assert_eq!(back, expected);
        assert_eq!(back.write().expect("writes again"), written);
    }

    if let Some(changed) = descriptor::replace_value(text, "CID", b"0badcafe") {
        let back = Descriptor::parse(&changed, &limits).expect("one changed value leaves a descriptor");
        assert_eq!(back.cid, Some(0x0bad_cafe));
        assert_eq!(back.extents, found.extents);
        assert_eq!((back.ddb, back.other, back.parent_cid), (found.ddb, found.other, found.parent_cid));
    }
});
