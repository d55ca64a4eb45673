use byteorder::{BigEndian, ByteOrder};

use crate::{FormatError, HostOffset, Limits};

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Unique id, usually a decimal number.
    pub id: Vec<u8>,
    /// Name, as the user gave it.
    pub name: Vec<u8>,
    /// The snapshot's own L1 table.
    pub l1_offset: HostOffset,
    /// Entries in that table.
    pub l1_size: u32,
    /// Seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of the date.
    pub date_nsec: u32,
    /// Guest clock in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// The disk's size when it was taken, in bytes; `None` in old images, whose disks could not be resized.
    pub disk_size: Option<u64>,
    /// Instructions executed, where the VM counted them.
    pub icount: Option<u64>,
    /// All extra data as it stands in the file: what is not known here is kept on a rewrite.
    pub extra: Vec<u8>,
}

const FIXED: usize = 40;
/// Extra data that QEMU writes: size of the VM state, disk size, instruction count.
const EXTRA: usize = 24;

impl Snapshot {
    /// The entry of the snapshot table, padded. `extra` is brought up to date with the fields that it holds: up to the
    /// last one it has, or all of them if it is empty, as for a new snapshot.
    ///
    /// # Errors
    /// [`Problem::Limit`](crate::Problem::Limit) if id or name are longer than 65,535 bytes.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let len = |what: &str, bytes: &[u8]| {
            let message = format!("a snapshot {what} of {} bytes; at most 65535 are possible", bytes.len());
            u16::try_from(bytes.len()).map_err(|_| FormatError::limit("snapshot table", message))
        };
        let mut extra = self.extra.clone();
        if extra.is_empty() && self.disk_size.is_some() {
            extra.resize(EXTRA, 0);
        }
        let fields = [Some(self.vm_state_size), self.disk_size, Some(self.icount.unwrap_or(u64::MAX))];
        for (slot, value) in extra.as_chunks_mut::<8>().0.iter_mut().zip(fields) {
            if let Some(value) = value {
                *slot = value.to_be_bytes();
            }
        }
        let mut out = Vec::with_capacity(FIXED + extra.len() + self.id.len() + self.name.len() + 7);
        out.extend(self.l1_offset.get().to_be_bytes());
        out.extend(self.l1_size.to_be_bytes());
        out.extend(len("id", &self.id)?.to_be_bytes());
        out.extend(len("name", &self.name)?.to_be_bytes());
        out.extend(self.date_sec.to_be_bytes());
        out.extend(self.date_nsec.to_be_bytes());
        out.extend(self.vm_clock_nsec.to_be_bytes());
        // The specification asks for both copies; the narrow one is 0 if the size does not fit.
        out.extend(u32::try_from(self.vm_state_size).unwrap_or(0).to_be_bytes());
        // Parsing bounds it, and a new one has 24 bytes.
        out.extend((extra.len() as u32).to_be_bytes());
        out.extend(extra);
        out.extend(&self.id);
        out.extend(&self.name);
        out.resize(out.len().next_multiple_of(8), 0);
        Ok(out)
    }
}

/// Parses the first `count` entries of a snapshot table that stands at `offset`.
///
/// `bytes` may be longer than the table. Returns the entries, and how many bytes they take.
///
/// # Errors
/// If an entry runs over the end of `bytes`, or over a limit.
pub fn parse_snapshots(
    bytes: &[u8],
    count: u32,
    offset: HostOffset,
    limits: &Limits,
) -> Result<(Vec<Snapshot>, usize), FormatError> {
    if count > limits.qcow2_snapshots {
        return Err(FormatError::limit(
            "snapshot table",
            format!("{count} snapshots; at most {} are read", limits.qcow2_snapshots),
        )
        .at(offset.get()));
    }
    let mut snapshots = Vec::new();
    let mut at = 0usize;
    for index in 0..count {
        let entry = bytes.get(at..).unwrap_or_default();
        let position = offset.get().saturating_add(at as u64);
        let (snapshot, len) = parse_one(entry, limits).map_err(|problem| {
            FormatError { structure: format!("snapshot table, entry {index}"), ..problem }.at(position)
        })?;
        snapshots.push(snapshot);
        at = at.saturating_add(len);
    }
    Ok((snapshots, at))
}

