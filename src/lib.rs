//! Meridian: a strongly consistent, distributed, in-memory key-value store with range queries.
//!
//! People use [`client`] (and the `meridian` binary, which is [`cli`]); everything else is how it works. What each read
//! level promises, and the test that shows it, is in CONSISTENCY.md; how to run it is in README.md.
//!
//! # Words
//!
//! | word | meaning |
//! |---|---|
//! | keyspace | a named collection: kind of keys, layout (`ordered` or `hashed`), replication factor |
//! | partition | one contiguous interval `[start, end)` of a keyspace's order: the unit of replication |
//! | group | the Raft group that serves one partition; group 0 is the placement driver's |
//! | replica | one incarnation of a group's member on a node; its id comes from the driver and is never reused |
//! | node | one server process, with a persistent UUID and a small numeric id |
//! | ring | the consistent-hash ring that says which nodes should hold a partition |
//! | epoch | (bounds version, members version) of a partition; goes up with every change of its shape |
//! | map | all partitions with their epochs: the routing table |
//! | version | hybrid logical time of a row's last write; goes up per key for ever |
//!
//! # Layers
//!
//! A module imports from lower layers only; `tests/tidy` reads the source and fails otherwise.
//!
//! | layer | modules | |
//! |---|---|---|
//! | 4 | [`server`], [`cli`], [`proof`], [`drill`] | decode, check, call, encode · the command line · workloads and checkers · faults on real processes |
//! | 3 | [`client`], [`node`] | routing, retries, scans, outside and inside · one process: its replicas, its part in the driver |
//! | 2 | [`raft`], [`log`], [`transport`] | openraft behind [`raft::Group`] · the durable log · frames between nodes |
//! | 1 | [`kv`], [`placement`] | pure: what a partition replicates · what the driver replicates, and what it plans |
//! | 0 | [`key`], [`error`], [`mod@env`], [`proto`], [`telemetry`], [`control`], [`plant`] | words, the catalogue of errors, the seams, generated code, metrics, what drills do to a node, bugs for tests of the tests |
//!
//! The pure layer sees no clock, randomness, task, socket or file. `openraft` appears only in [`raft`]. Time, randomness,
//! tasks, network and storage are handed in ([`mod@env`], [`transport::Transport`], [`log::LogEngine`],
//! [`log::snapshots::SnapshotStore`]), so that a whole cluster of production nodes runs in one thread under a seed.
//!
//! # A write
//!
//! [`client::router::Router`] finds the partition in the map, stamps the write with its session and sequence, and sends
//! it to the leader, following hints, with whatever else waits for that node as one message ([`client::pipeline`]) →
//! `server::pipeline` has requests that ask the same of the same partition executed together → `server::exec` checks what
//! is wrong in itself → [`node::Partition`] batches the writes that wait into one entry → [`raft::Group::write`] → one
//! fsync for all groups of the node, in parallel with replication → quorum → [`kv::Store::apply`] decides, in log order,
//! who owns the key, whether the condition holds and whether the write is a repetition → the reply. An error says `not
//! applied` only if the write was never proposed or was refused in the log; everything else is `unknown`, and safe to
//! retry under the same sequence.
//!
//! The other replicas hear of the commit with the next entries, or a millisecond later. Entries that are applied leave the
//! memory, but for the last megabyte of a group: a replica that lags by more has them read from the disk.
//!
//! Before it is batched, the write takes its place in the budgets of its node ([`node::Admission`]): one that there is no
//! room for is refused there, before it costs anything.
//!
//! # A read
//!
//! The same router picks a replica by the level asked for. The replica first reaches the point that the level needs: a
//! quorum-confirmed read index (shared by all reads that wait, never by one that came after the round began), the
//! leader's lease, a staleness that is a fact and not a clock comparison ([`raft::Group::fresh_within`]), a session's
//! token, or nothing. Then it reads under the lock that applies share, and checks ownership at that moment.
//!
//! A range asks its partitions concurrently within a window, and every answer says which interval it *covered*; the next
//! question starts exactly there, whatever has moved in between.
//!
//! # Placement
//!
//! Group 0 replicates [`placement::State`] with the same [`raft::Group`] that replicates rows. Whoever leads it plans
//! ([`placement::plan()`], a pure function of the state and of who is alive) and pushes every change of the map to every
//! node, and nodes push it to clients. A node keeps the map on disk before it creates what the map gives it. The leader of
//! a group brings its members to the map's target by itself and reports what they have become: a group's own log is the
//! truth about its members. Leaders are soft state: each node tells the others what it leads.
//!
//! # Splits
//!
//! The map asks for a cut ([`placement::Cut`]: where, and the ids of the child); the leader proposes it as an entry of the
//! partition's log ([`kv::Reshape`]), which names the epoch and the term that it was decided in; every replica cuts its own
//! rows and makes the same child. A node keeps the child's seed ([`raft::seed()`]) before the parent may take a snapshot,
//! without which its log, which could make the child again, is not cut. The child's leader reports it once a quorum holds
//! it; only then does the map name it, so that nobody who opens a blank replica of it is ever needed to know its rows. Its
//! hosts do not take it for a partition that is gone before their map is as new as the cut.
//!
//! Who asks for a cut: people, and the driver's leader for partitions that hold too much or are asked too much
//! ([`placement::Sizing`]). Where to cut, only the partition's leader knows: it has the rows, and notes some of the keys
//! that are asked for ([`placement::sizing::halve_work`]).
//!
//! # Merges
//!
//! The map marks two neighbours ([`placement::Merge`]). The leader of the left one has the right one sealed, takes in what it
//! held with one entry of its log, and reports that; the map then forgets the right one, whose hosts destroy it. A merge
//! that does not come about is withdrawn by a fence in the left one's log, after which the right one unseals itself.
//!
//! # Lost quorums
//!
//! A partition whose quorum is lost for good goes on when a person accepts the loss of data ([`placement::recovery`]): the
//! map gives every replica of it up and names a fresh one on the node of the one that is left, which makes it of all that
//! that one holds ([`raft::salvage()`]). Its log begins far above the old one, so that nothing of the old group counts for
//! newer. Invariants 1 and 3 rest on that person then: the lost nodes stay away until they have heard of it.
//!
//! # Sleep
//!
//! A group that nobody asks anything runs no timers and sends no heartbeats, on no replica (`raft::sleep`). The node of its
//! leader names all such groups to each other node in one message a few times per lease; a replica that misses it for a
//! lease wakes and campaigns, and the leader wakes when it is asked something or a member does not agree. Safety does not
//! rest on it: the lease of a leader that sleeps lapses, so it has to hear from a quorum before it answers or writes.
//!
//! # Invariants
//!
//! 1. At any time at most one group may acknowledge a write for a key.
//! 2. The map tiles every keyspace: no gap, no overlap ([`placement::Map::check`]).
//! 3. An acknowledged write survives any minority of lost disks and all crashes of synced nodes.
//! 4. A write is applied once; a session's reply is answered again, not recomputed.
//! 5. Versions of a key only go up.
//! 6. Replicas at the same applied index are equal ([`kv::Store::digest`]).
//! 7. A reply never claims less staleness than it has.
//! 8. A replica id is never used twice.

// Layer 0: words and seams.
pub mod control;
pub mod env;
pub mod error;
pub mod key;
pub mod plant;
pub mod proto;
pub mod telemetry;
// Layer 1: pure logic.
pub mod kv;
pub mod placement;
// Layer 2: the world behind narrow doors.
pub mod log;
pub mod raft;
pub mod transport;
// Layer 3: the library outside and inside.
pub mod client;
pub mod node;
// Layer 4: the surface, and what tries to break it.
pub mod cli;
pub mod drill;
pub mod proof;
pub mod server;
