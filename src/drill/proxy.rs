//! One direction of the network between two nodes: a TCP proxy that lets bytes pass, holds them, refuses, delays or
//! drips them.
//!
//! Node i reaches node j by way of the proxy i→j alone. Frames from i to j travel on connections that i makes, so that
//! holding the proxy i→j silences i towards j, while j is still heard by i: a one-way cut.
//!
//! Invariants:
//! * a cut is silent: connections stay open and are accepted, and nothing passes, not even their end; when it heals, what
//!   was held arrives, as from a network that repeats;
//! * bytes of a connection are never lost or reordered while it lives;
//! * what a connection holds back is bounded by [`CHUNKS_MAX`] chunks of [`CHUNK_BYTES`], then its sender waits.

use crate::env;
use bytes::{Bytes, BytesMut};
use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

/// Bytes read at once.
pub const CHUNK_BYTES: usize = 16 << 10;
/// Chunks that may be under way in one direction of a connection.
pub const CHUNKS_MAX: usize = 64;
/// Bytes written at once while dripping.
const DRIP_BYTES: usize = 512;

/// What becomes of what is sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// It passes.
    #[default]
    Open,
    /// It is held, in silence.
    Cut,
    /// Connections are reset, and new ones too.
    Refuse,
    /// It passes later.
    Slow {
        /// By this much.
        delay: Duration,
    },
    /// It passes at this rate.
    Drip {
        /// Bytes per second.
        bytes_per_s: u32,
    },
}

/// A running proxy; ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    mode: watch::Sender<Mode>,
}

