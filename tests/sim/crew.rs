//! Clients of a workload in a directed scenario: they work while it does something, and in the end they must have been
//! told the truth.

use crate::{doors::doors, verdict::judged, world::World};
use meridian::proof::{
    history::{Kind, Process},
    recorder::Recorder,
    workload::{self, Running, Settings, Summary, Workload},
};
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

/// Time for everything to be read in the end.
const READS_WITHIN: Duration = Duration::from_secs(30);

pub(crate) struct Crew {
    world: World,
    settings: Settings,
    recorder: Arc<Recorder>,
    running: Running,
}

impl Crew {
    /// Starts clients in the keyspace `default`, through all nodes there are.
    pub(crate) async fn start(world: &World, workload: Workload, clients: u32, pause: Duration) -> Self {
        let settings = Settings {
            clients,
            pause: pause / 2..=pause * 2,
            deadline: Duration::from_secs(2),
            ..Settings::new(workload, "default", world.draw(u64::MAX))
        };
        let recorder = Recorder::new(Instant::now(), None);
        let doors = doors(world, &world.all(), 1).await;
        let running = workload::start(settings.clone(), doors, Arc::clone(&recorder));
        Self { world: world.clone(), settings, recorder, running }
    }

    /// Writes acknowledged so far.
    pub(crate) fn written(&self) -> usize {
        let is_write = |f: &str| !matches!(f, "read" | "scan");
        self.recorder.with_events(|events| {
            events.iter().filter(|e| e.kind == Kind::Ok && e.process != Process::Nemesis && is_write(&e.f)).count()
        })
    }

    /// Lets the clients stop, reads everything, and judges what they were told.
    pub(crate) async fn finish(self) -> Summary {
        let sum = self.running.stop().await;
        let doors = doors(&self.world, &self.world.running(), 1).await;
        let until = Instant::now() + READS_WITHIN;
        let workload = self.settings.workload;
        workload::final_reads(self.settings, doors, Arc::clone(&self.recorder), until).await.unwrap();
        let failures = judged(workload, &self.recorder.events()).1;
        assert!(failures.is_empty(), "{failures:#?}");
        sum
    }
}
