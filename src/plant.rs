//! Bugs that can be planted, one at a time, to see that the tests notice them.
//!
//! Each [`Bug`] is a mistake that systems like this one have made, with its place in the product marked by
//! `if planted(Bug::…)`. Without the feature `planted` that is the constant false, and nothing of the bug is compiled. A
//! simulation plants a bug in its own thread, a process in all of itself (the variable [`VARIABLE`]).
//!
//! `P1` … `P20` are the numbers of the project's list of bugs to be planted. Those that break what does not exist yet are
//! missing: rows that expire (P10), some of partitions that move (P12, P19).
//!
//! Invariants:
//! * a release build cannot have the feature;
//! * a cluster without faults and load forms and comes to rest with any bug: it has to be provoked.

#[cfg(all(feature = "planted", not(debug_assertions)))]
compile_error!("the feature `planted` puts bugs into the product; it is for builds with debug assertions only");

#[cfg(feature = "planted")]
pub use planting::{planted, reached, set, set_from_env};

/// The variable that names the bug of a process: `MERIDIAN_PLANT=ack-before-fsync`.
pub const VARIABLE: &str = "MERIDIAN_PLANT";

macro_rules! bugs {
    ($($(#[doc = $doc:literal])+ $bug:ident = $name:literal, $like:literal, $noticed_by:literal;)*) => {
        /// A mistake that can be planted.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Bug {
            $(
                $(#[doc = $doc])+
                #[doc = ""]
                #[doc = concat!("Like: ", $like, ". To be noticed by: ", $noticed_by, ".")]
                $bug,
            )*
        }

        impl Bug {
            /// Every bug.
            pub const ALL: &[Self] = &[$(Self::$bug),*];

            /// Its name, which stays.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$bug => $name,)*
                }
            }

            /// What is wrong, in a sentence.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self {
                    $(Self::$bug => concat!($($doc),+).trim_ascii(),)*
                }
            }

            /// What it stands for: its number, and who made the same mistake.
            #[must_use]
            pub const fn like(self) -> &'static str {
                match self {
                    $(Self::$bug => $like,)*
                }
            }

            /// The checkers and invariants that can notice it.
            #[must_use]
            pub const fn noticed_by(self) -> &'static str {
                match self {
                    $(Self::$bug => $noticed_by,)*
                }
            }
        }
    };
}