impl Proxy {
    /// Listens on a free port of loopback for connections to `target`.
    ///
    /// # Errors
    /// When there is no port.
    pub async fn start(target: String) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let mode = watch::Sender::new(Mode::Open);
        let seen = mode.subscribe();
        env::spawn(async move {
            let mut ended = seen.clone();
            tokio::select! {
                () = accept(listener, target.into(), seen) => {}
                () = closed(&mut ended) => {}
            }
        });
        Ok(Self { address, mode })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes what becomes of what is sent, on all connections.
    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

/// Ends when the proxy does.
async fn closed(mode: &mut watch::Receiver<Mode>) {
    while mode.changed().await.is_ok() {}
}

async fn accept(listener: TcpListener, target: Arc<str>, mode: watch::Receiver<Mode>) {
    loop {
        match listener.accept().await {
            Ok((inbound, _)) => {
                let (target, mode) = (Arc::clone(&target), mode.clone());
                env::spawn(async move {
                    let (mut refused, mut ended) = (mode.clone(), mode.clone());
                    tokio::select! {
                        () = connection(inbound, &target, mode) => {}
                        _ = refused.wait_for(|mode| *mode == Mode::Refuse) => {}
                        () = closed(&mut ended) => {}
                    }
                });
            }
            // Out of descriptors, or a connection that was gone before it was accepted.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn connection(inbound: TcpStream, target: &str, mut mode: watch::Receiver<Mode>) {
    passable(&mut mode).await;
    let Ok(outbound) = TcpStream::connect(target).await else { return };
    // A delay is made here, never by the kernel.
    let (_, _) = (inbound.set_nodelay(true), outbound.set_nodelay(true));
    let (from_client, to_client) = inbound.into_split();
    let (from_server, to_server) = outbound.into_split();
    let mut after = mode.clone();
    tokio::select! {
        () = pass(from_client, to_server, mode.clone()) => {}
        () = pass(from_server, to_client, mode) => {}
    }
    // The end of a connection does not pass a cut either.
    passable(&mut after).await;
}

async fn passable(mode: &mut watch::Receiver<Mode>) {
    // An error means that the proxy has ended, which whoever polls this finds out, too.
    let _ = mode.wait_for(|mode| *mode != Mode::Cut).await;
}

/// Moves bytes in one direction until either end is gone.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mode: watch::Receiver<Mode>) {
    let (line, mut waiting) = mpsc::channel::<(Instant, Bytes)>(CHUNKS_MAX);
    let mut seen = mode.clone();
    let reading = async move {
        let mut chunk = BytesMut::with_capacity(CHUNK_BYTES);
        while matches!(from.read_buf(&mut chunk).await, Ok(1..)) {
            let delay = match *mode.borrow() {
                Mode::Slow { delay } => delay,
                _ => Duration::ZERO,
            };
            if line.send((Instant::now() + delay, chunk.split().freeze())).await.is_err() {
                return;
            }
            chunk.reserve(CHUNK_BYTES);
        }
    };
    let writing = async move {
        while let Some((due, chunk)) = waiting.recv().await {
            sleep_until(due).await;
            if write(&mut to, chunk, &mut seen).await.is_err() {
                return;
            }
        }
        // The end of a connection does not pass a cut either; dropping `to` is what tells it.
        passable(&mut seen).await;
    };
    tokio::pin!(writing);
    // What was read before the end is written, unless the other end is gone.
    tokio::select! {
        () = &mut writing => return,
        () = reading => {}
    }
    writing.await;
}

async fn write(to: &mut OwnedWriteHalf, mut chunk: Bytes, mode: &mut watch::Receiver<Mode>) -> io::Result<()> {
    while !chunk.is_empty() {
        passable(mode).await;
        let now = *mode.borrow();
        match now {
            Mode::Drip { bytes_per_s } => {
                let drip = chunk.split_to(chunk.len().min(DRIP_BYTES));
                to.write_all(&drip).await?;
                sleep(Duration::from_secs(1).mul_f64(drip.len() as f64 / f64::from(bytes_per_s.max(1)))).await;
            }
            _ => to.write_all(&std::mem::take(&mut chunk)).await?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    const MOMENT: Duration = Duration::from_millis(150);

    /// A server that answers every byte with itself plus one.
    async fn echo() -> String {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        env::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                env::spawn(async move {
                    while let Ok(byte) = stream.read_u8().await {
                        let _ = stream.write_u8(byte + 1).await;
                    }
                });
            }
        });
        address
    }

    async fn ask(stream: &mut TcpStream, byte: u8) -> io::Result<u8> {
        stream.write_u8(byte).await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn a_cut_is_silent_and_what_was_held_arrives_when_it_heals() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        proxy.set(Mode::Cut);
        assert!(timeout(MOMENT, ask(&mut stream, 5)).await.is_err(), "neither an answer nor an end");
        let mut new = timeout(MOMENT, TcpStream::connect(proxy.address())).await.unwrap().unwrap();
        assert!(timeout(MOMENT, ask(&mut new, 7)).await.is_err(), "new connections hang as well");
        proxy.set(Mode::Open);
        assert_eq!(stream.read_u8().await.unwrap(), 6);
        assert_eq!(new.read_u8().await.unwrap(), 8);
    }

    #[tokio::test]
    async fn an_end_does_not_pass_a_cut() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let proxy = Proxy::start(listener.local_addr().unwrap().to_string()).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        stream.write_u8(1).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), 1);
        proxy.set(Mode::Cut);
        drop(stream);
        assert!(timeout(MOMENT, server.read_u8()).await.is_err());
        proxy.set(Mode::Open);
        assert!(server.read_u8().await.is_err(), "now it has ended");
    }

    #[tokio::test]
    async fn refused_connections_end_and_new_ones_do_too() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        proxy.set(Mode::Refuse);
        assert!(stream.read_u8().await.is_err());
        let mut new = TcpStream::connect(proxy.address()).await.unwrap();
        assert!(ask(&mut new, 1).await.is_err());
    }

    #[tokio::test]
    async fn slow_is_later_and_dripping_takes_its_time() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        proxy.set(Mode::Slow { delay: MOMENT });
        let before = Instant::now();
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        assert!(before.elapsed() >= MOMENT * 2, "there and back");
        proxy.set(Mode::Drip { bytes_per_s: 10 });
        let before = Instant::now();
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        assert!(before.elapsed() >= Duration::from_millis(100));
    }

    #[tokio::test]
    async fn a_dropped_proxy_ends_its_connections() {
        let proxy = Proxy::start(echo().await).await.unwrap();
        let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
        assert_eq!(ask(&mut stream, 1).await.unwrap(), 2);
        let address = proxy.address();
        drop(proxy);
        assert!(stream.read_u8().await.is_err());
        assert!(TcpStream::connect(address).await.is_err());
    }
}
