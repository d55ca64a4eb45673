//! The passphrases of a LUKS image: adding and erasing key slots.

use std::time::Duration;

use diskmill_crypt::{Header, KEY_SLOTS, KeySlot, Secret};

use super::disk::Disk;
use crate::encrypted::LuksArea;
use crate::error::{Error, Result};

/// Time for one try at a passphrase where nobody names one, as in QEMU.
const ITER_TIME: Duration = Duration::from_secs(2);

/// Adds or erases passphrases: the options `encrypt.*` of `qemu-img amend`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeySlotChange {
    /// `encrypt.state`: `active` (true) adds a passphrase, `inactive` (false) erases.
    pub active: Option<bool>,
    /// `encrypt.keyslot`, 0 to 7: the slot that is filled or erased. To add, else the first free one.
    pub keyslot: Option<u64>,
    /// `encrypt.iter-time`: how long one try at the new passphrase takes on this machine; 2 seconds if none is named.
    pub iter_time: Option<Duration>,
    /// `encrypt.new-secret`: what the caller knows the new passphrase by.
    pub new_secret: Option<String>,
    /// The passphrase to add.
    pub new: Option<Secret>,
    /// `encrypt.old-secret`: what the caller knows the old passphrase by.
    pub old_secret: Option<String>,
    /// Slots that this passphrase opens are erased.
    pub old: Option<Secret>,
    /// Passphrases, of which one opens the image.
    pub keys: Vec<Secret>,
    /// Overwrites slots in use, and erases the last one, with which all data is lost.
    pub force: bool,
}

impl KeySlotChange {
    /// Sets the option whose name is `encrypt.` and `name`.
    pub(super) fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let number = || {
            let number = value.parse::<u64>();
            number.map_err(|_| Error::invalid(format!("Parameter 'encrypt.{name}' expects a number")))
        };
        match name {
            "state" => {
                self.active = Some(match value {
                    "active" => true,
                    "inactive" => false,
                    _ => {
                        return Err(Error::invalid(format!(
                            "Parameter 'state' does not accept value '{value}'"
                        ))
                        .hint("active or inactive"));
                    }
                });
            }
            "keyslot" => self.keyslot = Some(number()?),
            // More than anybody waits for.
            "iter-time" => self.iter_time = Some(Duration::from_millis(number()?.min(3_600_000))),
            "new-secret" => self.new_secret = Some(value.to_owned()),
            "old-secret" => self.old_secret = Some(value.to_owned()),
            _ => return Err(Error::unsupported(format!("amending encrypt.{name}"))),
        }
        Ok(())
    }

    /// Makes the change to the header in `area` of `disk`. A slot counts as in use when all of it is durable, and
    /// as free when its key is gone; of several slots one is erased after the other. A crash while a slot in use is
    /// overwritten (`force`) may leave it without a key.
    ///
    /// # Errors
    /// [`Kind::Invalid`](crate::Kind::Invalid), in QEMU's words; `Denied` if no key opens the image; `Corrupt` for
    /// key material that overlaps something; `Io`.
    pub(super) fn make(&self, disk: &Disk, area: LuksArea<'_>) -> Result<()> {
        let header = area.header()?;
        let refused = |message: String| Err(Error::invalid(message));
        let refuse = |message: &str| refused(message.to_owned());
        let Some(active) = self.active else {
            return Err(
                Error::invalid("Parameter 'state' is missing").hint("encrypt.state=active or inactive")
            );
        };
        let slot = match self.keyslot {
            Some(index) if index >= KEY_SLOTS as u64 => {
                return refused(format!(
                    "Invalid keyslot {index} specified, must be between 0 and {}",
                    KEY_SLOTS - 1
                ));
            }
            slot => slot.map(|index| index as usize),
        };
        let in_use = |index: usize| header.slots.get(index).is_some_and(|slot| slot.active);
        let free = || (0..KEY_SLOTS).find(|&index| !in_use(index));
        let used = (0..KEY_SLOTS).filter(|&index| in_use(index)).count();
        let slots = Slots { disk, area, header: &header };
        if active {
            let Some(new) = &self.new else {
                return refuse("'new-secret' is required to activate a keyslot");
            };
            if self.old.is_some() {
                return refuse("'old-secret' must not be given when activating keyslots");
            }
            return match slot.or_else(free) {
                None => refuse("Can't add a keyslot - all keyslots are in use"),
                Some(index) if in_use(index) && !self.force => {
                    refused(format!("Refusing to overwrite active keyslot {index} - please erase it first"))
                }
                Some(index) => {
                    let key = area.unlock(&header, &self.keys)?;
                    slots.fill(index, &key, new, self.iter_time.unwrap_or(ITER_TIME))
                }
            };
        }
        if self.new.is_some() {
            return refuse("'new-secret' must not be given when erasing keyslots");
        }
        if self.iter_time.is_some() {
            return refuse("'iter-time' must not be given when erasing keyslots");
        }
        let opens = |index: usize| slots.opens(index, self.old.as_ref());
        let Some(index) = slot else {
            if self.old.is_none() {
                return refuse(
                    "To erase keyslot(s), either explicit keyslot index or the password currently contained in them \
                     must be given",
                );
            }
            let mut matching = Vec::new();
            for index in 0..KEY_SLOTS {
                if opens(index)? {
                    matching.push(index);
                }
            }
            if matching.is_empty() {
                return refuse("No keyslots match given (old) password for erase operation");
            }
            if matching.len() == used && !self.force {
                return refuse(
                    "All the active keyslots match the (old) password that was given and erasing them will erase all \
                     the data in the image irreversibly - refusing operation",
                );
            }
            return matching.into_iter().try_for_each(|index| slots.erase(index));
        };
        if self.old.is_some() && !opens(index)? {
            return refused(format!(
                "Given keyslot {index} doesn't contain the given old password for erase operation"
            ));
        }
        if !self.force && !in_use(index) {
            return refused(format!("Given keyslot {index} is already erased (inactive) "));
        }
        if !self.force && used == 1 {
            return refused(format!(
                "Attempt to erase the only active keyslot {index} which will erase all the data in the image \
                 irreversibly - refusing operation"
            ));
        }
        slots.erase(index)
    }
}

