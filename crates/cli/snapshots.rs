//! Internal snapshots, as `qemu-img info` lists them.

use diskmill::qcow2::Snapshot;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::{Map, Value, json};

use crate::names::shown;
use crate::size::human_size;

const NANOS: u64 = 1_000_000_000;

/// The facts of one snapshot; the key order is that of QEMU's hash table.
pub(crate) fn json(snapshot: &Snapshot) -> Value {
    let mut out = Map::new();
    let mut put = |key: &str, value: Value| out.insert(key.to_owned(), value);
    if let Some(icount) = snapshot.icount {
        put("icount", json!(icount));
    }
    put("vm-clock-nsec", json!(snapshot.vm_clock_nsec % NANOS));
    put("name", json!(String::from_utf8_lossy(&snapshot.name)));
    put("date-sec", json!(snapshot.date_sec));
    put("date-nsec", json!(snapshot.date_nsec));
    put("vm-clock-sec", json!(snapshot.vm_clock_nsec / NANOS));
    put("id", json!(String::from_utf8_lossy(&snapshot.id)));
    put("vm-state-size", json!(snapshot.vm_state_size));
    Value::Object(out)
}

/// The list for people, with its heading.
pub(crate) fn table(snapshots: &[Snapshot]) -> String {
    let head = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"].map(str::to_owned);
    let zone = TimeZone::system();
    let rows = snapshots.iter().map(|snapshot| row(&cells(snapshot, &zone)));
    std::iter::once("Snapshot list:\n".to_owned()).chain([row(&head)]).chain(rows).collect()
}

fn row([id, tag, size, date, clock, icount]: &[String; 6]) -> String {
    format!("{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}

fn cells(snapshot: &Snapshot, zone: &TimeZone) -> [String; 6] {
    let text = |bytes: &[u8]| shown(&String::from_utf8_lossy(bytes)).into_owned();
    let date = Timestamp::from_second(snapshot.date_sec.into()).unwrap_or_default();
    let seconds = snapshot.vm_clock_nsec / NANOS;
    let millis = snapshot.vm_clock_nsec / 1_000_000 % 1000;
    [
        text(&snapshot.id),
        text(&snapshot.name),
        human_size(snapshot.vm_state_size),
        date.to_zoned(zone.clone()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
        format!("{:04}:{:02}:{:02}.{millis:03}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        snapshot.icount.map(|count| count.to_string()).unwrap_or_default(),
    ]
}
