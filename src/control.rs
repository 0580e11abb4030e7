//! What `meridian drill` makes a real node suffer from the inside: a wall clock that jumps, a disk that is slow, stalls
//! or is full, and a machine that loses power.
//!
//! Only a node started with the setting `drill.control` (variable `MERIDIAN_DRILL_CONTROL`) has any of it. That names a
//! TOML file of [`Orders`], which the drill replaces whole while the node runs.
//!
//! # Power loss
//!
//! `kill -9` alone never tests a sync: what was written stays in the page cache. But the log writer hands nothing to the
//! operating system before the moment at which it syncs: with `sync_ms` what is to be synced waits in the process for so
//! long, and what need not be synced waits for the next record that must. So `kill -9` loses exactly what was not
//! synced, and whoever is told "durable" too early is found out. What this does not show: a sync that the log engine
//! forgets below its own interface, torn writes, and unsynced files other than the log (a snapshot counts only under the
//! name it gets after its sync; identity and map are small, rare and synced). Those belong to the simulation.
//!
//! Invariants:
//! * without the setting nothing here runs, and no clock or disk is touched;
//! * a node does not outlive the drill that started it.

use crate::env::{self, Clock, SystemClock};
use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

/// How often the file is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Disk {
    /// It works.
    #[default]
    Good,
    /// Nothing more fits.
    Full,
    /// Syncs do not end.
    Stalled,
}

/// What a node is to suffer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Orders {
    /// Added to the wall clock.
    pub wall_offset_ms: i64,
    /// The disk.
    pub disk: Disk,
    /// A sync takes up to this much longer, and at least a tenth of it.
    pub sync_ms: u64,
}

impl Orders {
    /// Replaces the file, so that whoever reads it sees all of it or all of the one before.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let text = toml::to_string(self).map_err(io::Error::other)?;
        let beside = path.with_extension("new");
        std::fs::write(&beside, text)?;
        std::fs::rename(beside, path)
    }

    fn read(path: &Path) -> io::Result<Self> {
        let named = |why: &dyn std::fmt::Display| io::Error::other(format!("drill.control, {}: {why}", path.display()));
        let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
        toml::from_str(&text).map_err(|error| named(&error))
    }
}

/// The orders as they are now.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    orders: Mutex<Orders>,
    changed: Condvar,
}

impl Control {
    /// Follows the file for as long as the control lives.
    ///
    /// # Errors
    /// When the file cannot be read, or holds something else.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        let orders = Orders::read(path)?;
        let control = Arc::new(Self { path: path.to_owned(), orders: Mutex::new(orders), changed: Condvar::new() });
        let weak = Arc::downgrade(&control);
        let parent = rustix::process::getppid();
        thread::Builder::new().name("drill-control".to_owned()).spawn(move || {
            while let Some(control) = weak.upgrade() {
                control.look();
                if rustix::process::getppid() != parent {
                    tracing::error!("the drill that started this node is gone: the node stops");
                    std::process::abort();
                }
                drop(control);
                thread::sleep(LOOK_EVERY);
            }
        })?;
        Ok(control)
    }

    fn look(&self) {
        match Orders::read(&self.path) {
            Ok(orders) if orders != *self.orders.lock() => {
                tracing::info!(?orders, "new orders of the drill");
                *self.orders.lock() = orders;
                self.changed.notify_all();
            }
            Ok(_same) => {}
            Err(error) => tracing::error!(%error, "the orders of the drill cannot be read"),
        }
    }

    /// How the disk is now.
    #[must_use]
    pub fn disk(&self) -> Disk {
        self.orders.lock().disk
    }

    /// Comes before every sync, and takes as long as the disk makes it take.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn before_sync(&self) -> io::Result<()> {
        let mut orders = self.orders.lock();
        let longest = orders.sync_ms;
        if longest > 0 {
            let least = longest.div_ceil(10);
            let takes_ms = least + env::random_u64() % (longest - least + 1);
            drop(orders);
            thread::sleep(Duration::from_millis(takes_ms));
            orders = self.orders.lock();
        }
        while orders.disk == Disk::Stalled {
            self.changed.wait(&mut orders);
        }
        match orders.disk {
            Disk::Full => Err(io::Error::new(io::ErrorKind::StorageFull, "no space left on device (by the drill)")),
            Disk::Good | Disk::Stalled => Ok(()),
        }
    }
}

/// The machine's clocks, with a wall clock that jumps when the drill says so.
#[derive(Debug)]
pub struct ControlledClock(pub Arc<Control>);

impl Clock for ControlledClock {
    fn wall_ms(&self) -> u64 {
        SystemClock.wall_ms().saturating_add_signed(self.0.orders.lock().wall_offset_ms)
    }

    fn elapsed(&self) -> Duration {
        SystemClock.elapsed()
    }

    fn cpu(&self) -> Duration {
        SystemClock.cpu()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn ordered(orders: Orders) -> (tempfile::TempDir, PathBuf, Arc<Control>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.toml");
        orders.write(&path).unwrap();
        let control = Control::open(&path).unwrap();
        (dir, path, control)
    }

    #[test]
    fn the_wall_clock_jumps_when_the_file_says_so_and_time_goes_on() {
        let (_dir, path, control) = ordered(Orders::default());
        let clock = ControlledClock(control);
        let before = clock.elapsed();
        assert!(clock.wall_ms().abs_diff(SystemClock.wall_ms()) < 10_000);
        Orders { wall_offset_ms: -3_600_000, ..Orders::default() }.write(&path).unwrap();
        while SystemClock.wall_ms().saturating_sub(clock.wall_ms()) < 3_500_000 {
            thread::sleep(LOOK_EVERY);
        }
        assert!(clock.elapsed() >= before && clock.elapsed() < before + Duration::from_secs(600));
    }

    #[test]
    fn a_stalled_disk_holds_a_sync_until_it_works_again_and_a_full_one_refuses_it() {
        let (_dir, path, control) = ordered(Orders { disk: Disk::Stalled, ..Orders::default() });
        let (done, ended) = mpsc::channel();
        let waiting = Arc::clone(&control);
        let thread = thread::spawn(move || done.send(waiting.before_sync()));
        assert!(ended.recv_timeout(Duration::from_millis(50)).is_err(), "it hangs");
        Orders { disk: Disk::Full, ..Orders::default() }.write(&path).unwrap();
        assert_eq!(ended.recv().unwrap().unwrap_err().kind(), io::ErrorKind::StorageFull);
        thread.join().unwrap().unwrap();
        Orders::default().write(&path).unwrap();
        while control.before_sync().is_err() {
            thread::sleep(LOOK_EVERY);
        }
    }

    #[test]
    fn orders_that_make_no_sense_are_refused_at_start_with_their_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control.toml");
        std::fs::write(&path, "disk = \"wet\"").unwrap();
        let error = Control::open(&path).unwrap_err().to_string();
        assert!(error.contains("control.toml") && error.contains("wet"), "{error}");
    }
}
