//! How long writes wait while leadership is handed over.

use crate::{
    client::Writer,
    world::{Settings, simulate},
};
use std::time::Duration;
use tokio::time::Instant;

crate::scenarios! {
    a_hand_over_delays_no_write_for_long,
}

/// A few ways through the network, and far less than an election that nobody asked for.
const SOON: Duration = Duration::from_millis(100);

fn a_hand_over_delays_no_write_for_long() {
    for seed in 1..=20 {
        simulate(seed, Settings::default(), async |world| {
            world.form(3).await;
            let id = world.partition_of("default");
            let mut writer = Writer::open(&world, "writer").await;
            writer.put("default", "key", "value").await;
            world.at_rest().await;
            let from = world.leader_of(id).expect("led");
            let group = world.node(from).partition(id).expect("led here").group().clone();
            let to = group.status().voters.into_iter().find(|voter| voter.node.0 != from).expect("there are three");
            let mut longest = Duration::ZERO;
            let began = Instant::now();
            world.on(from, async move { group.transfer(to.id).await }).await.expect("it may lead");
            while began.elapsed() < Duration::from_secs(2) {
                let asked = Instant::now();
                writer.put("default", "key", "value").await;
                longest = longest.max(asked.elapsed());
            }
            assert_eq!(world.leader_of(id), Some(to.node.0), "seed {seed}");
            eprintln!("ZZ seed {seed}: {longest:?}");
            assert!(longest < SOON, "seed {seed}: a write took {longest:?}");
        });
    }
}
