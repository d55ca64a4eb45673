use byteorder::{BigEndian, ByteOrder};

use super::header::known_feature_names;
use super::{Extensions, HeaderArea};
use crate::{FormatError, Limits};

/// What a disk writes as a whole or not at all.
const SECTOR: usize = 512;
/// Where offset (8 bytes) and length (4 bytes) of the backing file name stand in the header.
const NAME_AT: usize = 8;

/// A write into the first cluster, and a barrier behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderWrite {
    /// Offset in the file.
    pub at: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl HeaderArea {
    /// The writes that make this the header area of an image whose first cluster holds `old`: changed header fields,
    /// extensions and backing file name. Fields of the header that are not known here stay as they are, unless the version
    /// changes.
    ///
    /// Between any two of them, and if one is cut short at a sector of 512 bytes, the image has its old or its new
    /// version, extensions and name; feature names may be missing meanwhile. That cannot be kept up if extensions other than the
    /// feature names reach past the first sector, or the cluster has no room for both names: then it is one write.
    ///
    /// # Errors
    /// For a damaged `old`, and if extensions and backing file name do not fit into the cluster.
    pub fn rewrite(&self, old: &[u8]) -> Result<Vec<HeaderWrite>, FormatError> {
        let was = Self::parse(old, &Limits::default())?;
        let old_head = was.header.header_length as usize;
        let header = match self.header.version == was.header.version {
            true => old.get(..old_head).unwrap_or_default().to_vec(),
            false => self.header.encode(),
        };
        let head = header.len();
        let room = self.header.geometry.cluster_size() as usize;
        let name = self.backing_name.as_deref().unwrap_or_default();
        let bare =
            |extensions: &Extensions| Extensions { feature_names: Vec::new(), ..extensions.clone() }.encode();
        let (bare_old, bare_new) = (bare(&was.extensions), bare(&self.extensions));
        let mut full = match self.header.version > was.header.version {
            true => Extensions { feature_names: known_feature_names(), ..self.extensions.clone() }.encode(),
            false => self.extensions.encode(),
        };
        if head + full.len() + name.len() > room {
            full.clone_from(&bare_new);
        }
        let end = head + full.len();
        if end + name.len() > room {
            let needed = end + name.len();
            let message = format!(
                "header, extensions and backing file name need {needed} bytes, and a cluster has {room}"
            );
            return Err(FormatError::limit("qcow2 header", message));
        }

        let mut cluster = old.to_vec();
        cluster.resize(room, 0);
        let old_name = was.header.backing_name.map_or(0..0, |(at, len)| {
            // The parser has checked that it lies in the cluster.
            at as usize..at as usize + len as usize
        });
        // One sector is enough, or nothing better can be done.
        let at_once = |mut cluster: Vec<u8>, until: usize| {
            put(&mut cluster, 0, &header);
            put(&mut cluster, head, &full);
            put(&mut cluster, end, name);
            self.point(&mut cluster, end);
            cluster.truncate(until.max(end + name.len()).next_multiple_of(SECTOR));
            vec![HeaderWrite { at: 0, bytes: cluster }]
        };
        if end + name.len() <= SECTOR && old_name.end <= SECTOR {
            return Ok(at_once(cluster, SECTOR));
        }
        let mut name_at = end.max(SECTOR);
        if name_at < old_name.end && old_name.start < name_at + name.len() {
            name_at = old_name.end.next_multiple_of(8);
        }
        if (old_head + bare_old.len()).max(head + bare_new.len()) > SECTOR || name_at + name.len() > room {
            return Ok(at_once(cluster, old_name.end));
        }

        let mut writes = Vec::new();
        let mut sector = |cluster: &[u8]| {
            let bytes = cluster.get(..SECTOR).unwrap_or_default().to_vec();
            writes.push(HeaderWrite { at: 0, bytes });
        };
        put(&mut cluster, old_head, &bare_old);
        sector(&cluster);
        put(&mut cluster, 0, &header);
        put(&mut cluster, head, &bare_new);
        self.point(&mut cluster, name_at);
        sector(&cluster);
        put(&mut cluster, head, &full);
        sector(&cluster);
        let tail = full.get(SECTOR.saturating_sub(head)..).unwrap_or_default().to_vec();
        // Before the second and the third sector write: what they make visible.
        writes.insert(2, HeaderWrite { at: SECTOR as u64, bytes: tail });
        writes.insert(1, HeaderWrite { at: name_at as u64, bytes: name.to_vec() });
        writes.retain(|write| !write.bytes.is_empty());
        Ok(writes)
    }

    /// Sets the fields of the header, with the backing file name at `name_at`.
    fn point(&self, cluster: &mut [u8], name_at: usize) {
        self.header.patch(cluster);
        let (at, len) = self.backing_name.as_ref().map_or((0, 0), |name| (name_at, name.len()));
        if let Some(field) = cluster.get_mut(NAME_AT..NAME_AT + 12) {
            BigEndian::write_u64(field, at as u64);
            BigEndian::write_u32(&mut field[8..], len as u32);
        }
    }
}

