//! Naming another backing file, and other changes of what stands in the first cluster.

use diskmill_format::qcow2::{HeaderArea, HeaderWrite};

use super::Qcow2Writer;
use super::meta::Meta;
use crate::error::{Error, Result};

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
        meta.rewrite_area(|area| {
            area.backing_name = name.map(|name| name.as_bytes().to_vec());
            area.extensions.backing_format = format.map(|format| format.as_bytes().to_vec());
        })
    }
}

impl Meta {
    /// Writes a changed header with its extensions and the backing file name. A crash leaves the old ones or the new ones,
    /// as far as [`HeaderArea::rewrite`] says. All that was written before is durable then.
    pub(super) fn rewrite_area(&mut self, change: impl FnOnce(&mut HeaderArea)) -> Result<()> {
        self.commit()?;
        let cluster = self.first_cluster()?;
        let mut area = HeaderArea::parse(&cluster, &self.limits)?;
        change(&mut area);
        let write = |write: HeaderWrite| -> Result<()> {
            self.disk.write(&write.bytes, write.at)?;
            self.disk.sync()
        };
        let done = area.rewrite(&cluster)?.into_iter().try_for_each(write);
        // Whatever the file has now is what later changes are about.
        done.and(self.read_area())
    }
}
