//! Which fault comes when: pure, and the same for the same seed.
//!
//! Faults are dealt like cards: every requested one comes once, in a shuffled order, before any comes again. So even a
//! short run has all of them.

use super::settings::Fault;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng, seq::SliceRandom as _};
use std::time::Duration;

/// A fault lasts at least this long: an election must fit in.
pub const LASTS_MIN: Duration = Duration::from_millis(1_200);
/// And at most this long.
pub const LASTS_MAX: Duration = Duration::from_secs(9);
/// Length of a turn when there is no hurry.
const TURN: Duration = Duration::from_secs(6);
/// Share of its turn that a fault lasts; the rest is for the cluster to recover.
const LASTS_SHARE: (f64, f64) = (0.3, 0.7);
/// Share of faults that last twice as long.
const LONG_SHARE: f64 = 0.15;

/// One fault that is due.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    /// What.
    pub fault: Fault,
    /// How long.
    pub lasts: Duration,
    /// Victims and the like follow from this.
    pub seed: u64,
}

/// Deals faults.
#[derive(Debug)]
pub struct Schedule {
    rng: StdRng,
    faults: Vec<Fault>,
    deck: Vec<Fault>,
    dealt: usize,
}

impl Schedule {
    /// Deals these.
    #[must_use]
    pub fn new(faults: &[Fault], seed: u64) -> Self {
        Self { rng: StdRng::seed_from_u64(seed), faults: faults.to_vec(), deck: Vec::new(), dealt: 0 }
    }

    /// The next turn, when this much time is left; none if there are no faults.
    pub fn next(&mut self, left: Duration) -> Option<Turn> {
        if self.deck.is_empty() {
            self.deck.clone_from(&self.faults);
            self.deck.shuffle(&mut self.rng);
        }
        let waiting = self.deck.len() as u32;
        let fault = self.deck.pop()?;
        self.dealt += 1;
        let fair = left / waiting;
        let hurry = self.dealt <= self.faults.len() && fair < TURN;
        // Some last past the point at which connections in silence are given up.
        let stretch = if self.rng.random_bool(LONG_SHARE) && !hurry { 2.0 } else { 1.0 };
        let turn = if hurry { fair } else { TURN };
        let share = self.rng.random_range(LASTS_SHARE.0..LASTS_SHARE.1) * stretch;
        let lasts = turn.mul_f64(share).clamp(LASTS_MIN, LASTS_MAX);
        Some(Turn { fault, lasts, seed: self.rng.random() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(seed: u64, count: usize) -> Vec<Turn> {
        let mut schedule = Schedule::new(&Fault::ALL, seed);
        (0..count).map(|_| schedule.next(Duration::from_secs(60)).unwrap()).collect()
    }

    #[test]
    fn every_fault_comes_before_any_comes_again_and_a_seed_is_a_schedule() {
        let all = turns(7, 2 * Fault::ALL.len());
        for deck in all.chunks(Fault::ALL.len()) {
            let mut faults: Vec<Fault> = deck.iter().map(|turn| turn.fault).collect();
            faults.sort_unstable();
            assert_eq!(faults, Fault::ALL);
        }
        assert_eq!(all, turns(7, 2 * Fault::ALL.len()));
        assert_ne!(all, turns(8, 2 * Fault::ALL.len()));
        assert!(all.iter().all(|turn| turn.lasts >= LASTS_MIN && turn.lasts <= LASTS_MAX));
    }

    #[test]
    fn all_faults_fit_into_the_time_that_is_left() {
        let mut schedule = Schedule::new(&Fault::ALL, 1);
        let mut left = Duration::from_secs(60);
        for _ in Fault::ALL {
            left = left.saturating_sub(schedule.next(left).unwrap().lasts + Duration::from_millis(1_200));
        }
        assert!(left > Duration::ZERO);
    }

    #[test]
    fn no_faults_is_no_schedule() {
        assert_eq!(Schedule::new(&[], 1).next(Duration::from_secs(1)), None);
    }
}
