//! How soon clients find what a partition was cut into.

use crate::{
    client::Writer,
    world::{Settings, simulate},
};
use meridian::node::CutAt;
use std::time::Duration;
use tokio::time::Instant;

crate::scenarios! {
    a_child_is_on_the_map_as_soon_as_a_quorum_has_answered_it,
}

/// Far less than the time after which a node looks by itself whether something is left to do.
const SOON: Duration = Duration::from_millis(250);

fn a_child_is_on_the_map_as_soon_as_a_quorum_has_answered_it() {
    for seed in 1..=10 {
        simulate(seed, Settings::default(), async |world| {
            world.form(3).await;
            let id = world.partition_of("default");
            let mut writer = Writer::open(&world, "writer").await;
            for key in ["a", "z"] {
                writer.put("default", key, "value").await;
            }
            world.at_rest().await;
            let node = world.node(world.leader_of(id).expect("led"));
            let begun = Instant::now();
            node.divide(id, CutAt::Position("m".into()), begun + Duration::from_secs(5)).await.expect("cut");
            let took = begun.elapsed();
            assert!(took < SOON, "seed {seed}: {took:?} until the map named the child");
            world.at_rest().await;
        });
    }
}
