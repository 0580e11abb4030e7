//! The seam to time, randomness and tasks. Everything that runs on behalf of a node runs inside its [`Scope`].
//!
//! Simulation replaces what is behind this file and nothing else: a paused `current_thread` runtime makes
//! `tokio::time` virtual, a [`Scope`] with a seed makes randomness repeatable, and its task list makes a crash real:
//! every task of the node is aborted at whatever await it has reached. [`Scope::pause`] is a SIGSTOP: no task of the
//! node runs, while time goes on.
//!
//! Invariants:
//! * this file holds the only `tokio::spawn`; a task inherits the scope of the task that spawned it;
//! * no task of a paused scope is polled; at the end of the pause those that would have run do, in the order in which
//!   they were first woken;
//! * only [`SystemClock`] reads a real clock, besides `tokio::time`.

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};
use tokio::task::{AbortHandle, JoinHandle, futures::TaskLocalFuture};

/// What a node knows of time.
pub trait Clock: Send + Sync + 'static {
    /// Milliseconds since 1970. May jump; used for stamps, never for safety.
    fn wall_ms(&self) -> u64;
    /// Time since an arbitrary moment on this node, counting time spent suspended. Never goes back.
    fn elapsed(&self) -> Duration;
    /// CPU time that this process has used since it began.
    fn cpu(&self) -> Duration;
}

/// The machine's clocks: `CLOCK_REALTIME`, `CLOCK_BOOTTIME` and `CLOCK_PROCESS_CPUTIME_ID`.
#[derive(Debug, Default, Clone, Copy)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall_ms(&self) -> u64 {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
        duration_of(now).as_millis() as u64
    }

    fn elapsed(&self) -> Duration {
        duration_of(rustix::time::clock_gettime(rustix::time::ClockId::Boottime))
    }

    fn cpu(&self) -> Duration {
        duration_of(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime))
    }
}

fn duration_of(time: rustix::time::Timespec) -> Duration {
    Duration::new(time.tv_sec.max(0) as u64, time.tv_nsec.clamp(0, 999_999_999) as u32)
}

tokio::task_local! {
    static SCOPE: Arc<Scope>;
}

/// The tasks and the randomness of one node.
pub struct Scope {
    rng: Mutex<StdRng>,
    tasks: Mutex<Tasks>,
    paused: AtomicBool,
    parked: Mutex<Parked>,
}

/// Who would have run during a pause, in the order first woken.
#[derive(Default)]
struct Parked {
    next: u64,
    wakers: BTreeMap<u64, Waker>,
}

#[derive(Default)]
struct Tasks {
    handles: Vec<AbortHandle>,
    prune_at: usize,
}

/// Finished tasks are forgotten when the list has grown to at least this many.
const PRUNE_AT_MIN: usize = 256;

impl Scope {
    /// A scope whose randomness follows from `seed`.
    #[must_use]
    pub fn seeded(seed: u64) -> Arc<Self> {
        Arc::new(Self {
            rng: Mutex::new(StdRng::seed_from_u64(seed)),
            tasks: Mutex::default(),
            paused: AtomicBool::new(false),
            parked: Mutex::default(),
        })
    }

    /// A scope with the machine's randomness.
    #[must_use]
    pub fn random() -> Arc<Self> {
        Self::seeded(rand::random())
    }

    /// Runs `future` as part of this scope.
    pub fn run<F: Future>(self: &Arc<Self>, future: F) -> impl Future<Output = F::Output> + use<F> {
        self.member(future)
    }

    fn member<F: Future>(self: &Arc<Self>, future: F) -> Member<F> {
        Member { scope: Arc::clone(self), place: None, future: SCOPE.scope(Arc::clone(self), future) }
    }

    /// Runs `f` as part of this scope: what it spawns belongs here.
    pub fn enter<T>(self: &Arc<Self>, f: impl FnOnce() -> T) -> T {
        SCOPE.sync_scope(Arc::clone(self), f)
    }

    /// Aborts every task: a crash, from the inside. Tasks are dropped when the scheduler reaches them, and may spawn
    /// others while they are: it is over when [`Self::live_tasks`] is zero after another call.
    pub fn abort_all(&self) {
        let handles = self.tasks.lock().handles.clone();
        for handle in handles {
            handle.abort();
        }
    }

    /// Stops every task where it is, and every future of [`Self::run`]: none is polled until [`Self::resume`]. Time goes
    /// on, timers that fire are seen afterwards, and aborting works. What others call on this scope's objects still runs.
    pub fn pause(&self) {
        self.paused.store(true, Ordering::Release);
    }

    /// Ends the pause.
    pub fn resume(&self) {
        let wakers = {
            let mut parked = self.parked.lock();
            self.paused.store(false, Ordering::Release);
            std::mem::take(&mut parked.wakers)
        };
        wakers.into_values().for_each(Waker::wake);
    }

    /// Whether the scope is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Keeps the waker of a future that may not run now. False if it may: the pause has just ended.
    fn park(&self, place: &mut Option<u64>, waker: &Waker) -> bool {
        let mut parked = self.parked.lock();
        if !self.is_paused() {
            return false;
        }
        let place = *place.get_or_insert_with(|| {
            parked.next += 1;
            parked.next
        });
        parked.wakers.insert(place, waker.clone());
        true
    }

    /// Tasks that have not finished.
    #[must_use]
    pub fn live_tasks(&self) -> usize {
        self.tasks.lock().handles.iter().filter(|handle| !handle.is_finished()).count()
    }

