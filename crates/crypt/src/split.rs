//! The anti-forensic splitter: spreads a key over many stripes, all of which are needed to get it back (LUKS
//! specification, section 2.4).

use crate::{CryptError, Hash, Secret};

/// The key that was split into `material`, a whole number of stripes of `key_len` bytes.
pub(crate) fn merge(hash: Hash, material: &[u8], key_len: usize) -> Secret {
    let mut key = Secret::zeros(key_len);
    let stripes = material.len() / key_len.max(1);
    for (index, stripe) in material.chunks_exact(key_len.max(1)).enumerate() {
        xor(key.bytes_mut(), stripe);
        if index + 1 < stripes {
            diffuse(hash, key.bytes_mut());
        }
    }
    key
}

/// Splits `key` into stripes that fill `material`, a whole number of them.
pub(crate) fn split(hash: Hash, key: &Secret, material: &mut [u8]) -> Result<(), CryptError> {
    let len = key.bytes().len();
    let mut sum = Secret::zeros(len);
    let Some(last) = material.len().checked_sub(len) else {
        return Err(CryptError::Corrupt("a key of no stripes".to_owned()));
    };
    let (random, end) = material.split_at_mut(last);
    crate::random(random)?;
    for stripe in random.chunks_exact(len.max(1)) {
        xor(sum.bytes_mut(), stripe);
        diffuse(hash, sum.bytes_mut());
    }
    end.copy_from_slice(key.bytes());
    xor(end, sum.bytes());
    Ok(())
}

/// Replaces each block of the hash's size by its digest, which counts the blocks.
fn diffuse(hash: Hash, bytes: &mut [u8]) {
    for (index, block) in (0u32..).zip(bytes.chunks_mut(hash.len())) {
        let digest = hash.digest(&[&index.to_be_bytes(), block]);
        for (byte, new) in block.iter_mut().zip(digest) {
            *byte = new;
        }
    }
}

fn xor(into: &mut [u8], other: &[u8]) {
    for (byte, other) in into.iter_mut().zip(other) {
        *byte ^= other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_split_merges_again() {
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512] {
            for len in [16, 32, 64] {
                let key = Secret::new((0..len).map(|byte| byte as u8).collect());
                let mut material = vec![0; len * 40];
                split(hash, &key, &mut material).unwrap();
                assert_eq!(merge(hash, &material, len).bytes(), key.bytes());
                material[3] ^= 1;
                assert_ne!(merge(hash, &material, len).bytes(), key.bytes());
            }
        }
    }
}
