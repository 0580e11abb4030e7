//! Messages between the replicas of a group, as bodies of frames.
//!
//! A question begins with the format byte and an [`Address`]; an answer with a [`Status`]. Everything else is up to the
//! frame's kind. Nodes of different formats refuse each other when they connect; the byte is a second look.

use super::{
    codec::{self, Damaged, Reader},
    types::{Entry, LogId, SnapshotMeta, Types, Vote},
};
use crate::key::{PartitionId, ReplicaId};
use bytes::{BufMut as _, Bytes, BytesMut};
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest, VoteRequest, VoteResponse};

/// Which replica asks which.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Address {
    /// The group of both.
    pub group: PartitionId,
    /// Who asks.
    pub from: ReplicaId,
    /// Who is asked. Another replica of the group on the same node does not answer in its place.
    pub to: ReplicaId,
}

/// How a question was received.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum Status {
    /// The answer follows.
    Ok = 0,
    /// No such replica runs here.
    Unknown = 1,
    /// Too much is waiting.
    Busy = 2,
    /// The replica could not; it may have stopped.
    Failed = 3,
    /// A question before this one was lost, and order matters.
    Gap = 4,
    /// This replica cannot confirm that it leads.
    NotLeader = 5,
}

impl Status {
    fn of(byte: u8) -> Option<Self> {
        [Self::Ok, Self::Unknown, Self::Busy, Self::Failed, Self::Gap, Self::NotLeader].get(usize::from(byte)).copied()
    }

    /// The answer that says only this.
    #[must_use]
    pub(super) fn body(self) -> Bytes {
        Bytes::copy_from_slice(&[self as u8])
    }
}

const ADDRESS_BYTES: usize = 25;

fn question(address: Address, len: usize) -> BytesMut {
    let mut out = BytesMut::with_capacity(ADDRESS_BYTES + len);
    out.put_u8(codec::FORMAT);
    out.put_u64(address.group.0);
    out.put_u64(address.from.0);
    out.put_u64(address.to.0);
    out
}

/// Reads the address off a question; the rest of it is left in the reader.
///
/// # Errors
/// When it is damaged.
pub(super) fn address(body: Bytes) -> Result<(Address, Reader), Damaged> {
    let mut reader = Reader::versioned("message of a replica", body)?;
    let (group, from, to) = (PartitionId(reader.u64()?), ReplicaId(reader.u64()?), ReplicaId(reader.u64()?));
    Ok((Address { group, from, to }, reader))
}

/// Reads the status off an answer.
///
/// # Errors
/// When it is damaged.
pub(super) fn status(body: Bytes) -> Result<(Status, Reader), Damaged> {
    let mut reader = Reader::new("answer of a replica", body);
    let status = Status::of(reader.u8()?).ok_or_else(|| reader.damaged("of an unknown status"))?;
    Ok((status, reader))
}

fn answer(put: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut out = BytesMut::new();
    out.put_u8(Status::Ok as u8);
    put(&mut out);
    out.freeze()
}

/// Place of an append request in a session: requests of one session are taken in order and without gaps.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Turn {
    /// Session, unique per sender; 0 for a request that stands alone.
    pub session: u64,
    /// Number of the request in its session, from 0.
    pub number: u64,
}

/// Encodes an append request.
#[must_use]
pub(super) fn append(address: Address, turn: Turn, request: &AppendEntriesRequest<Types>) -> Bytes {
    let len: usize = request.entries.iter().map(codec::entry_len).sum();
    let mut out = question(address, 128 + len);
    out.put_u64(turn.session);
    out.put_u64(turn.number);
    codec::put_vote(&mut out, &request.vote);
    codec::put_log_id_opt(&mut out, request.prev_log_id.as_ref());
    codec::put_log_id_opt(&mut out, request.leader_commit.as_ref());
    out.put_u32(u32::try_from(request.entries.len()).expect("entries of a request are few"));
    for entry in &request.entries {
        codec::put_entry(&mut out, entry);
    }
    out.freeze()
}

/// Decodes the place of an append request. The request follows.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_turn(reader: &mut Reader) -> Result<Turn, Damaged> {
    Ok(Turn { session: reader.u64()?, number: reader.u64()? })
}

/// Decodes an append request.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_append(mut reader: Reader) -> Result<AppendEntriesRequest<Types>, Damaged> {
    let vote = reader.vote()?;
    let prev_log_id = reader.log_id_opt()?;
    let leader_commit = reader.log_id_opt()?;
    let count = reader.u32()?;
    let entries: Vec<Entry> = (0..count).map(|_| reader.entry()).collect::<Result<_, _>>()?;
    reader.end()?;
    Ok(AppendEntriesRequest { vote, prev_log_id, entries, leader_commit })
}

