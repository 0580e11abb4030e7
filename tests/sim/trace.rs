//! What happened, when: one line per event in virtual time. Two runs of one plan must give the same lines.

use meridian::{
    key::NodeId,
    transport::{Frame, Lost, SendError, Transport},
};
use std::{
    fmt,
    sync::{Arc, Mutex},
};
use tokio::time::Instant;

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0100_0000_01b3;

pub(crate) fn fnv(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME);
    }
    hash
}

/// The lines of one run.
pub(crate) struct Trace {
    began: Instant,
    lines: Option<Mutex<Vec<String>>>,
}

impl Trace {
    /// Keeps lines, or costs nothing.
    pub(crate) fn new(keep: bool) -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), lines: keep.then(Mutex::default) })
    }

    /// Virtual time since the beginning.
    pub(crate) fn now(&self) -> std::time::Duration {
        self.began.elapsed()
    }

    pub(crate) fn note(&self, event: impl fmt::Display) {
        if let Some(lines) = &self.lines {
            let line = format!("{} {event}", self.now().as_nanos());
            lines.lock().unwrap().push(line);
        }
    }

    pub(crate) fn take(&self) -> Vec<String> {
        self.lines.as_ref().map(|lines| std::mem::take(&mut *lines.lock().unwrap())).unwrap_or_default()
    }
}

/// Notes every frame that a node sends.
pub(crate) struct Tap {
    pub(crate) from: NodeId,
    pub(crate) port: Arc<dyn Transport>,
    pub(crate) trace: Arc<Trace>,
}

impl Transport for Tap {
    fn send(&self, to: NodeId, frame: Frame) -> Result<(), SendError> {
        if self.trace.lines.is_some() {
            let (from, body) = (self.from, fnv(FNV_OFFSET, &frame.body));
            let (kind, call, reply, len) = (frame.kind, frame.call, frame.reply, frame.body.len());
            self.trace.note(format_args!("{from}->{to} {kind:?} call {call} reply {reply} {len} {body:016x}"));
        }
        self.port.send(to, frame)
    }

    fn on_lost(&self, lost: Lost) {
        self.port.on_lost(lost);
    }

    fn set_addresses(&self, addresses: &[(NodeId, String)]) {
        self.port.set_addresses(addresses);
    }
}
