//! Changes of the bitmaps extension in the header.

use diskmill_format::qcow2::{BitmapsPlace, feature};

use super::meta::{Meta, SECTOR};
use crate::error::{Error, Kind, Result};

impl Meta {
    /// Makes the header name another bitmap directory (bitmaps, offset, bytes), or none. Barriers come before and after.
    ///
    /// The extension may lie in another sector than the feature bit that vouches for it, and only a sector is written
    /// whole or not at all. A crash leaves the old directory or the new one, except while the extension is added or
    /// removed, or where it crosses the border of a sector: there it may leave none, as QEMU's way does always.
    pub(super) fn link_bitmaps(&mut self, directory: Option<(u32, u64, u64)>) -> Result<()> {
        if self.cluster_size() == SECTOR as u64 {
            return self.replace_header(directory);
        }
        let cluster = self.first_cluster()?;
        let header = &self.area.header;
        let end = header.backing_name.map_or(cluster.len() as u64, |(at, _)| at);
        let place = BitmapsPlace::find(&cluster, header.header_length.into()..end);
        match (directory, place) {
            (None, place) => {
                self.vouch(false)?;
                // One that others follow stays, and says nothing.
                if let Some(BitmapsPlace { offset, exists: true, last: true }) = place {
                    self.disk.write(&[0; BitmapsPlace::HEAD as usize], offset)?;
                    self.disk.sync()?;
                    self.area.extensions.bitmaps = None;
                }
                return Ok(());
            }
            (Some(new), Some(BitmapsPlace { offset, exists: true, .. })) => {
                let all = BitmapsPlace::encode(new);
                let data =
                    all.get(BitmapsPlace::HEAD as usize..BitmapsPlace::LEN as usize).unwrap_or_default();
                let (start, end) = (offset + BitmapsPlace::HEAD, offset + BitmapsPlace::LEN);
                if start / SECTOR as u64 != (end - 1) / SECTOR as u64 {
                    self.vouch(false)?;
                }
                self.disk.write(data, start)?;
                self.disk.sync()?;
            }
            (Some(new), Some(BitmapsPlace { offset, .. })) => {
                let all = BitmapsPlace::encode(new);
                self.make_room(offset + all.len() as u64)?;
                // What stands there is no extension before its head says so.
                let (head, rest) = all.split_at(BitmapsPlace::HEAD as usize);
                self.disk.write(rest, offset + BitmapsPlace::HEAD)?;
                self.disk.sync()?;
                self.disk.write(head, offset)?;
                self.disk.sync()?;
            }
            (Some(_), None) => return Err(no_room()),
        }
        self.area.extensions.bitmaps = directory;
        self.vouch(true)
    }

    /// The same where the header is one sector.
    fn replace_header(&mut self, directory: Option<(u32, u64, u64)>) -> Result<()> {
        let mut area = self.area.clone();
        area.extensions.bitmaps = directory;
        area.header.autoclear &= !feature::BITMAPS;
        area.header.autoclear |= if directory.is_some() { feature::BITMAPS } else { 0 };
        let sector = area.encode()?;
        self.disk.write(&sector, 0)?;
        self.disk.sync()?;
        self.area = diskmill_format::qcow2::HeaderArea::parse(&sector, &self.limits)?;
        Ok(())
    }

    /// Sets or clears the bit that says that the directory is up to date.
    fn vouch(&mut self, good: bool) -> Result<()> {
        let bits = self.area.header.autoclear & !feature::BITMAPS | if good { feature::BITMAPS } else { 0 };
        if bits == self.area.header.autoclear {
            Ok(())
        } else {
            self.put_header(|header| header.autoclear = bits)
        }
    }

    /// Moves the name of the backing file behind `end` if it begins before. Its old place stays as it is until the
    /// header names the new one.
    fn make_room(&mut self, end: u64) -> Result<()> {
        /// Where the header has the offset of the name.
        const NAME_FIELD: u64 = 8;
        let size = self.cluster_size();
        let Some((at, len)) = self.area.header.backing_name else {
            return if end <= size { Ok(()) } else { Err(no_room()) };
        };
        if end <= at {
            return Ok(());
        }
        let name = self.area.backing_name.clone().unwrap_or_default();
        let free_from = end.max(at.saturating_add(len.into()));
        let new = size.saturating_sub(len.into()) & !7;
        if new < free_from {
            return Err(no_room());
        }
        self.disk.write(&name, new)?;
        self.disk.sync()?;
        self.disk.write(&new.to_be_bytes(), NAME_FIELD)?;
        self.disk.sync()?;
        self.area.header.backing_name = Some((new, len));
        Ok(())
    }
}

fn no_room() -> Error {
    Error::new(Kind::Limit, "the first cluster has no room for one more header extension")
        .hint("an image with a larger cluster_size has more")
}
