//! The runtime that openraft runs on: tokio, with tasks and randomness that belong to a node, the same type in
//! production and in simulation.
//!
//! Differences from openraft's own tokio runtime:
//! * tasks go through [`env::spawn`], randomness through [`env::ScopeRng`], so that both follow the node's scope;
//! * the watch channel wakes in order ([`super::watch`]);
//! * a sleep shorter than [`SLEEP_MIN`] is one turn of the scheduler: tokio would round it up to a millisecond, and
//!   openraft paces the completions of log writes with sleeps of one microsecond. A sleep until a moment, however near,
//!   takes until then: openraft's ticks compute the next moment from the time at which they wake.

use super::watch::OrderedWatch;
use crate::env::{self, ScopeRng};
use openraft::async_runtime::AsyncRuntime;
use openraft_rt_tokio::{TokioInstant, TokioMpsc, TokioMutex, TokioOneshot, TokioRuntime};
use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

/// Sleeps shorter than this only yield.
pub(super) const SLEEP_MIN: Duration = Duration::from_micros(50);

/// tokio, as seen by openraft.
#[derive(Debug)]
pub(super) struct Rt(TokioRuntime);

/// A sleep of [`Rt`].
#[derive(Debug)]
pub(super) enum Sleep {
    /// One turn of the scheduler; true once it was taken.
    Turn(bool),
    /// A sleep by the clock.
    Clock(Pin<Box<tokio::time::Sleep>>),
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match &mut *self {
            Self::Clock(sleep) => sleep.as_mut().poll(cx),
            Self::Turn(true) => Poll::Ready(()),
            Self::Turn(taken) => {
                *taken = true;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

impl AsyncRuntime for Rt {
    type JoinError = tokio::task::JoinError;
    type JoinHandle<T: Send + 'static> = tokio::task::JoinHandle<T>;
    type Sleep = Sleep;
    type Instant = TokioInstant;
    type TimeoutError = tokio::time::error::Elapsed;
    type Timeout<R, T: Future<Output = R> + Send> = tokio::time::Timeout<T>;
    type ThreadLocalRng = ScopeRng;
    type Mpsc = TokioMpsc;
    type Watch = OrderedWatch;
    type Oneshot = TokioOneshot;
    type Mutex<T: Send + 'static> = TokioMutex<T>;

    fn spawn<T>(future: T) -> Self::JoinHandle<T::Output>
    where
        T: Future + Send + 'static,
        T::Output: Send + 'static,
    {
        env::spawn(future)
    }

    fn sleep(duration: Duration) -> Sleep {
        if duration < SLEEP_MIN { Sleep::Turn(false) } else { Sleep::Clock(Box::pin(TokioRuntime::sleep(duration))) }
    }

    fn sleep_until(deadline: TokioInstant) -> Sleep {
        Sleep::Clock(Box::pin(TokioRuntime::sleep_until(deadline)))
    }

    fn timeout<R, F: Future<Output = R> + Send>(duration: Duration, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout(duration, future)
    }

    fn timeout_at<R, F: Future<Output = R> + Send>(deadline: TokioInstant, future: F) -> Self::Timeout<R, F> {
        TokioRuntime::timeout_at(deadline, future)
    }

    fn is_panic(join_error: &Self::JoinError) -> bool {
        join_error.is_panic()
    }

    fn thread_rng() -> ScopeRng {
        ScopeRng
    }

    fn new(threads: usize) -> Self {
        Self(TokioRuntime::new(threads))
    }

    fn block_on<F, T>(&mut self, future: F) -> T
    where
        F: Future<Output = T>,
    {
        self.0.block_on(future)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::{async_runtime::Instant as _, rt::testing::Suite};

    #[test]
    fn openraft_accepts_the_runtime() {
        Suite::<Rt>::test_all();
    }

    #[tokio::test(start_paused = true)]
    async fn a_tiny_sleep_takes_no_time_and_a_long_one_does() {
        let before = TokioInstant::now();
        Rt::sleep(Duration::from_micros(1)).await;
        assert_eq!(before.elapsed(), Duration::ZERO);
        Rt::sleep(Duration::from_millis(5)).await;
        assert!(before.elapsed() >= Duration::from_millis(5));
        let soon = TokioInstant::now() + SLEEP_MIN / 2;
        Rt::sleep_until(soon).await;
        assert!(TokioInstant::now() >= soon, "whoever wakes too early sleeps until the same moment again, for ever");
    }
}
