//! A skewed choice of keys, for benchmarks.

/// Skew of YCSB's choice of keys.
const THETA: f64 = 0.99;

/// YCSB's distribution: rank `n` is about `n^-0.99` times as likely as the first.
#[derive(Clone, Copy, Debug)]
pub struct Zipf {
    items: f64,
    zeta: f64,
    eta: f64,
}

impl Zipf {
    /// Over so many items, at least one. Takes time in proportion to them.
    #[must_use]
    pub fn new(items: u64) -> Self {
        let zeta = |count: u64| (1..=count).map(|rank| (rank as f64).powf(-THETA)).sum::<f64>();
        let (zeta, zeta_of_two, items) = (zeta(items), zeta(2), items as f64);
        let eta = (1.0 - (2.0 / items).powf(1.0 - THETA)) / (1.0 - zeta_of_two / zeta);
        Self { items, zeta, eta }
    }

    /// The rank, from 0 for the likeliest, at a point of `[0, 1)` (Gray et al., "Quickly generating billion-record synthetic databases").
    #[must_use]
    pub fn rank(&self, point: f64) -> u64 {
        let scaled = point * self.zeta;
        if scaled < 1.0 {
            0
        } else if scaled < 1.0 + 0.5_f64.powf(THETA) {
            1
        } else {
            let rank = (self.items * (self.eta * point - self.eta + 1.0).powf(1.0 / (1.0 - THETA))) as u64;
            rank.min(self.items as u64 - 1)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_ranks_are_chosen_most_and_none_lies_outside() {
        for items in [1, 2, 3, 1_000] {
            let zipf = Zipf::new(items);
            let mut counts = vec![0_u32; items as usize];
            (0..100_000).for_each(|n| counts[zipf.rank(f64::from(n) / 100_000.0) as usize] += 1);
            assert!(
                counts.windows(2).take(3).all(|pair| pair[0] > pair[1]),
                "{items}: {:?}",
                &counts[..counts.len().min(9)]
            );
        }
        let first = (0..1_000).filter(|n| Zipf::new(1_000).rank(f64::from(*n) / 1_000.0) == 0).count();
        assert!((125..=140).contains(&first), "1 / zeta of 1,000 keys is 0.13: {first}");
    }
}