/// The key slots of a header.
struct Slots<'a> {
    disk: &'a Disk,
    area: LuksArea<'a>,
    header: &'a Header,
}

impl Slots<'_> {
    fn slot(&self, index: usize) -> Result<&KeySlot> {
        self.header.slots.get(index).ok_or_else(|| Error::invalid(format!("there is no key slot {index}")))
    }

    fn opens(&self, index: usize, passphrase: Option<&Secret>) -> Result<bool> {
        let Some(passphrase) = passphrase else { return Ok(false) };
        let read = |offset, out: &mut [u8]| self.area.read(offset, out);
        Ok(self.header.open_slot(self.slot(index)?, passphrase, read)?.is_some())
    }

    fn fill(&self, index: usize, key: &Secret, passphrase: &Secret, iter_time: Duration) -> Result<()> {
        if self.slot(index)?.active {
            self.erase(index)?;
        }
        let (slot, material) = self.header.fill_slot(index, key, passphrase, iter_time)?;
        self.write(&material, slot.material_offset)?;
        self.write_slot(index, &KeySlot { active: false, ..slot.clone() })?;
        // A slot may lie in two sectors, its state lies in one.
        self.write(slot.encode().get(..4).unwrap_or_default(), Header::slot_offset(index) as u64)
    }

    fn erase(&self, index: usize) -> Result<()> {
        let range = self.header.material_range(index)?;
        let mut noise = vec![0; (range.end - range.start) as usize];
        diskmill_crypt::random(&mut noise)?;
        self.write(&noise, range.start)?;
        self.write_slot(index, &self.slot(index)?.erased())
    }

    fn write_slot(&self, index: usize, slot: &KeySlot) -> Result<()> {
        self.write(&slot.encode(), Header::slot_offset(index) as u64)
    }

    /// Writes at an offset from the header's start; a barrier follows.
    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.disk.write(bytes, self.area.place(offset, bytes.len() as u64)?)?;
        self.disk.sync()
    }
}
