//! Who this process is: a persistent identity in its data directory, held by one process at a time.
//!
//! Invariants:
//! * the directory is locked for as long as the [`DataDir`] lives: two processes never share one;
//! * an identity, once written, never changes its UUID, cluster or node id: a mismatch is refused by name;
//! * files are replaced whole (temporary file, fsync, rename, fsync of the directory).

use crate::key::NodeId;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

/// Version of `identity.json`.
const FORMAT: u32 = 1;
const IDENTITY_FILE: &str = "identity.json";
const LOCK_FILE: &str = "LOCK";
const MAP_FILE: &str = "map.bin";

/// Why a data directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process holds it.
    #[error("the data directory {0} is in use by another process; stop it or choose another --data")]
    InUse(PathBuf),
    /// It cannot be read or written.
    #[error("the data directory {path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The identity file is damaged.
    #[error(
        "{path} is damaged ({cause}); restore it from a backup, or remove the whole directory and join as a new node"
    )]
    Damaged {
        /// File.
        path: PathBuf,
        /// Cause.
        cause: String,
    },
    /// Written by another version.
    #[error("{path} has format {found}, this binary reads format {FORMAT}; use the binary that wrote it")]
    Format {
        /// File.
        path: PathBuf,
        /// Format found.
        found: u32,
    },
}

/// Who a node is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    format: u32,
    /// Made once, at the first start.
    pub uuid: String,
    /// Cluster it belongs to, once known.
    pub cluster_id: Option<String>,
    /// Its node id there.
    pub node: Option<NodeId>,
    /// True on the node that formed the cluster.
    pub founder: bool,
}

impl Identity {
    /// A new identity that belongs nowhere yet.
    #[must_use]
    pub fn new(uuid: String) -> Self {
        Self { format: FORMAT, uuid, cluster_id: None, node: None, founder: false }
    }
}

/// A locked data directory.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Creates the directory if it is not there, and locks it.
    ///
    /// # Errors
    /// [`DataDirError::InUse`] when another process holds it; IO errors with the path.
    pub fn open(path: &Path) -> Result<Self, DataDirError> {
        fs::create_dir_all(path).map_err(io_at(path))?;
        let lock_path = path.join(LOCK_FILE);
        let lock =
            File::options().create(true).write(true).truncate(false).open(&lock_path).map_err(io_at(&lock_path))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(fs::TryLockError::WouldBlock) => Err(DataDirError::InUse(path.to_owned())),
            Err(fs::TryLockError::Error(source)) => Err(DataDirError::Io { path: lock_path, source }),
        }
    }

    /// A file or folder inside.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The stored identity, if there is one.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn identity(&self) -> Result<Option<Identity>, DataDirError> {
        let path = self.join(IDENTITY_FILE);
        let Some(bytes) = read_if_there(&path)? else { return Ok(None) };
        let identity: Identity = serde_json::from_slice(&bytes)
            .map_err(|error| DataDirError::Damaged { path: path.clone(), cause: error.to_string() })?;
        if identity.format != FORMAT {
            return Err(DataDirError::Format { path, found: identity.format });
        }
        Ok(Some(identity))
    }

    /// Stores the identity; durable on return.
    ///
    /// # Errors
    /// IO errors with the path.
    pub fn save_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        let bytes = serde_json::to_vec_pretty(identity).expect("an identity is plain data");
        self.replace(IDENTITY_FILE, &bytes)
    }

    /// The last stored map, if there is one.
    ///
    /// # Errors
    /// IO errors with the path.
    pub fn map(&self) -> Result<Option<Vec<u8>>, DataDirError> {
        read_if_there(&self.join(MAP_FILE))
    }

    /// Stores the map; durable on return.
    ///
    /// # Errors
    /// IO errors with the path.
    pub fn save_map(&self, bytes: &[u8]) -> Result<(), DataDirError> {
        self.replace(MAP_FILE, bytes)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), DataDirError> {
        let (path, temporary) = (self.join(name), self.join(&format!("{name}.tmp")));
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(io_at(&path))
    }
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, DataDirError> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_at(path)(error)),
    }
}

fn io_at(path: &Path) -> impl Fn(io::Error) -> DataDirError + '_ {
    |source| DataDirError::Io { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_held_once_and_keeps_its_identity() {
        let dir = tempfile::tempdir().unwrap();
        let held = DataDir::open(dir.path()).unwrap();
        assert!(matches!(DataDir::open(dir.path()), Err(DataDirError::InUse(_))));
        assert_eq!(held.identity().unwrap(), None);
        let mut identity = Identity::new("u".to_owned());
        identity.node = Some(NodeId(3));
        held.save_identity(&identity).unwrap();
        drop(held);
        assert_eq!(DataDir::open(dir.path()).unwrap().identity().unwrap(), Some(identity));
    }

    #[test]
    fn a_damaged_identity_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let held = DataDir::open(dir.path()).unwrap();
        fs::write(held.join(IDENTITY_FILE), b"{\"format\":1").unwrap();
        let error = held.identity().unwrap_err().to_string();
        assert!(error.contains("identity.json is damaged"), "{error}");
    }
}
