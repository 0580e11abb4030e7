//! What clients do, and which keys they do it to: the same for every system, drawn from the same seeds.

use crate::system::{Form, Level, Way};
use meridian::cli::zipf::Zipf;
use rand::{RngExt as _, rngs::StdRng};

/// Clients of scans of 1,000 rows: more would only wait for each other's megabytes.
const SCANNERS: usize = 16;
/// Rows of the range of which a scan in reverse gives the last ones.
const REVERSE_RANGE_ROWS: u64 = 10_000;
/// Most rows of a scan of YCSB E.
const SHORT_SCAN_ROWS_MAX: u32 = 100;

/// One workload.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Workload {
    pub(crate) name: &'static str,
    pub(crate) what: &'static str,
    pub(crate) mix: Mix,
    pub(crate) clients: Clients,
}

/// How many clients, each with one request in flight.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Clients {
    /// As many as the options say.
    Many,
    /// At most [`SCANNERS`].
    Few,
    One,
    /// As many as the options say, but together no more operations per second than the options say.
    Paced,
}

/// Which operations.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Mix {
    Put,
    Get(Level),
    /// Of so many rows.
    Scan(Form, u32),
    /// Of so many rows, with as many requests as it takes.
    LongScan(u64),
    /// A, B and C: so many reads of a hundred operations, the others writes; keys skewed.
    ReadWrite(u32),
    /// D: reads of what was written last, and some inserts.
    Latest,
    /// E: short scans and some inserts.
    ShortScans,
    /// F: reads, and reads with a write afterwards.
    ReadModifyWrite,
}

/// One operation; keys by number.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Operation {
    Put(u64),
    Get(u64, Level),
    /// A read of a row that may be on its way still.
    GetLatest(u64),
    /// Rows from the first number to below the second; at most so many.
    Scan(Form, (u64, u64), u32),
    LongScan(u64, u64),
    ReadModifyWrite(u64),
    Insert,
}

const fn of(name: &'static str, what: &'static str, mix: Mix, clients: Clients) -> Workload {
    Workload { name, what, mix, clients }
}

/// All of them, in the order in which they are run and shown.
pub(crate) const ALL: &[Workload] = &[
    of("put", "put", Mix::Put, Clients::Many),
    of("get", "get, linearizable", Mix::Get(Level::Linearizable), Clients::Many),
    of("get-lease", "get, lease", Mix::Get(Level::Lease), Clients::Many),
    of("get-eventual", "get, eventual", Mix::Get(Level::Eventual), Clients::Many),
    of("ycsb-a", "YCSB A (50 % reads, 50 % writes)", Mix::ReadWrite(50), Clients::Many),
    of("ycsb-b", "YCSB B (95 % reads, 5 % writes)", Mix::ReadWrite(95), Clients::Many),
    of("ycsb-c", "YCSB C (reads)", Mix::ReadWrite(100), Clients::Many),
    of("ycsb-d", "YCSB D (95 % reads of the latest, 5 % inserts)", Mix::Latest, Clients::Many),
    of("ycsb-e", "YCSB E (95 % scans of 1 to 100 rows, 5 % inserts)", Mix::ShortScans, Clients::Many),
    of("ycsb-f", "YCSB F (50 % reads, 50 % read-modify-writes)", Mix::ReadModifyWrite, Clients::Many),
    of("scan-10", "scan of 10 rows", Mix::Scan(Form::Rows, 10), Clients::Many),
    of("scan-1000", "scan of 1,000 rows, 16 clients", Mix::Scan(Form::Rows, 1_000), Clients::Few),
    of("scan-100000", "scan of 100,000 rows, one client", Mix::LongScan(100_000), Clients::One),
    of("scan-reverse", "last 100 rows of 10,000, 16 clients", Mix::Scan(Form::Reverse, 100), Clients::Few),
    of("scan-keys", "1,000 keys without values, 16 clients", Mix::Scan(Form::Keys, 1_000), Clients::Few),
    of("count", "count of 10,000 rows, 16 clients", Mix::Scan(Form::Count, 10_000), Clients::Few),
    of("one-put", "put, one client", Mix::Put, Clients::One),
    of("one-get", "get, linearizable, one client", Mix::Get(Level::Linearizable), Clients::One),
    of("one-eventual", "get, eventual, one client", Mix::Get(Level::Eventual), Clients::One),
    of("paced-put", "put, at a fixed rate", Mix::Put, Clients::Paced),
    of("paced-get", "get, linearizable, at a fixed rate", Mix::Get(Level::Linearizable), Clients::Paced),
];

/// Those of a quick look.
pub(crate) const QUICK: &[&str] = &["put", "get", "get-eventual", "scan-1000"];

impl Workload {
    /// What is counted.
    pub(crate) const fn unit(&self) -> &'static str {
        if self.mix.counts_rows() { "rows" } else { "ops" }
    }

    pub(crate) fn clients(&self, many: usize) -> usize {
        match self.clients {
            Clients::Many | Clients::Paced => many,
            Clients::Few => many.min(SCANNERS),
            Clients::One => 1,
        }
    }

    pub(crate) const fn is_for(&self, way: Way) -> bool {
        match self.mix {
            Mix::Get(level) => way.can_read(level),
            Mix::Scan(..) | Mix::LongScan(_) | Mix::ShortScans => way.can_scan(),
            _ => true,
        }
    }
}

impl Mix {
    /// Whether every row counts, and not every operation.
    pub(crate) const fn counts_rows(self) -> bool {
        matches!(self, Self::Scan(..) | Self::LongScan(_))
    }

    /// The next operation, when the rows `0..rows` are there.
    pub(crate) fn next(self, rng: &mut StdRng, zipf: &Zipf, rows: u64) -> Operation {
        let dice = rng.random_range(0..100);
        let skewed = |rng: &mut StdRng| scramble(zipf.rank(rng.random())) % rows;
        match self {
            Self::Put => Operation::Put(rng.random_range(0..rows)),
            Self::Get(level) => Operation::Get(rng.random_range(0..rows), level),
            Self::Scan(form, count) => {
                let range = if form == Form::Reverse { REVERSE_RANGE_ROWS } else { count.into() };
                let first = rng.random_range(0..rows.saturating_sub(range).max(1));
                Operation::Scan(form, (first, first + range), count)
            }
            Self::LongScan(count) => {
                let first = rng.random_range(0..rows.saturating_sub(count).max(1));
                Operation::LongScan(first, first + count)
            }
            Self::ReadWrite(reads) if dice < reads => Operation::Get(skewed(rng), Level::Linearizable),
            Self::ReadWrite(_) => Operation::Put(skewed(rng)),
            Self::Latest | Self::ShortScans if dice >= 95 => Operation::Insert,
            Self::Latest => Operation::GetLatest((rows - 1).saturating_sub(zipf.rank(rng.random()))),
            Self::ShortScans => {
                let (first, count) = (skewed(rng), rng.random_range(1..=SHORT_SCAN_ROWS_MAX));
                Operation::Scan(Form::Rows, (first, first + u64::from(count)), count)
            }
            Self::ReadModifyWrite if dice < 50 => Operation::Get(skewed(rng), Level::Linearizable),
            Self::ReadModifyWrite => Operation::ReadModifyWrite(skewed(rng)),
        }
    }
}

/// Spreads the popular ranks over all keys.
const fn scramble(rank: u64) -> u64 {
    let mixed = (rank ^ (rank >> 30)).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 1
}