/// Encodes the answer to an append request.
#[must_use]
pub(super) fn appended(response: &AppendEntriesResponse<Types>) -> Bytes {
    answer(|out| match response {
        AppendEntriesResponse::Success => out.put_u8(0),
        AppendEntriesResponse::PartialSuccess(upto) => {
            out.put_u8(1);
            codec::put_log_id_opt(out, upto.as_ref());
        }
        AppendEntriesResponse::Conflict => out.put_u8(2),
        AppendEntriesResponse::HigherVote(vote) => {
            out.put_u8(3);
            codec::put_vote(out, vote);
        }
    })
}

/// Decodes the answer to an append request.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_appended(mut reader: Reader) -> Result<AppendEntriesResponse<Types>, Damaged> {
    let response = match reader.u8()? {
        0 => AppendEntriesResponse::Success,
        1 => AppendEntriesResponse::PartialSuccess(reader.log_id_opt()?),
        2 => AppendEntriesResponse::Conflict,
        3 => AppendEntriesResponse::HigherVote(reader.vote()?),
        _ => return Err(reader.damaged("of an unknown outcome")),
    };
    reader.end()?;
    Ok(response)
}

/// Encodes a request for a vote, or for a promise of one.
#[must_use]
pub(super) fn vote(address: Address, request: &VoteRequest<Types>) -> Bytes {
    let mut out = question(address, 64);
    codec::put_vote(&mut out, &request.vote);
    codec::put_log_id_opt(&mut out, request.last_log_id.as_ref());
    out.put_u8(u8::from(request.leadership_transfer));
    out.freeze()
}

/// Decodes a request for a vote.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_vote(mut reader: Reader) -> Result<VoteRequest<Types>, Damaged> {
    let mut request = VoteRequest::new(reader.vote()?, reader.log_id_opt()?);
    request.leadership_transfer = reader.bool()?;
    reader.end()?;
    Ok(request)
}

/// Encodes the answer to a request for a vote.
#[must_use]
pub(super) fn voted(response: &VoteResponse<Types>) -> Bytes {
    answer(|out| {
        codec::put_vote(out, &response.vote);
        codec::put_log_id_opt(out, response.last_log_id.as_ref());
        out.put_u8(u8::from(response.vote_granted));
    })
}

/// Decodes the answer to a request for a vote.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_voted(mut reader: Reader) -> Result<VoteResponse<Types>, Damaged> {
    let (vote, last_log_id, granted) = (reader.vote()?, reader.log_id_opt()?, reader.bool()?);
    reader.end()?;
    Ok(VoteResponse::new(vote, last_log_id, granted))
}

/// Encodes the request to take over leadership.
#[must_use]
pub(super) fn transfer(address: Address, request: &TransferLeaderRequest<Types>) -> Bytes {
    let mut out = question(address, 64);
    codec::put_vote(&mut out, request.from_leader());
    out.put_u64(*request.to_node_id());
    codec::put_log_id_opt(&mut out, request.last_log_id());
    out.freeze()
}

/// Decodes the request to take over leadership.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_transfer(mut reader: Reader) -> Result<TransferLeaderRequest<Types>, Damaged> {
    let request = TransferLeaderRequest::new(reader.vote()?, reader.u64()?, reader.log_id_opt()?);
    reader.end()?;
    Ok(request)
}

/// One piece of a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Piece {
    /// The transfer that it belongs to, unique per sender.
    pub transfer: u64,
    /// Where it begins in the content.
    pub offset: u64,
    /// Whether it is the last one.
    pub last: bool,
    /// The sender's vote.
    pub vote: Vote,
    /// What is being sent.
    pub meta: SnapshotMeta,
    /// Content.
    pub content: Bytes,
}

impl Piece {
    /// Where the content goes on behind it.
    pub(super) fn end(&self) -> u64 {
        self.offset + self.content.len() as u64
    }
}

/// Encodes a piece of a snapshot.
#[must_use]
pub(super) fn piece(address: Address, piece: &Piece) -> Bytes {
    let mut out = question(address, 256 + piece.content.len());
    out.put_u64(piece.transfer);
    out.put_u64(piece.offset);
    out.put_u8(u8::from(piece.last));
    codec::put_vote(&mut out, &piece.vote);
    codec::put_chunk(&mut out, &codec::store_meta(&piece.meta));
    out.put_slice(&piece.content);
    out.freeze()
}

/// Decodes a piece of a snapshot.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_piece(mut reader: Reader) -> Result<Piece, Damaged> {
    Ok(Piece {
        transfer: reader.u64()?,
        offset: reader.u64()?,
        last: reader.bool()?,
        vote: reader.vote()?,
        meta: codec::recover_meta(&reader.chunk()?)?,
        content: reader.rest(),
    })
}

/// Encodes the answer to a piece: the receiver's vote once the snapshot is installed, none before.
#[must_use]
pub(super) fn received(vote: Option<&Vote>) -> Bytes {
    answer(|out| {
        out.put_u8(u8::from(vote.is_some()));
        if let Some(vote) = vote {
            codec::put_vote(out, vote);
        }
    })
}

