//! The smallest Windows registry hive: a base block, one bin, and in it the root key with its security descriptor. Written
//! from the public description of the format ("Windows registry file format specification" by M. Suhanov).

/// Size of the base block and of a bin, in bytes.
const BLOCK: usize = 4096;
/// No cell.
const NONE: u32 = u32::MAX;

/// A hive without any key or value, as version 1.3.
pub fn empty_hive() -> Vec<u8> {
    // Offsets of cells count from the bin's header, which has 32 bytes.
    let root_at = 32;
    let security_at = root_at + cell(&root_key(0)).len() as u32;
    let mut bin = b"hbin".to_vec();
    put(&mut bin, &[0, BLOCK as u32, 0, 0, 0, 0, 0]);
    bin.extend(cell(&root_key(security_at)));
    bin.extend(cell(&security(security_at)));
    let free = BLOCK - bin.len();
    put(&mut bin, &[free as u32]);
    bin.resize(BLOCK, 0);

    let mut hive = b"regf".to_vec();
    // Two equal sequence numbers (nothing was left half-written), time, version, type, format, root, size, clustering.
    put(&mut hive, &[1, 1, 0, 0, 1, 3, 0, 1, root_at, BLOCK as u32, 1]);
    hive.resize(508, 0);
    let words = hive.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap()));
    let checksum = words.fold(0, |sum, word| sum ^ word);
    put(&mut hive, &[checksum]);
    hive.resize(BLOCK, 0);
    hive.extend(bin);
    hive
}

fn put(out: &mut Vec<u8>, words: &[u32]) {
    words.iter().for_each(|word| out.extend(word.to_le_bytes()));
}

/// A cell in use: its size is negative, and a multiple of 8.
fn cell(content: &[u8]) -> Vec<u8> {
    let size = (content.len() + 4).next_multiple_of(8);
    let mut cell = (-(size as i32)).to_le_bytes().to_vec();
    cell.extend(content);
    cell.resize(size, 0);
    cell
}

fn root_key(security_at: u32) -> Vec<u8> {
    let mut key = b"nk".to_vec();
    // The root of the hive, not to be deleted, its name in ASCII.
    key.extend(0x2cu16.to_le_bytes());
    // Time, access, parent, sub-keys (stable, volatile), their lists, values, their list, security, class, longest names.
    put(&mut key, &[0, 0, 0, 0, 0, 0, NONE, NONE, 0, NONE, security_at, NONE, 0, 0, 0, 0, 0]);
    key.extend([4, 0, 0, 0]);
    key.extend(b"ROOT");
    key
}

fn security(at: u32) -> Vec<u8> {
    // A self-relative security descriptor without owner, group and lists.
    let descriptor = [1, 0, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let mut key = b"sk\0\0".to_vec();
    put(&mut key, &[at, at, 1, descriptor.len() as u32]);
    key.extend(descriptor);
    key
}