fn parse_one(bytes: &[u8], limits: &Limits) -> Result<(Snapshot, usize), FormatError> {
    let cut = || FormatError::corrupt("", "the entry runs past the end of the table or file");
    let fixed = bytes.get(..FIXED).ok_or_else(cut)?;
    let id_len = usize::from(BigEndian::read_u16(&fixed[12..]));
    let name_len = usize::from(BigEndian::read_u16(&fixed[14..]));
    let extra_len = BigEndian::read_u32(&fixed[36..]);
    if extra_len > limits.qcow2_snapshot_extra_bytes {
        return Err(FormatError::limit(
            "",
            format!(
                "{extra_len} bytes of extra data; at most {} are read",
                limits.qcow2_snapshot_extra_bytes
            ),
        ));
    }
    let rest = &bytes[FIXED..];
    let (extra, rest) = rest.split_at_checked(extra_len as usize).ok_or_else(cut)?;
    let (id, rest) = rest.split_at_checked(id_len).ok_or_else(cut)?;
    let (name, _) = rest.split_at_checked(name_len).ok_or_else(cut)?;
    let extra_u64 = |at: usize| extra.get(at..at + 8).map(BigEndian::read_u64);
    let snapshot = Snapshot {
        id: id.to_vec(),
        name: name.to_vec(),
        l1_offset: HostOffset(BigEndian::read_u64(fixed)),
        l1_size: BigEndian::read_u32(&fixed[8..]),
        date_sec: BigEndian::read_u32(&fixed[16..]),
        date_nsec: BigEndian::read_u32(&fixed[20..]),
        vm_clock_nsec: BigEndian::read_u64(&fixed[24..]),
        vm_state_size: extra_u64(0).unwrap_or_else(|| u64::from(BigEndian::read_u32(&fixed[32..]))),
        disk_size: extra_u64(8),
        icount: extra_u64(16).filter(|&count| count != u64::MAX),
        extra: extra.to_vec(),
    };
    let len = (FIXED + extra.len() + id_len + name_len).next_multiple_of(8);
    Ok((snapshot, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> Vec<u8> {
        let mut bytes = vec![0u8; FIXED];
        bytes[6] = 3; // L1 at 0x300
        bytes[11] = 7;
        bytes[13] = 1;
        bytes[15] = 2;
        bytes[39] = 16;
        bytes.extend(5u64.to_be_bytes());
        bytes.extend(4096u64.to_be_bytes());
        bytes.extend(b"1ab");
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn parses_two_and_refuses_cut_ones() {
        let two = [entry(), entry()].concat();
        let (got, len) = parse_snapshots(&two, 2, HostOffset(0), &Limits::default()).unwrap();
        assert_eq!(len, two.len());
        assert_eq!((got[1].id.as_slice(), got[1].name.as_slice()), (&b"1"[..], &b"ab"[..]));
        assert_eq!((got[1].l1_offset.get(), got[1].l1_size, got[1].disk_size), (0x300, 7, Some(4096)));
        // Both copies of the VM state's size are written, where this entry has only one.
        let same = got[0].encode().unwrap();
        assert_eq!(same.len(), entry().len());
        assert_eq!(parse_snapshots(&same, 1, HostOffset(0), &Limits::default()).unwrap().0[0], got[0]);
        let renamed = Snapshot { name: b"other".to_vec(), extra: Vec::new(), ..got[0].clone() };
        let bytes = renamed.encode().unwrap();
        let (again, _) = parse_snapshots(&bytes, 1, HostOffset(0), &Limits::default()).unwrap();
        assert_eq!(again[0].extra.len(), 24);
        assert_eq!(Snapshot { extra: Vec::new(), ..again[0].clone() }, renamed);
        for cut in 0..entry().len() - 6 {
            assert!(parse_snapshots(&entry()[..cut], 1, HostOffset(0), &Limits::default()).is_err(), "{cut}");
        }
    }
}