/// Decodes the answer to a piece.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_received(mut reader: Reader) -> Result<Option<Vote>, Damaged> {
    let vote = if reader.bool()? { Some(reader.vote()?) } else { None };
    reader.end()?;
    Ok(vote)
}

/// Encodes the question whether a replica still follows the leader with this vote.
#[must_use]
pub(super) fn confirm(address: Address, vote: &Vote) -> Bytes {
    let mut out = question(address, 32);
    codec::put_vote(&mut out, vote);
    out.freeze()
}

/// Decodes that question.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_confirm(mut reader: Reader) -> Result<Vote, Damaged> {
    let vote = reader.vote()?;
    reader.end()?;
    Ok(vote)
}

/// Encodes the question for a read index; `lease` allows the leader to trust its lease.
#[must_use]
pub(super) fn read_index(address: Address, lease: bool) -> Bytes {
    let mut out = question(address, 1);
    out.put_u8(u8::from(lease));
    out.freeze()
}

/// Decodes the question for a read index.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_read_index(mut reader: Reader) -> Result<bool, Damaged> {
    let lease = reader.bool()?;
    reader.end()?;
    Ok(lease)
}

/// Encodes a read index.
#[must_use]
pub(super) fn confirmed(at: &LogId) -> Bytes {
    answer(|out| codec::put_log_id(out, at))
}

/// Decodes a read index.
///
/// # Errors
/// When it is damaged.
pub(super) fn read_confirmed(mut reader: Reader) -> Result<LogId, Damaged> {
    let at = reader.log_id()?;
    reader.end()?;
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::types::{Cmd, Payload, log_id};

    const ADDRESS: Address = Address { group: PartitionId(5), from: ReplicaId(6), to: ReplicaId(7) };

    fn asked(body: Bytes) -> Reader {
        let (address, reader) = address(body).unwrap();
        assert_eq!(address, ADDRESS);
        reader
    }

    fn answered(body: Bytes) -> Reader {
        let (status, reader) = status(body).unwrap();
        assert_eq!(status, Status::Ok);
        reader
    }

    #[test]
    fn messages_arrive_as_they_were_sent() {
        let request = AppendEntriesRequest {
            vote: Vote::new_committed(3, 6),
            prev_log_id: Some(log_id(2, 6, 9)),
            entries: vec![
                Entry { log_id: log_id(3, 6, 10), payload: Payload::Blank },
                Entry { log_id: log_id(3, 6, 11), payload: Payload::Normal(Cmd(Bytes::from_static(b"x"))) },
            ],
            leader_commit: None,
        };
        let turn = Turn { session: 8, number: 1 };
        let mut reader = asked(append(ADDRESS, turn, &request));
        assert_eq!(read_turn(&mut reader).unwrap(), turn);
        assert_eq!(format!("{:?}", read_append(reader).unwrap()), format!("{request:?}"));
        for response in [
            AppendEntriesResponse::Success,
            AppendEntriesResponse::PartialSuccess(Some(log_id(1, 2, 3))),
            AppendEntriesResponse::Conflict,
            AppendEntriesResponse::HigherVote(Vote::new(4, 1)),
        ] {
            assert_eq!(read_appended(answered(appended(&response))).unwrap(), response);
        }
        let mut request = VoteRequest::new(Vote::new(4, 6), Some(log_id(3, 6, 11)));
        request.leadership_transfer = true;
        assert_eq!(read_vote(asked(vote(ADDRESS, &request))).unwrap(), request);
        let response = VoteResponse::new(Vote::new(4, 6), None, true);
        assert_eq!(read_voted(answered(voted(&response))).unwrap(), response);
        let request = TransferLeaderRequest::new(Vote::new_committed(3, 6), 7, Some(log_id(3, 6, 11)));
        assert_eq!(read_transfer(asked(transfer(ADDRESS, &request))).unwrap(), request);
        let sent = Piece {
            transfer: 1,
            offset: 2,
            last: true,
            vote: Vote::new_committed(3, 6),
            meta: SnapshotMeta { last_log_id: Some(log_id(1, 2, 3)), ..SnapshotMeta::default() },
            content: Bytes::from_static(b"rows"),
        };
        assert_eq!(read_piece(asked(piece(ADDRESS, &sent))).unwrap(), sent);
        for vote in [None, Some(Vote::new(1, 2))] {
            assert_eq!(read_received(answered(received(vote.as_ref()))).unwrap(), vote);
        }
        let vote = Vote::new_committed(3, 6);
        assert_eq!(read_confirm(asked(confirm(ADDRESS, &vote))).unwrap(), vote);
        assert!(read_read_index(asked(read_index(ADDRESS, true))).unwrap());
        assert_eq!(read_confirmed(answered(confirmed(&log_id(1, 2, 3)))).unwrap(), log_id(1, 2, 3));
        assert_eq!(status(Status::Gap.body()).unwrap().0, Status::Gap);
        assert!(status(Bytes::from_static(&[99])).is_err());
    }
}