bugs! {
    // What is durable.

    /// A replica answers for entries that are not on its disk yet.
    AckBeforeFsync = "ack-before-fsync", "P1; etcd #14370, NATS 2.12.1", "register, counter and durability after power loss";
    /// A vote is given and never written.
    VoteNotPersisted = "vote-not-persisted", "P2; etcd #14140", "election safety, register after power loss";
    /// A failed write of the log counts as done.
    FsyncErrorIgnored = "fsync-error-ignored", "P3; fsyncgate", "durability after power loss";
    /// A log that has a damaged entry is cut off there, and goes on.
    DamageTakenForTornTail = "damage-taken-for-torn-tail", "P15; NATS 2.12.1 (one flipped bit deleted what followed)", "the refusal to start, durability";
    /// At start everything in the log counts as committed.
    RestartAppliesUncommitted = "restart-applies-uncommitted", "etcd #13766", "equal replicas, register (values of failed writes)";
    /// The log on disk is cut beyond what the snapshot holds.
    PurgeBeyondSnapshot = "purge-beyond-snapshot", "P16; TiKV raft-log-gc", "rest after the heal (the replica cannot be restored)";
    /// A change of the map is confirmed without being kept.
    MapNotKept = "map-not-kept", "TiKV test_bootstrap_half_way_failure", "rest after the heal (maps differ)";

    // Who agrees.

    /// Entries that a follower has not confirmed in time count as confirmed.
    TimeoutCountsAsAck = "timeout-counts-as-ack", "openraft #1802 and cecb5de8 (commit without a quorum)", "register, durability after a leader change";
    /// A leader answers linearizable reads without asking a quorum.
    ReadIndexUnconfirmed = "read-index-unconfirmed", "P4; etcd and Consul 2014, VoltDB 6.3", "register (stale read)";
    /// A read shares the confirmation that was under way when it came.
    ReadJoinsRoundUnderWay = "read-joins-round-under-way", "TiKV test_read_index_after_write", "register and levels (stale read on a follower)";
    /// A read that is confirmed does not wait until what was confirmed is applied.
    ReadBeforeApplied = "read-before-applied", "etcd #20418", "register and levels (stale read)";
    /// A leader's lease never ends.
    LeaseNeverExpires = "lease-never-expires", "P5; TiKV test_node_lease_unsafe_during_leader_transfers", "register at the level lease";

    /// A replica that sleeps and does not hear of its leader any more sleeps on.
    SleepsOnAlone = "sleeps-on-alone", "TiKV hibernated peers that nobody wakes", "rest after the heal (a group without a leader)";

    // What a read may claim.

    /// A linearizable read is answered as an eventual one.
    LinearizableWeakened = "linearizable-weakened", "a default that weakens", "register (stale read)";
    /// A follower takes itself for fresh without asking the leader.
    FreshWithoutProof = "fresh-without-proof", "CockroachDB #60520", "levels (stale beyond the bound)";
    /// A follower counts its freshness from the end of the question to the leader, not from its beginning.
    FreshNotedLate = "fresh-noted-late", "FaunaDB 2.5.4 (reads older than asked for)", "levels (stale beyond the bound)";
    /// Every bounded read says that it is not stale at all.
    StalenessClaimedZero = "staleness-claimed-zero", "FaunaDB 2.5.4", "levels (stale beyond what the answer says)";
    /// What a session has seen is not waited for.
    SessionTokenIgnored = "session-token-ignored", "FaunaDB 2.5.4 (reads that go back)", "levels (session order)";
    /// A write's session token is of the moment before it.
    WriteTokenEarly = "write-token-early", "CockroachDB 65823", "levels (a session misses its own write)";

    // What a write does, and how often.

    /// A repeated write is applied again.
    DedupeDisabled = "dedupe-disabled", "P14; TiDB 2.1.7 auto-retry", "counter (applied twice)";
    /// The condition of a repeated write is judged again, on what the row is by now.
    RetryJudgedAgain = "retry-judged-again", "jetcd 0.8.2 (failed, and yet applied)", "register (value of a failed cas)";
    /// A write that was answered, acknowledged and forgotten is applied when it comes once more.
    LateDuplicateApplied = "late-duplicate-applied", "a dedupe entry that has expired", "counter, register (an old value returns)";
    /// The library repeats a write as if it were another.
    RetryRenumbered = "retry-renumbered", "jetcd 0.8.2 (applied twice)", "counter (applied twice)";
    /// A write whose outcome is unknown is reported as not applied.
    UnknownToldAsNotApplied = "unknown-told-as-not-applied", "P18; openraft's ForwardToLeader, Redis-Raft", "register, counter (a failed write is seen)";
    /// Conditions are not looked at.
    ConditionIgnored = "condition-ignored", "a check-and-set that does not check", "register (cas)";
    /// A batch with an unmet condition is applied up to there.
    BatchHalfApplied = "batch-half-applied", "Redis-Raft (aborted reads)", "bank (total changes)";
    /// The last entry of a full batch is left out by who catches up.
    FullBatchLosesEntry = "full-batch-loses-entry", "etcd #14685 (entries skipped)", "equal replicas, register after a restart";
    /// Versions follow the leader's clock, also back.
    VersionsGoBack = "versions-go-back", "etcd #17780 (revisions go back)", "versions only go up";

    // What a snapshot holds.

    /// A snapshot forgets what was answered.
    SnapshotWithoutSessions = "snapshot-without-sessions", "P8; Redis-Raft", "equal replicas, counter (applied twice)";
    /// A snapshot loses its last row.
    SnapshotWithoutLastRow = "snapshot-without-last-row", "P9; TiKV test_correct_snapshot", "equal replicas, durability";
    /// A snapshot holds rows that were written after its position.
    SnapshotAhead = "snapshot-ahead", "P20; etcd #13766 (applied again after a crash)", "equal replicas, counter (applied twice)";
    /// Damaged snapshots are taken.
    ChecksumIgnored = "checksum-ignored", "P15; Jepsen's Redis-Raft", "equal replicas, register (a value that nobody wrote)";

    // What a range shows.

    /// The first row that does not fit a page is left out of the next one.
    PageSkipsRow = "page-skips-row", "FaunaDB 2.5.4 (records lost at page ends)", "rows (lost row)";
    /// The last row of a page comes again on the next one.
    PageRepeatsRow = "page-repeats-row", "FaunaDB 2.5.4", "rows (row seen twice)";
    /// A descending scan leaves out its first row.
    ReverseSkipsFirst = "reverse-skips-first", "an exclusive bound taken for inclusive", "rows (lost row)";
    /// A partition that does not answer is left out of a scan in silence.
    ScanSkipsSilently = "scan-skips-silently", "a partial answer that looks whole", "rows (lost row)";
    /// Rows leave a scan before those that come first have arrived.
    ScanOutOfOrder = "scan-out-of-order", "a merge of answers as they come", "rows (order, row seen twice)";

    // What becomes of partitions that are cut or merged, and of replicas that are replaced.

    /// Reads of single rows do not look at whether the row still lies in the partition.
    BoundsIgnoredAtRead = "bounds-ignored-at-read", "P6; TiKV test_stale_peer (reads with an old epoch)", "register (a row that is not there)";
    /// A page says that it covers all that was asked for, also what was cut off meanwhile.
    PageBeyondBounds = "page-beyond-bounds", "P11; a scan that does not look at the epoch between pages", "rows (lost row)";
    /// A partition that is cut off does not know what was answered before.
    ChildWithoutSessions = "child-without-sessions", "a dedupe table that does not go with its rows", "counter (applied twice)";
    /// A partition that is sealed for a merge still answers reads of single rows.
    SealIgnoredAtRead = "seal-ignored-at-read", "P7; TiKV test_merge (a source that still serves)", "register (stale read)";
    /// A replica that the map gives to others meanwhile is kept by a node that comes back.
    ReplacedReplicaKept = "replaced-replica-kept", "P13; TiKV test_stale_peer_destroy_after_peer_removed", "rest after the heal (a replica too many)";
}

