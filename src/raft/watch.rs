//! A watch channel that wakes its waiters in the order in which they began to wait.
//!
//! `tokio::sync::watch` spreads waiters over slots chosen by a thread's random numbers, the only source of disorder
//! that a simulation could not close from outside. Values, versions and closing work as in tokio.
//!
//! Invariants:
//! * waiters are woken in the order of registration, after every lock is released;
//! * a receiver sees a change once, and always the latest value;
//! * when the last sender is gone, waiting ends with an error, after the last value was seen.

use openraft::async_runtime::watch as rt;
use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use std::{
    future::poll_fn,
    ops::Deref,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Poll, Waker},
};

/// The constructor that openraft knows the channel by.
#[derive(Debug)]
pub struct OrderedWatch;

struct Shared<T> {
    value: RwLock<T>,
    /// Changed under the write lock of `value`, so that a reader of both sees a pair.
    version: AtomicU64,
    senders: AtomicUsize,
    receivers: AtomicUsize,
    next_receiver: AtomicU64,
    /// Receivers that wait, in the order in which they began.
    wakers: Mutex<Vec<(u64, Waker)>>,
}

impl<T> Shared<T> {
    fn wake_all(&self) {
        let wakers = std::mem::take(&mut *self.wakers.lock());
        for (_, waker) in wakers {
            waker.wake();
        }
    }

    fn receiver(self: &Arc<Self>, seen: u64) -> Receiver<T> {
        self.receivers.fetch_add(1, Ordering::AcqRel);
        let id = self.next_receiver.fetch_add(1, Ordering::Relaxed);
        Receiver { shared: Arc::clone(self), id, seen }
    }
}

/// The end that changes the value. Clones share it.
pub struct Sender<T>(Arc<Shared<T>>);

/// The end that sees changes. A clone has seen what its original has seen.
pub struct Receiver<T> {
    shared: Arc<Shared<T>>,
    id: u64,
    seen: u64,
}

/// A look at the value. Holds up the sender: look quickly, and never across an await.
pub struct Ref<'a, T>(RwLockReadGuard<'a, T>);

impl<T> Deref for Ref<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Every sender is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("nothing will change any more")]
pub struct Closed;

/// A channel that holds `init`, which counts as seen.
pub fn channel<T>(init: T) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        value: RwLock::new(init),
        version: AtomicU64::new(0),
        senders: AtomicUsize::new(1),
        receivers: AtomicUsize::new(0),
        next_receiver: AtomicU64::new(0),
        wakers: Mutex::default(),
    });
    let receiver = shared.receiver(0);
    (Sender(shared), receiver)
}

impl<T> Sender<T> {
    /// Sets the value, whether or not somebody looks.
    pub fn set(&self, value: T) {
        self.modify(|current| {
            *current = value;
            true
        });
    }

    /// Changes the value; waiters are woken if `modify` returns true. Returns what it returned.
    pub fn modify(&self, modify: impl FnOnce(&mut T) -> bool) -> bool {
        let modified = {
            let mut value = self.0.value.write();
            let modified = modify(&mut value);
            if modified {
                self.0.version.fetch_add(1, Ordering::Release);
            }
            modified
        };
        if modified {
            self.0.wake_all();
        }
        modified
    }

    /// Looks at the value.
    #[must_use]
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.0.value.read())
    }

    /// A receiver that has seen the value as it is now.
    #[must_use]
    pub fn subscribe(&self) -> Receiver<T> {
        self.0.receiver(self.0.version.load(Ordering::Acquire))
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.senders.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        if self.0.senders.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.wake_all();
        }
    }
}

