//! The search for an order: Wing and Gong's, with Lowe's memory of the configurations that led nowhere.
//!
//! A configuration is a set of operations that have taken effect and the state they left. An operation can be next if no
//! other one returned before it was called. What keeps the number of configurations small, without loss:
//! * an operation that only observes takes effect as soon as it can and fits: the state stays what it was;
//! * a write that nobody observes takes effect just before any other unconditional write;
//! * of open operations that do the same, the one called first takes effect first.
//!
//! Invariants:
//! * intervals are closed: equal times are concurrent; open operations take effect at any time after their call, or never;
//! * the configurations visited are bounded by the budget: past it the answer is [`Found::GaveUp`], never a guess;
//! * configurations are remembered by a hash of 128 bits.

use super::ops::OPEN;
use std::collections::HashSet;

/// How an operation bears on others.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Never changes the state.
    Observer,
    /// Leaves what it leaves, whatever it finds; nobody observes it.
    Unseen,
    /// Leaves what it leaves, whatever it finds.
    Blind,
    /// Anything else.
    Conditional,
}

/// An operation to be placed.
#[derive(Clone, Debug)]
pub(super) struct Entry<A> {
    pub(super) call: u64,
    /// [`OPEN`]: may take effect at any time, or never.
    pub(super) ret: u64,
    pub(super) act: A,
    pub(super) role: Role,
}

/// What a search found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Found {
    /// An order.
    Order,
    /// That there is none.
    NoOrder,
    /// Nothing, within its budget.
    GaveUp,
}

/// Searches an order in which every closed operation takes effect within its interval.
///
/// `step` gives the state after an act, or none if the act does not fit. Takes what it visits off `budget`.
pub(super) fn search<A: PartialEq>(
    mut entries: Vec<Entry<A>>,
    initial: i64,
    step: impl FnMut(i64, &A) -> Option<i64>,
    budget: &mut u64,
) -> Found {
    // Closed ones first, each part in the order of the calls.
    entries.sort_by_key(|entry| (entry.ret == OPEN, entry.call));
    let closed = entries.iter().filter(|entry| entry.ret != OPEN).count();
    let done = vec![false; entries.len()];
    let mut walk = Walk { entries, closed, step, done, low: 0, state: initial, hash: 0, visited: HashSet::new() };
    walk.run(budget)
}

struct Walk<A, S> {
    entries: Vec<Entry<A>>,
    /// Entries before this one are closed.
    closed: usize,
    step: S,
    done: Vec<bool>,
    /// Every entry before this one is done.
    low: usize,
    state: i64,
    hash: u128,
    visited: HashSet<u128>,
}

/// A choice that was made, to be taken back.
struct Frame {
    /// What can come next, the best one last.
    choices: Vec<(usize, i64)>,
    /// What was done on entering.
    marked: Vec<usize>,
    low: usize,
    state: i64,
}

impl<A: PartialEq, S: FnMut(i64, &A) -> Option<i64>> Walk<A, S> {
    fn run(&mut self, budget: &mut u64) -> Found {
        let mut frames: Vec<Frame> = Vec::new();
        let mut next: Option<(usize, i64)> = None;
        loop {
            let mut frame = Frame { choices: Vec::new(), marked: Vec::new(), low: self.low, state: self.state };
            if let Some((at, state)) = next {
                self.choose(at, state, &mut frame.marked);
            }
            self.observe(&mut frame.marked);
            if self.low == self.closed {
                return Found::Order;
            }
            if self.visited.insert(self.hash ^ mark(self.state.cast_unsigned(), u64::MAX)) {
                if *budget == 0 {
                    return Found::GaveUp;
                }
                *budget -= 1;
                frame.choices = self.choices();
            }
            frames.push(frame);
            next = loop {
                let Some(frame) = frames.last_mut() else { return Found::NoOrder };
                if let Some(choice) = frame.choices.pop() {
                    break Some(choice);
                }
                let frame = frames.pop().expect("it was the last one");
                for at in frame.marked {
                    self.done[at] = false;
                    self.hash ^= mark(at as u64, 0);
                }
                (self.low, self.state) = (frame.low, frame.state);
            };
        }
    }

    fn set_done(&mut self, at: usize, marked: &mut Vec<usize>) {
        self.done[at] = true;
        self.hash ^= mark(at as u64, 0);
        marked.push(at);
        while self.low < self.closed && self.done[self.low] {
            self.low += 1;
        }
    }

    /// Lets one operation take effect, and before it the unseen ones that can.
    fn choose(&mut self, at: usize, state: i64, marked: &mut Vec<usize>) {
        if matches!(self.entries[at].role, Role::Blind | Role::Unseen) {
            let unseen = |other: &usize| *other != at && self.entries[*other].role == Role::Unseen;
            for other in self.candidates().into_iter().filter(unseen).collect::<Vec<_>>() {
                self.set_done(other, marked);
            }
        }
        self.set_done(at, marked);
        self.state = state;
    }

    /// Lets every observer take effect that can and fits.
    fn observe(&mut self, marked: &mut Vec<usize>) {
        loop {
            let before = marked.len();
            for at in self.candidates() {
                let entry = &self.entries[at];
                if entry.role == Role::Observer && (self.step)(self.state, &entry.act).is_some() {
                    self.set_done(at, marked);
                }
            }
            if marked.len() == before {
                return;
            }
        }
    }

    /// Closed operations that can be next: nothing undone returned before their call.
    fn candidates(&self) -> Vec<usize> {
        let mut found = Vec::new();
        let mut first_ret = OPEN;
        for at in self.low..self.closed {
            let entry = &self.entries[at];
            if entry.call > first_ret {
                break;
            }
            if !self.done[at] {
                first_ret = first_ret.min(entry.ret);
                found.push(at);
            }
        }
        found.retain(|at| self.entries[*at].call <= first_ret);
        found
    }

    /// What can be next and changes the state, with the state after it; the most urgent last.
    fn choices(&mut self) -> Vec<(usize, i64)> {
        let mut closed = self.candidates();
        let first_ret = closed.iter().map(|at| self.entries[*at].ret).min().unwrap_or(OPEN);
        closed.retain(|at| self.entries[*at].role != Role::Observer);
        // All unseen ones go together: one stands for them.
        let mut unseen = closed.iter().copied().filter(|at| self.entries[*at].role == Role::Unseen);
        let first_unseen = unseen.next();
        closed.retain(|at| self.entries[*at].role != Role::Unseen || Some(*at) == first_unseen);
        closed.sort_by_key(|at| std::cmp::Reverse(self.entries[*at].ret));
        let mut all: Vec<usize> = Vec::new();
        for at in self.closed..self.entries.len() {
            let entry = &self.entries[at];
            if entry.call > first_ret {
                break;
            }
            if !self.done[at] && !all.iter().any(|other| self.entries[*other].act == entry.act) {
                all.push(at);
            }
        }
        all.extend(closed);
        let state = self.state;
        all.into_iter().filter_map(|at| (self.step)(state, &self.entries[at].act).map(|after| (at, after))).collect()
    }
}

/// A number that stands for an operation, or a state, in the hash of a set (splitmix64, twice).
fn mark(of: u64, salt: u64) -> u128 {
    let mix = |mut z: u64| {
        z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    let high = mix(of ^ salt.rotate_left(17));
    let low = mix(high.wrapping_add(of).wrapping_add(salt));
    (u128::from(high) << 64) | u128::from(low)
}
