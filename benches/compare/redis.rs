//! Redis: one master with two replicas that syncs its log before it answers. Weaker than the others: replication is
//! asynchronous, so an acknowledged write can be lost with the master, and there is no other master without help.

use crate::{
    process::{Servers, free_addresses},
    system::{Cluster, Level, REPLICAS, System, ready},
};
use anyhow::{Context as _, bail, ensure};
use bytes::{Buf as _, Bytes, BytesMut};
use std::{path::Path, process::Command};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

pub(crate) async fn start(program: &Path, dir: &Path) -> anyhow::Result<Cluster> {
    let addresses = free_addresses(REPLICAS)?;
    let mut servers = Servers::default();
    let port = |address: &String| address.rsplit_once(':').map_or_else(String::new, |(_, port)| port.to_owned());
    for (index, address) in addresses.iter().enumerate() {
        let data = dir.join(format!("n{index}"));
        std::fs::create_dir(&data)?;
        let mut command = Command::new(program);
        command.args(["--port", &port(address), "--bind", "127.0.0.1", "--save", "", "--dir"]).arg(data);
        command.args(["--appendonly", "yes", "--appendfsync", "always"]);
        if index > 0 {
            command.args(["--replicaof", "127.0.0.1", &port(&addresses[0])]);
        }
        servers.start(format!("n{index}"), dir, command)?;
    }
    ready(&mut servers, async || is_whole(&addresses).await).await?;
    Ok(Cluster { system: System::Redis, servers, addresses })
}

/// Fails unless every replica follows the master.
pub(crate) async fn is_whole(addresses: &[String]) -> anyhow::Result<()> {
    for replica in &addresses[1..] {
        let info = Connection::new(replica).await?.call(&[b"INFO", b"replication"]).await?;
        let info = String::from_utf8_lossy(&info.unwrap_or_default()).into_owned();
        ensure!(info.contains("master_link_status:up"), "{replica} does not follow its master yet");
    }
    Ok(())
}

struct Connection {
    stream: TcpStream,
    read: BytesMut,
    write: BytesMut,
}

impl Connection {
    async fn new(address: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, read: BytesMut::new(), write: BytesMut::new() })
    }

    /// Sends a command and waits for its answer: a text, or none.
    async fn call(&mut self, words: &[&[u8]]) -> anyhow::Result<Option<Bytes>> {
        self.write.clear();
        self.write.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            self.write.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            self.write.extend_from_slice(word);
            self.write.extend_from_slice(b"\r\n");
        }
        self.stream.write_all(&self.write).await?;
        loop {
            if let Some(answer) = take_answer(&mut self.read)? {
                return Ok(answer);
            }
            ensure!(self.stream.read_buf(&mut self.read).await? > 0, "Redis closed the connection");
        }
    }
}

/// The answer at the front of what was received; the outer `None` if it is not complete yet.
fn take_answer(read: &mut BytesMut) -> anyhow::Result<Option<Option<Bytes>>> {
    let Some(line) = read.windows(2).position(|two| two == b"\r\n") else { return Ok(None) };
    let text = std::str::from_utf8(&read[..line]).context("an answer that is not text")?;
    let (kind, rest) = text.split_at_checked(1).context("an empty answer")?;
    let answer = match kind {
        "+" | ":" => Some(Bytes::copy_from_slice(rest.as_bytes())),
        "-" => bail!("Redis says: {rest}"),
        "$" if rest == "-1" => None,
        "$" => {
            let length: usize = rest.parse().context("the length of an answer")?;
            if read.len() < line + length + 4 {
                return Ok(None);
            }
            read.advance(line + 2);
            let value = read.split_to(length).freeze();
            read.advance(2);
            return Ok(Some(Some(value)));
        }
        other => bail!("an answer that begins with {other:?}"),
    };
    read.advance(line + 2);
    Ok(Some(answer))
}

/// One client: a connection to the master and one to the node that it reads from when any will do.
pub(crate) struct Caller {
    master: Connection,
    home: Connection,
}

impl Caller {
    pub(crate) async fn connect(addresses: &[String], client: usize) -> anyhow::Result<Self> {
        let home = Connection::new(&addresses[client % addresses.len()]).await?;
        Ok(Self { master: Connection::new(&addresses[0]).await?, home })
    }

    pub(crate) async fn put(&mut self, key: &[u8], value: &[u8]) -> anyhow::Result<()> {
        self.master.call(&[b"SET", key, value]).await.map(drop)
    }

    pub(crate) async fn get(&mut self, key: &[u8], level: Level) -> anyhow::Result<bool> {
        let connection = if level == Level::Eventual { &mut self.home } else { &mut self.master };
        Ok(connection.call(&[b"GET", key]).await?.is_some())
    }

    pub(crate) async fn put_many(&mut self, rows: &[(Bytes, Bytes)]) -> anyhow::Result<()> {
        let mut words: Vec<&[u8]> = vec![b"MSET"];
        words.extend(rows.iter().flat_map(|(key, value)| [key.as_ref(), value.as_ref()]));
        self.master.call(&words).await.map(drop)
    }
}