impl<T> Receiver<T> {
    /// Waits until the value has changed since it was last seen, and marks it seen.
    ///
    /// # Errors
    /// When no sender is left and the last value was seen.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        poll_fn(|cx| {
            // Under the lock that a sender takes after a change: no change falls between the look and the registration.
            let mut wakers = self.shared.wakers.lock();
            let version = self.shared.version.load(Ordering::Acquire);
            if version != self.seen {
                self.seen = version;
                return Poll::Ready(Ok(()));
            }
            if self.shared.senders.load(Ordering::Acquire) == 0 {
                return Poll::Ready(Err(Closed));
            }
            match wakers.iter_mut().find(|(id, _)| *id == self.id) {
                Some((_, waker)) => waker.clone_from(cx.waker()),
                None => wakers.push((self.id, cx.waker().clone())),
            }
            Poll::Pending
        })
        .await
    }

    /// Looks at the value without marking it seen.
    #[must_use]
    pub fn borrow(&self) -> Ref<'_, T> {
        Ref(self.shared.value.read())
    }

    /// Looks at the value and marks it seen.
    pub fn borrow_and_update(&mut self) -> Ref<'_, T> {
        let value = self.shared.value.read();
        self.seen = self.shared.version.load(Ordering::Acquire);
        Ref(value)
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        self.shared.receiver(self.seen)
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        self.shared.wakers.lock().retain(|(id, _)| *id != self.id);
        self.shared.receivers.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> std::fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receiver").field("id", &self.id).finish_non_exhaustive()
    }
}

impl rt::Watch for OrderedWatch {
    type Sender<T: Send + Sync> = Sender<T>;
    type Receiver<T: Send + Sync> = Receiver<T>;
    type Ref<'a, T: Send + 'a> = Ref<'a, T>;

    fn channel<T: Send + Sync>(init: T) -> (Sender<T>, Receiver<T>) {
        channel(init)
    }
}

impl<T: Send + Sync> rt::WatchSender<OrderedWatch, T> for Sender<T> {
    fn send(&self, value: T) -> Result<(), rt::SendError<T>> {
        if self.0.receivers.load(Ordering::Acquire) == 0 {
            return Err(rt::SendError(value));
        }
        self.set(value);
        Ok(())
    }

    fn send_if_modified<F>(&self, modify: F) -> bool
    where
        F: FnOnce(&mut T) -> bool,
    {
        self.modify(modify)
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.borrow()
    }

    fn subscribe(&self) -> Receiver<T> {
        Self::subscribe(self)
    }
}

impl<T: Send + Sync> rt::WatchReceiver<OrderedWatch, T> for Receiver<T> {
    async fn changed(&mut self) -> Result<(), rt::RecvError> {
        Self::changed(self).await.map_err(|Closed| rt::RecvError(()))
    }

    fn borrow_watched(&self) -> Ref<'_, T> {
        self.borrow()
    }

    fn borrow_and_update(&mut self) -> Ref<'_, T> {
        Self::borrow_and_update(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env;

    #[tokio::test]
    async fn waiters_wake_in_the_order_in_which_they_began_to_wait() {
        let (tx, rx) = channel(0);
        let order = Arc::new(Mutex::new(Vec::new()));
        let tasks: Vec<_> = (0..20)
            .map(|n| {
                let (mut rx, order) = (rx.clone(), Arc::clone(&order));
                env::spawn(async move {
                    rx.changed().await.unwrap();
                    order.lock().push(n);
                })
            })
            .collect();
        tokio::task::yield_now().await;
        tx.set(1);
        for task in tasks {
            task.await.unwrap();
        }
        assert_eq!(*order.lock(), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn the_last_value_is_seen_before_the_end() {
        let (tx, mut rx) = channel(0);
        tx.set(1);
        tx.set(2);
        drop(tx);
        assert_eq!(rx.changed().await, Ok(()));
        assert_eq!(*rx.borrow(), 2);
        assert_eq!(rx.changed().await, Err(Closed));
    }

    #[tokio::test]
    async fn looking_marks_as_seen_only_when_asked() {
        let (tx, mut rx) = channel(0);
        tx.set(1);
        assert_eq!(*rx.borrow(), 1);
        assert_eq!(rx.changed().await, Ok(()), "a look alone does not count");
        tx.set(2);
        assert_eq!(*rx.borrow_and_update(), 2);
        drop(tx);
        assert_eq!(rx.changed().await, Err(Closed));
    }
}