fn put(cluster: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(room) = cluster.get_mut(at..at + bytes.len()) {
        room.copy_from_slice(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A version 3 header as QEMU writes it, over a backing file of this name.
    fn area(cluster_bits: u32, name: &str, format: &str) -> HeaderArea {
        let mut bytes = vec![0; 104];
        bytes[..4].copy_from_slice(&super::super::MAGIC);
        for (at, value) in [(4, 3u32), (20, cluster_bits), (36, 1), (56, 1), (96, 4), (100, 104)] {
            BigEndian::write_u32(&mut bytes[at..], value);
        }
        bytes.resize(1 << cluster_bits, 0);
        BigEndian::write_u64(&mut bytes[24..], 512);
        BigEndian::write_u64(&mut bytes[40..], 2 << cluster_bits);
        BigEndian::write_u64(&mut bytes[48..], 1 << cluster_bits);
        let mut area = HeaderArea::parse(&bytes, &Limits::default()).unwrap();
        set(&mut area, name, format);
        // Let the encoder add the names of features.
        HeaderArea::parse(&area.encode().unwrap(), &Limits::default()).unwrap()
    }

    fn set(area: &mut HeaderArea, name: &str, format: &str) {
        let some = |text: &str| (!text.is_empty()).then(|| text.as_bytes().to_vec());
        area.backing_name = some(name);
        area.extensions.backing_format = some(format);
    }

    fn names(area: &HeaderArea) -> (Option<Vec<u8>>, Option<Vec<u8>>) {
        (area.backing_name.clone(), area.extensions.backing_format.clone())
    }

    #[test]
    fn each_state_between_two_writes_has_the_old_or_the_new_name() {
        let long = "x".repeat(700);
        let all = ["", "a", "base.qcow2", &long];
        for bits in [9, 12, 16] {
            for (old, new) in all.iter().flat_map(|old| all.map(|new| (*old, new))) {
                if bits == 9 && (old.len() > 100 || new.len() > 100) {
                    continue;
                }
                let format = |name: &str| if name.is_empty() { "" } else { "raw" };
                let was = area(bits, old, format(old));
                let mut file = was.encode().unwrap();
                let mut is = was.clone();
                set(&mut is, new, format(new));
                let writes = is.rewrite(&file).unwrap();
                for HeaderWrite { at, bytes } in &writes {
                    // Some sectors of each write may be missing.
                    for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                        put(&mut file, *at as usize + index * SECTOR, sector);
                        let now = HeaderArea::parse(&file, &Limits::default()).unwrap();
                        assert!(
                            names(&now) == names(&was) || names(&now) == names(&is),
                            "{bits} {old} {new}"
                        );
                    }
                }
                let now = HeaderArea::parse(&file, &Limits::default()).unwrap();
                assert_eq!(names(&now), names(&is), "{bits} {old} {new}");
                // Feature names give way in small clusters.
                assert!(bits == 9 || now.extensions == is.extensions, "{bits} {old} {new}");
                assert_eq!(now.header.geometry, was.header.geometry);
            }
        }
    }

    #[test]
    fn each_state_between_two_writes_has_the_old_or_the_new_version() {
        let long = "x".repeat(700);
        for (bits, name) in [(9, "base.qcow2"), (12, ""), (12, "base.qcow2"), (16, "base.qcow2"), (16, &long)]
        {
            let v3 = area(bits, name, if name.is_empty() { "" } else { "raw" });
            let mut v2 = v3.clone();
            v2.header.version = 2;
            v2.extensions.feature_names.clear();
            for (was, is) in [(&v3, &v2), (&v2, &v3)] {
                let mut file = was.encode().unwrap();
                for HeaderWrite { at, bytes } in is.rewrite(&file).unwrap() {
                    for (index, sector) in bytes.chunks(SECTOR).enumerate() {
                        put(&mut file, at as usize + index * SECTOR, sector);
                        let now = HeaderArea::parse(&file, &Limits::default()).unwrap();
                        assert_eq!(names(&now), names(was), "{bits} {name}");
                        assert_eq!(now.header.l1_offset, was.header.l1_offset);
                    }
                }
                let now = HeaderArea::parse(&file, &Limits::default()).unwrap();
                assert_eq!(now.header.version, is.header.version);
                assert!(bits == 9 || now.extensions == is.extensions, "{bits} {name}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut small = area(9, "a", "raw");
        let file = small.encode().unwrap();
        set(&mut small, &"x".repeat(500), "raw");
        assert!(small.rewrite(&file).is_err());
    }

    #[test]
    fn unknown_fields_of_the_header_stay() {
        let was = area(16, "a", "raw");
        let mut file = was.encode().unwrap();
        file[106] = 7;
        let mut is = was;
        set(&mut is, "b", "raw");
        for HeaderWrite { at, bytes } in is.rewrite(&file).unwrap() {
            put(&mut file, at as usize, &bytes);
        }
        assert_eq!(file[106], 7);
    }
}
