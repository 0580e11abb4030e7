//! Finds synced writes that have become unreadable.
//!
//! When fjall opens a journal it takes the first thing that it cannot read for the torn end of the last write, and cuts
//! the file there. After a loss of power that is right; if a byte in the middle has rotted, everything behind it would
//! vanish in silence, votes and acknowledged entries included. So every synced batch carries a *seal*: a random id of
//! this log, and a number that goes up by one per sync. Write `n` is begun only when `n - 1` is on the disk, therefore
//! a seal `n` seen anywhere in the journals proves that everything up to `n - 1` must be readable.

use super::{corrupt, error_at, layout::SEAL_KEY};
use crate::{
    env,
    plant::{Bug, planted},
};
use fjall::Keyspace;
use std::{
    fs::{self, File},
    io::{self, Read, Write as _},
    path::{Path, PathBuf},
};

const ID_BYTES: usize = 16;
const SEAL_BYTES: usize = ID_BYTES + 8;
const ID_FILE: &str = "seal";

/// Bytes of a journal looked at together.
const WINDOW_BYTES: usize = 1 << 20;

/// The id of one log.
pub(super) struct Seal {
    dir: PathBuf,
    id: [u8; ID_BYTES],
}

/// The highest seal seen in the journals, and in which.
pub(super) type Written = Option<(u64, PathBuf)>;

impl Seal {
    /// Reads the id, or draws one for a new log.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        let path = dir.join(ID_FILE);
        let id = match fs::read(&path) {
            Ok(id) => {
                id.try_into().map_err(|_| corrupt(dir, format!("{} is not of {ID_BYTES} bytes", path.display())))?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.join("db").exists() => {
                Self::draw(dir, &path)?
            }
            Err(error) => return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
        };
        Ok(Self { dir: dir.to_owned(), id })
    }

    fn draw(dir: &Path, path: &Path) -> io::Result<[u8; ID_BYTES]> {
        let mut id = [0; ID_BYTES];
        id[..8].copy_from_slice(&env::random_u64().to_be_bytes());
        id[8..].copy_from_slice(&env::random_u64().to_be_bytes());
        let unfinished = dir.join("seal.unfinished");
        let mut file = File::create(&unfinished)?;
        file.write_all(&id)?;
        file.sync_all()?;
        fs::rename(unfinished, path)?;
        File::open(dir)?.sync_all()?;
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            File::open(parent)?.sync_all()?;
        }
        Ok(id)
    }

    /// The seal of synced write `number`.
    pub(super) fn stamp(&self, number: u64) -> Vec<u8> {
        [self.id.as_slice(), &number.to_be_bytes()].concat()
    }

    /// The number of the last synced write that can be read, if all that must be readable is.
    pub(super) fn check(&self, records: &Keyspace, written: Written) -> io::Result<u64> {
        let stored = records.get(SEAL_KEY).map_err(|error| error_at(&self.dir, error))?;
        let read = match &stored {
            None => 0,
            Some(seal) => self.number(seal).ok_or_else(|| corrupt(&self.dir, "the seal is of another log"))?,
        };
        match written {
            Some((written, path)) if written > read + 1 && !planted(Bug::DamageTakenForTornTail) => Err(corrupt(
                &self.dir,
                format!(
                    "{} holds synced write {written}, but only those up to {read} can be read: bytes between them \
                     have changed on the disk. This node cannot be trusted to remember what it acknowledged: \
                     remove its data directory and let it join anew",
                    path.display()
                ),
            )),
            _ => Ok(read),
        }
    }

    fn number(&self, seal: &[u8]) -> Option<u64> {
        let number = seal.strip_prefix(&self.id)?.get(..SEAL_BYTES - ID_BYTES)?;
        Some(crate::key::first_u64(number))
    }

    /// The highest number in `bytes`.
    fn highest(&self, bytes: &[u8]) -> Option<u64> {
        let mut highest = None;
        let mut rest = bytes;
        while let Some(skip) = rest.iter().position(|byte| *byte == self.id[0]) {
            rest = &rest[skip..];
            highest = highest.max(self.number(rest));
            rest = &rest[1..];
        }
        highest
    }
}

/// Looks for seals in all journals, before fjall opens and cuts them.
pub(super) fn last_written(database: &Path, seal: &Seal) -> io::Result<Written> {
    let mut written: Written = None;
    let entries = match fs::read_dir(database) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    for entry in entries {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "jnl") {
            continue;
        }
        let highest = highest_in(&path, seal)?;
        if highest > written.as_ref().map(|(number, _)| *number) {
            written = highest.map(|number| (number, path));
        }
    }
    Ok(written)
}

fn highest_in(path: &Path, seal: &Seal) -> io::Result<Option<u64>> {
    let mut file = File::open(path)?;
    let mut window = Vec::with_capacity(WINDOW_BYTES + SEAL_BYTES);
    let mut highest = None;
    loop {
        // A seal may lie across the border of two windows.
        let keep = window.len().saturating_sub(SEAL_BYTES - 1);
        window.drain(..keep);
        if Read::by_ref(&mut file).take(WINDOW_BYTES as u64).read_to_end(&mut window)? == 0 {
            return Ok(highest);
        }
        highest = highest.max(seal.highest(&window));
    }
}
