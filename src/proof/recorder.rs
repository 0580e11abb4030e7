//! Writes down what clients ask and are told, and what makes things fail, as it happens.
//!
//! Invariants:
//! * an event is on its way to the file before [`Recorder::invoke`] returns, hence before the request is sent;
//! * times do not go back: they are taken under the lock that orders the events;
//! * a history is not cut in silence: clients stop before it is full ([`Recorder::is_full`]), what comes after is still
//!   kept, and a file that could not be written is an error at the end.

use super::history::{self, Event, Kind, Phase, Process};
use parking_lot::Mutex;
use serde_json::Value as Json;
use std::{
    collections::BTreeSet,
    io::{self, Write},
    sync::Arc,
};
use tokio::time::Instant;

/// Events after which clients stop. What ends a run (heals, final reads) comes on top.
pub const EVENTS_MAX: usize = 2_000_000;

/// The history of one workload.
pub struct Recorder {
    began: Instant,
    state: Mutex<State>,
}

struct State {
    phase: Phase,
    /// Clients so far: the next one's number.
    processes: u64,
    /// Who has an operation open.
    open: BTreeSet<u64>,
    events: Vec<Event>,
    sink: Option<Box<dyn Write + Send>>,
    failed: Option<io::Error>,
}

impl Recorder {
    /// An empty history of a run that began then; its lines also go to `sink`.
    #[must_use]
    pub fn new(began: Instant, sink: Option<Box<dyn Write + Send>>) -> Arc<Self> {
        let state = State {
            phase: Phase::default(),
            processes: 0,
            open: BTreeSet::new(),
            events: Vec::new(),
            sink,
            failed: None,
        };
        Arc::new(Self { began, state: Mutex::new(state) })
    }

    /// A client that has not been before.
    pub fn process(&self) -> Process {
        let mut state = self.state.lock();
        state.processes += 1;
        Process::Client(state.processes - 1)
    }

    /// An operation begins; call it before the request is sent. Returns the event's index.
    pub fn invoke(&self, mut event: Event) -> u64 {
        event.kind = Kind::Invoke;
        let mut state = self.state.lock();
        if let Process::Client(process) = event.process {
            assert!(state.open.insert(process), "process {process} has an operation open");
        }
        state.add(event, self.began)
    }

    /// An operation is over; call it when the answer has been decoded.
    pub fn complete(&self, event: Event) -> u64 {
        let mut state = self.state.lock();
        if let Process::Client(process) = event.process {
            assert!(state.open.remove(&process), "process {process} has no operation open");
        }
        state.add(event, self.began)
    }

    /// Something was done to the cluster.
    pub fn nemesis(&self, f: &str, value: Json) {
        let event = Event { value, ..Event::new(Process::Nemesis, Kind::Info, f) };
        self.state.lock().add(event, self.began);
    }

    /// What follows belongs to this part of the run.
    pub fn set_phase(&self, phase: Phase) {
        self.state.lock().phase = phase;
    }

    /// Everything so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.state.lock().events.clone()
    }

    /// Looks at everything so far.
    pub fn with_events<T>(&self, look: impl FnOnce(&[Event]) -> T) -> T {
        look(&self.state.lock().events)
    }

    /// Whether clients should stop.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.state.lock().events.len() >= EVENTS_MAX
    }

    /// Says whether every line has been written.
    ///
    /// # Errors
    /// When one could not be: the file is then not the whole history.
    pub fn finish(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        match state.failed.take() {
            Some(error) => Err(error),
            None => state.sink.as_mut().map_or(Ok(()), |sink| sink.flush()),
        }
    }
}

impl State {
    fn add(&mut self, mut event: Event, began: Instant) -> u64 {
        let index = self.events.len() as u64;
        event.index = index;
        event.time = u64::try_from(began.elapsed().as_nanos()).expect("a run is shorter than centuries");
        event.phase = self.phase;
        if let Some(sink) = &mut self.sink {
            let written = history::write(sink, &event).and_then(|()| sink.flush());
            if let Err(error) = written {
                // A line that is missing in the middle would make the file unreadable: it ends here.
                self.sink = None;
                self.failed = Some(error);
            }
        }
        self.events.push(event);
        index
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("events", &self.state.lock().events.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// A file that can be looked at while it is written.
    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A disk that is full after some lines.
    struct Full(usize);

    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(1).ok_or_else(|| io::Error::other("no space left"))?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn lines_are_in_the_file_when_they_are_taken_and_read_back_as_they_were() {
        let file = Shared::default();
        let recorder = Recorder::new(Instant::now(), Some(Box::new(file.clone())));
        let process = recorder.process();
        recorder.set_phase(Phase::Load);
        let event = Event { key: Some("k".into()), value: "0:1".into(), ..Event::new(process, Kind::Ok, "write") };
        assert_eq!(recorder.invoke(event.clone()), 0);
        assert_eq!(file.0.lock().iter().filter(|byte| **byte == b'\n').count(), 1, "before the request is sent");
        tokio::time::sleep(Duration::from_millis(3)).await;
        recorder.set_phase(Phase::Main);
        recorder.complete(event);
        recorder.nemesis("kill", serde_json::json!({"id": 1, "state": "installed"}));
        recorder.finish().unwrap();
        let read = history::read(file.0.lock().as_slice()).unwrap();
        assert_eq!(read, recorder.events());
        let facts: Vec<_> = read.iter().map(|event| (event.kind, event.phase, event.time)).collect();
        assert_eq!(
            facts,
            [(Kind::Invoke, Phase::Load, 0), (Kind::Ok, Phase::Main, 3_000_000), (Kind::Info, Phase::Main, 3_000_000)]
        );
        assert_ne!(recorder.process(), process);
    }

    #[tokio::test]
    async fn a_file_that_was_cut_is_an_error_and_the_events_are_still_there() {
        let recorder = Recorder::new(Instant::now(), Some(Box::new(Full(1))));
        recorder.nemesis("kill", Json::Null);
        recorder.nemesis("kill", Json::Null);
        assert!(recorder.finish().unwrap_err().to_string().contains("no space left"));
        assert_eq!(recorder.events().len(), 2);
    }

    #[tokio::test]
    #[should_panic(expected = "has an operation open")]
    async fn a_process_does_one_thing_at_a_time() {
        let recorder = Recorder::new(Instant::now(), None);
        let event = Event::new(recorder.process(), Kind::Invoke, "read");
        recorder.invoke(event.clone());
        recorder.invoke(event);
    }
}
