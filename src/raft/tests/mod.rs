//! Groups in action, over the network and the log in memory, in paused time.

mod faults;
mod groups;
mod lifecycle;
mod seeds;
mod sleep;
mod suite;
mod world;
