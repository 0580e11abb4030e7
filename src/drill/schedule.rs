//! Which fault comes when: pure, and the same for the same seed.
//!
//! Faults are dealt like cards: every requested one comes once, in a shuffled order, before any comes again. So even a
//! short run has all of them. Some come while another one is on.

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
/// Share of faults that another one joins, and after which share of the first's time it does.
const JOINED_SHARE: f64 = 0.4;
const JOINS_AFTER_SHARE: (f64, f64) = (0.1, 0.9);

/// One fault that is due.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Turn {
    /// What.
    pub fault: Fault,
    /// Since the round began.
    pub after: Duration,
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

    /// The next round, when this much time is left: a fault, or two of which the second begins while the first is on.
    /// Empty if there are no faults.
    pub fn next(&mut self, left: Duration) -> Vec<Turn> {
        if self.deck.is_empty() {
            self.deck.clone_from(&self.faults);
            self.deck.shuffle(&mut self.rng);
        }
        let fair = left / self.deck.len().max(1) as u32;
        let Some(fault) = self.deck.pop() else { return Vec::new() };
        let first = self.turn(fault, Duration::ZERO, fair);
        let joining = self.deck.iter().rposition(|other| other.may_join(fault));
        let joining = joining.filter(|_| self.rng.random_bool(JOINED_SHARE)).map(|at| self.deck.remove(at));
        let second = joining.map(|fault| {
            let after = first.lasts.mul_f64(self.rng.random_range(JOINS_AFTER_SHARE.0..JOINS_AFTER_SHARE.1));
            self.turn(fault, after, fair)
        });
        [Some(first), second].into_iter().flatten().collect()
    }

    fn turn(&mut self, fault: Fault, after: Duration, fair: Duration) -> Turn {
        self.dealt += 1;
        let hurry = self.dealt <= self.faults.len() && fair < TURN;
        // Some last past the point at which connections in silence are given up.
        let stretch = if self.rng.random_bool(LONG_SHARE) && !hurry { 2.0 } else { 1.0 };
        let turn = if hurry { fair } else { TURN };
        let share = self.rng.random_range(LASTS_SHARE.0..LASTS_SHARE.1) * stretch;
        let lasts = turn.mul_f64(share).clamp(LASTS_MIN, LASTS_MAX);
        Turn { fault, after, lasts, seed: self.rng.random() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    /// Rounds until every fault came so many times.
    fn rounds(seed: u64, decks: usize) -> Vec<Vec<Turn>> {
        let mut schedule = Schedule::new(&Fault::ALL, seed);
        let (mut rounds, mut dealt) = (Vec::new(), 0);
        while dealt < decks * Fault::ALL.len() {
            rounds.push(schedule.next(MINUTE));
            dealt += rounds.last().unwrap().len();
        }
        rounds
    }

    #[test]
    fn every_fault_comes_before_any_comes_again_and_a_seed_is_a_schedule() {
        let all = rounds(7, 2).concat();
        for deck in all.chunks(Fault::ALL.len()) {
            let mut faults: Vec<Fault> = deck.iter().map(|turn| turn.fault).collect();
            faults.sort_unstable();
            assert_eq!(faults, Fault::ALL);
        }
        assert_eq!(all, rounds(7, 2).concat());
        assert_ne!(all, rounds(8, 2).concat());
        assert!(all.iter().all(|turn| turn.lasts >= LASTS_MIN && turn.lasts <= LASTS_MAX));
    }

    #[test]
    fn some_faults_begin_while_one_that_they_may_join_is_on() {
        let rounds = rounds(7, 20);
        let joined: Vec<_> = rounds.iter().filter(|round| round.len() == 2).collect();
        assert!(joined.len() > 20 && rounds.len() > 2 * joined.len(), "{} of {}", joined.len(), rounds.len());
        for round in joined {
            assert!(round[1].fault.may_join(round[0].fault));
            assert!(round[1].after > Duration::ZERO && round[1].after < round[0].lasts);
        }
    }

    #[test]
    fn all_faults_fit_into_the_time_that_is_left() {
        let mut schedule = Schedule::new(&Fault::ALL, 1);
        let (mut left, mut dealt) = (MINUTE, 0);
        while dealt < Fault::ALL.len() {
            let round = schedule.next(left);
            dealt += round.len();
            let lasts = round.iter().map(|turn| turn.after + turn.lasts).max().unwrap();
            left = left.saturating_sub(lasts + Duration::from_millis(1_200));
        }
        assert!(left > Duration::ZERO);
    }

    #[test]
    fn no_faults_is_no_schedule() {
        assert_eq!(Schedule::new(&[], 1).next(Duration::from_secs(1)), []);
    }
}
