//! What a session has seen of the map.
//!
//! A token names partitions. To a process whose map is still the one from before a partition was cut, the name of the new
//! one says nothing, and it would ask a replica of the old one that knows as little. So answers of partitions whose
//! bounds have changed carry the version of the map that they were routed by, and a read of a session waits until the map
//! is as new. Answers of all others carry nothing: their tokens are as short as ever.
//!
//! Pure.

use super::token::SessionToken;
use crate::{
    error::Error,
    proto::v1::{self, batch_item_reply, reply, request},
};
use bytes::Bytes;

/// The epoch of bounds of a partition that is as it was created.
const AS_CREATED: u64 = 1;

/// Adds the version of the map to the tokens of an answer of a partition at this epoch of its bounds, where it matters.
pub(super) fn tag(result: &mut reply::Result, bounds: u64, map_version: u64) {
    if bounds <= AS_CREATED {
        return;
    }
    let record = SessionToken::of_map(map_version).encode();
    // Joined as anybody may join tokens.
    let add = |token: &mut Bytes| *token = [token.as_ref(), record.as_ref()].concat().into();
    let read = |read: &mut v1::ReadInfo| add(&mut read.session_token);
    let written = |info: &mut v1::WriteInfo| add(&mut info.session_token);
    match result {
        reply::Result::Get(reply) => reply.read.iter_mut().for_each(read),
        reply::Result::BatchGet(reply) => reply.items.iter_mut().flat_map(|item| &mut item.read).for_each(read),
        reply::Result::Scan(reply) => reply.reads.iter_mut().for_each(read),
        reply::Result::Count(reply) => reply.reads.iter_mut().for_each(read),
        reply::Result::Write(reply) => reply.info.iter_mut().for_each(written),
        reply::Result::Batch(reply) => {
            let replies = reply.items.iter_mut().filter_map(|item| match &mut item.result {
                Some(batch_item_reply::Result::Write(reply)) => reply.info.as_mut(),
                _ => None,
            });
            replies.for_each(written);
        }
        reply::Result::DeleteRange(reply) => reply.infos.iter_mut().for_each(written),
        reply::Result::OpenSession(_) | reply::Result::Error(_) => {}
    }
}

/// The least version of the map that a request may be routed by.
///
/// # Errors
/// When its token is damaged.
pub(super) fn least_map(op: &request::Op) -> Result<u64, Error> {
    let options = match op {
        request::Op::Get(get) => &get.options,
        request::Op::BatchGet(get) => &get.options,
        request::Op::Scan(scan) => &scan.options,
        request::Op::Count(count) => &count.options,
        _ => return Ok(0),
    };
    let session = options.as_ref().filter(|options| options.consistency() == v1::Consistency::Session);
    session.map_or(Ok(0), |options| Ok(SessionToken::decode(options.session_token.clone())?.map_version()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{client::token::Seen, key::PartitionId};

    const ID: PartitionId = PartitionId(7);
    const SEEN: Seen = Seen { index: 3, version: 4 };

    fn answer() -> reply::Result {
        let token = SessionToken::of(ID, SEEN).encode();
        let read = Some(v1::ReadInfo { session_token: token, ..Default::default() });
        reply::Result::Get(v1::GetReply { read, ..Default::default() })
    }

    fn token_of(result: &reply::Result) -> Bytes {
        match result {
            reply::Result::Get(reply) => reply.read.as_ref().unwrap().session_token.clone(),
            _ => unreachable!(),
        }
    }

    #[test]
    fn a_token_of_a_partition_that_was_cut_asks_for_a_map_that_knows_it() {
        let mut result = answer();
        tag(&mut result, AS_CREATED + 1, 41);
        let token = token_of(&result);
        assert_eq!(SessionToken::decode(token.clone()).unwrap().seen(ID), Some(SEEN));
        let consistency = v1::Consistency::Session as i32;
        let options = v1::ReadOptions { consistency, session_token: token, ..Default::default() };
        let get = |options| request::Op::Get(v1::GetRequest { options: Some(options), ..Default::default() });
        assert_eq!(least_map(&get(options.clone())), Ok(41));
        let eventual = v1::ReadOptions { consistency: v1::Consistency::Eventual as i32, ..options.clone() };
        assert_eq!(least_map(&get(eventual)), Ok(0), "it promises nothing about sessions");
        assert!(least_map(&get(v1::ReadOptions { session_token: Bytes::from_static(b"x"), ..options })).is_err());
    }

    #[test]
    fn a_token_of_a_partition_as_created_is_as_it_was() {
        let mut result = answer();
        let before = token_of(&result);
        tag(&mut result, AS_CREATED, 41);
        assert_eq!(token_of(&result), before);
    }
}
