//! The checks themselves: each promise is broken on purpose, and the check must notice.

use crate::{
    client::{Level, Writer},
    register::Register,
    world::{Settings, Way, World, simulate},
};
use meridian::log::memory::{Lose, SyncTime};
use std::time::Duration;
use tokio::time::sleep;

async fn busy(world: &World) -> Register {
    world.form(3).await;
    sleep(Duration::from_secs(3)).await;
    let register = Register::new(world, "default", "register");
    let mut writer = Writer::open(world, "writer").await;
    for _ in 0..5 {
        register.write(&mut writer).await;
    }
    register
}

#[test]
#[should_panic(expected = "stale: at least 8 was due")]
fn a_stale_read_is_noticed() {
    simulate(1, Settings::default(), async |world| {
        let register = busy(&world).await;
        let follower =
            world.all().into_iter().find(|n| Some(*n) != world.leader_of(world.partition_of("default"))).unwrap();
        world.isolate(follower, Way::Both);
        let mut writer = Writer::open(&world, "another").await;
        for _ in 0..3 {
            register.write(&mut writer).await;
        }
        register.read_as(follower, &Level::Linearizable, &Level::Eventual).await.unwrap();
    });
}

#[test]
#[should_panic(expected = "lost or applied twice")]
fn a_write_applied_twice_is_noticed() {
    simulate(2, Settings::default(), async |world| {
        let register = busy(&world).await;
        // The same write in another session is another write.
        let mut another = Writer::open(&world, "another").await;
        let increment = another.increment("default", "register");
        another.settle(increment).await;
        let mut writer = Writer::open(&world, "writer").await;
        register.write(&mut writer).await;
    });
}

#[test]
#[should_panic(expected = "lost or applied twice")]
fn a_disk_that_acknowledges_before_it_has_synced_is_noticed() {
    let slow = Duration::from_millis(500);
    let disks = SyncTime { min: slow, max: slow, slow_share: 0.0, slow_max: slow };
    simulate(3, Settings { disks_lie: true, disks, ..Settings::default() }, async |world| {
        let register = busy(&world).await;
        for n in world.all() {
            world.crash(n, Lose::All).await;
        }
        for n in world.all() {
            world.restart(n);
        }
        sleep(Duration::from_secs(3)).await;
        let mut writer = Writer::open(&world, "writer").await;
        register.write(&mut writer).await;
        assert!(register.read(1, &Level::Linearizable).await.is_ok());
    });
}
