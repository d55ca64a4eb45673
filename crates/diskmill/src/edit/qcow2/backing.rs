//! Naming another backing file.

use diskmill_format::qcow2::HeaderArea;

use super::Qcow2Writer;
use crate::error::{Error, Result};
use crate::reader::read_full;

impl Qcow2Writer {
    /// From now on zeros are written as over a backing file.
    pub(crate) fn expect_backing(&mut self) {
        self.backed = true;
    }

    /// Makes `name` the backing file, in `format`; none if there is no name. All that was written before is durable then.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid) for a name that is too long, [`Kind::Limit`](crate::Kind::Limit) for one
    /// that does not fit into the first cluster.
    pub(crate) fn set_backing(&self, name: Option<&str>, format: Option<&str>) -> Result<()> {
        let mut meta = self.meta();
        let most = meta.limits.backing_name_bytes as usize;
        if let Some(name) = name.filter(|name| name.len() > most) {
            let message = format!("a backing file name of {} bytes; at most {most} fit", name.len());
            return Err(Error::invalid(message));
        }
        meta.commit()?;
        meta.sync()?;
        // At most 2 MiB.
        let mut cluster = vec![0; meta.cluster_size() as usize];
        let got = read_full(&**meta.disk.storage(), &mut cluster, 0)?;
        cluster.truncate(got);
        let mut area = HeaderArea::parse(&cluster, &meta.limits)?;
        area.backing_name = name.map(|name| name.as_bytes().to_vec());
        area.extensions.backing_format = format.map(|format| format.as_bytes().to_vec());
        for write in area.rewrite(&cluster)? {
            meta.disk.write(&write.bytes, write.at)?;
            meta.disk.sync()?;
        }
        let got = read_full(&**meta.disk.storage(), &mut cluster, 0)?;
        cluster.truncate(got);
        meta.area = HeaderArea::parse(&cluster, &meta.limits)?;
        Ok(())
    }
}