/// Whether this bug is planted: never, in a build without the feature.
#[cfg(not(feature = "planted"))]
#[must_use]
pub const fn planted(_bug: Bug) -> bool {
    false
}

#[cfg(feature = "planted")]
mod planting {
    use super::{Bug, VARIABLE};
    use std::{cell::Cell, sync::OnceLock};

    thread_local! {
        static HERE: Cell<Option<Bug>> = const { Cell::new(None) };
        static REACHED: Cell<u64> = const { Cell::new(0) };
    }
    static PROCESS: OnceLock<Bug> = OnceLock::new();

    /// Whether this bug is planted, in this thread or in the whole process.
    #[must_use]
    pub fn planted(bug: Bug) -> bool {
        let is = HERE.get().or_else(|| PROCESS.get().copied()) == Some(bug);
        if is {
            REACHED.set(REACHED.get() + 1);
        }
        is
    }

    /// Plants a bug in this thread, in the place of the one before: a simulation is one thread.
    pub fn set(bug: Option<Bug>) {
        HERE.set(bug);
        REACHED.set(0);
    }

    /// How often the planted bug has taken effect in this thread since it was planted.
    #[must_use]
    pub fn reached() -> u64 {
        REACHED.get()
    }

    /// Plants the bug that [`VARIABLE`] names, if it is set, in the whole process.
    ///
    /// # Errors
    /// When there is no bug of this name.
    pub fn set_from_env() -> Result<(), super::UnknownBug> {
        if let Some(name) = std::env::var_os(VARIABLE).filter(|name| !name.is_empty()) {
            let bug = name.to_string_lossy().parse()?;
            eprintln!("planted: {bug:?}");
            let _again = PROCESS.set(bug);
        }
        Ok(())
    }
}

/// A name that no bug has.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{VARIABLE}: there is no bug \"{0}\" to plant")]
pub struct UnknownBug(String);

impl std::str::FromStr for Bug {
    type Err = UnknownBug;

    fn from_str(name: &str) -> Result<Self, UnknownBug> {
        Self::ALL.iter().copied().find(|bug| bug.name() == name).ok_or_else(|| UnknownBug(name.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_kebab_case_and_parse() {
        let names: BTreeSet<_> = Bug::ALL.iter().map(|bug| bug.name()).collect();
        assert_eq!(names.len(), Bug::ALL.len());
        for bug in Bug::ALL {
            assert_eq!(bug.name().parse(), Ok(*bug));
            assert!(bug.name().bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'), "{bug:?}");
            assert!(bug.what().ends_with('.') && !bug.like().is_empty() && !bug.noticed_by().is_empty(), "{bug:?}");
        }
        assert!("no-such-bug".parse::<Bug>().unwrap_err().to_string().contains("no-such-bug"));
    }

    #[test]
    fn every_bug_has_a_place() {
        let mut sources = vec![std::path::PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
        let mut text = String::new();
        while let Some(path) = sources.pop() {
            if path.is_dir() {
                sources.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            } else if !path.ends_with("plant.rs") {
                text += &std::fs::read_to_string(path).unwrap();
            }
        }
        for bug in Bug::ALL {
            assert!(text.contains(&format!("Bug::{bug:?}")), "{bug:?} is planted nowhere");
        }
    }

    #[cfg(not(feature = "planted"))]
    #[test]
    fn nothing_is_planted() {
        const { assert!(!planted(Bug::AckBeforeFsync)) }
    }

    #[cfg(feature = "planted")]
    #[test]
    fn one_bug_is_planted_in_one_thread() {
        set(Some(Bug::AckBeforeFsync));
        assert!(planted(Bug::AckBeforeFsync) && !planted(Bug::DedupeDisabled));
        assert_eq!(reached(), 1);
        assert!(std::thread::spawn(|| !planted(Bug::AckBeforeFsync)).join().unwrap());
        set(None);
        assert!(!planted(Bug::AckBeforeFsync) && reached() == 0);
    }
}