    fn add(&self, handle: AbortHandle) {
        let mut tasks = self.tasks.lock();
        tasks.handles.push(handle);
        if tasks.handles.len() >= tasks.prune_at.max(PRUNE_AT_MIN) {
            tasks.handles.retain(|handle| !handle.is_finished());
            tasks.prune_at = tasks.handles.len() * 2;
        }
    }
}

pin_project_lite::pin_project! {
    /// A future that belongs to a scope: it sees it, and rests while it is paused.
    struct Member<F> {
        scope: Arc<Scope>,
        // Where it waits for the end of a pause.
        place: Option<u64>,
        #[pin]
        future: TaskLocalFuture<Arc<Scope>, F>,
    }
}

impl<F: Future> Future for Member<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if this.scope.is_paused() && this.scope.park(this.place, cx.waker()) {
            return Poll::Pending;
        }
        *this.place = None;
        this.future.poll(cx)
    }
}

impl std::fmt::Debug for Scope {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Scope").finish_non_exhaustive()
    }
}

/// The scope of the caller, if there is one.
#[must_use]
pub fn scope() -> Option<Arc<Scope>> {
    SCOPE.try_with(Arc::clone).ok()
}

/// Spawns a task that belongs to the scope of the caller, if there is one.
#[track_caller]
#[expect(clippy::disallowed_methods, reason = "the only place that spawns")]
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match scope() {
        Some(scope) => {
            let handle = tokio::spawn(scope.member(future));
            scope.add(handle.abort_handle());
            handle
        }
        None => tokio::spawn(future),
    }
}

/// A random number from the scope of the caller, or from the machine outside of any.
#[must_use]
pub fn random_u64() -> u64 {
    ScopeRng.next_u64()
}

/// The randomness of the scope of the caller.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScopeRng;

impl rand::TryRng for ScopeRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(SCOPE.try_with(|scope| scope.rng.lock().next_u32()).unwrap_or_else(|_| rand::random()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(SCOPE.try_with(|scope| scope.rng.lock().next_u64()).unwrap_or_else(|_| rand::random()))
    }

    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Infallible> {
        match scope() {
            Some(scope) => scope.rng.lock().fill_bytes(dest),
            None => rand::rng().fill_bytes(dest),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_aborted_scope_takes_its_descendants_with_it() {
        let scope = Scope::seeded(1);
        let (tx, mut rx) = tokio::sync::mpsc::channel::<()>(1);
        scope.enter(|| {
            spawn(async move {
                spawn(async move {
                    let _held = tx;
                    std::future::pending::<()>().await;
                });
                std::future::pending::<()>().await;
            })
        });
        while scope.live_tasks() < 2 {
            tokio::task::yield_now().await;
        }
        scope.abort_all();
        assert_eq!(scope.live_tasks(), 2, "the scheduler has not reached them yet");
        assert_eq!(rx.recv().await, None, "the grandchild was dropped");
    }

    /// Notes, every 10 ms, who it is and when.
    fn ticker(scope: &Arc<Scope>, name: u32, notes: &Arc<Mutex<Vec<(u32, u64)>>>) {
        let (notes, start) = (Arc::clone(notes), tokio::time::Instant::now());
        scope.enter(|| {
            spawn(async move {
                loop {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                    notes.lock().push((name, start.elapsed().as_millis() as u64));
                }
            })
        });
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_scope_rests_while_time_and_others_go_on() {
        let (scope, other) = (Scope::seeded(1), Scope::seeded(2));
        let notes = Arc::new(Mutex::default());
        for name in [2, 1, 3] {
            ticker(&scope, name, &notes);
        }
        tokio::time::sleep(Duration::from_millis(15)).await;
        assert_eq!(std::mem::take(&mut *notes.lock()), [(2, 10), (1, 10), (3, 10)]);
        scope.pause();
        ticker(&other, 9, &notes);
        let call = scope.run(async { 5 });
        let refused = tokio::time::timeout(Duration::from_millis(35), call).await;
        assert!(refused.is_err() && scope.is_paused());
        assert_eq!(notes.lock().iter().map(|(name, _)| *name).collect::<Vec<_>>(), [9, 9, 9]);
        notes.lock().clear();
        scope.resume();
        assert_eq!(scope.run(async { 5 }).await, 5);
        tokio::time::sleep(Duration::from_millis(1)).await;
        // One round, late, in the order in which the timers had fired.
        assert_eq!(*notes.lock(), [(2, 50), (1, 50), (3, 50)]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_scope_can_be_aborted_and_paused_again() {
        let scope = Scope::seeded(1);
        let notes = Arc::new(Mutex::default());
        ticker(&scope, 1, &notes);
        tokio::time::sleep(Duration::from_millis(5)).await;
        for round in 1..=2 {
            scope.pause();
            tokio::time::sleep(Duration::from_millis(30)).await;
            scope.resume();
            tokio::time::sleep(Duration::from_millis(1)).await;
            assert_eq!(notes.lock().len(), round);
        }
        scope.pause();
        scope.abort_all();
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!((scope.live_tasks(), notes.lock().len(), Arc::strong_count(&notes)), (0, 2, 1));
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let numbers = |seed| Scope::seeded(seed).enter(|| [random_u64(), random_u64()]);
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
    }

    #[test]
    fn clocks_move_on() {
        let clock = SystemClock;
        let before = clock.elapsed();
        assert!(clock.elapsed() >= before && clock.wall_ms() > 1_600_000_000_000);
    }
}
