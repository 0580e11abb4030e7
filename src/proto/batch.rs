//! Messages of the pipeline in one piece: the bytes of a `PipelineRequest` or a `PipelineReply`, made and taken apart
//! without a generated message for the whole.
//!
//! A generated message is made, moved from task to task, measured and then written. Here each end writes a request or an
//! answer once, where it comes from, and whoever waits for it reads it. Both directions are plain protobuf.

use super::{
    rows::{Head, RowBody},
    v1::{self, reply, request},
};
use bytes::{Buf, BufMut, Bytes};
use prost::{
    DecodeError, Message,
    encoding::{DecodeContext, WireType, check_wire_type, decode_key, decode_varint, message, skip_field},
};
use std::marker::PhantomData;

/// Requests sent together: a `PipelineRequest`.
pub type Requests = Batch<v1::Request>;
/// Answers sent together: a `PipelineReply`.
pub type Replies = Batch<v1::Reply>;

/// The field of either message, and its tag.
const ITEMS: u32 = 1;
const ITEM: u8 = 0x0A;
/// Tags of `Request` and `Reply`.
const ID: u8 = 0x08;
const DEADLINE_MS: u8 = 0x10;
const ROUTE: u32 = 3;
const GET: u8 = 0x52;
const SCAN: u8 = 0x7A;
/// Tag of `ScanReply`.
const PACKED_ROWS: u8 = 0x32;
/// Tags of `GetReply`.
const FOUND: [u8; 2] = [0x08, 1];
const ROW: u8 = 0x12;
const READ: u8 = 0x1A;

/// Rows of a page from so many bytes on are not copied behind what is said of them.
const PIECE_BYTES_MIN: usize = 4 << 10;

/// A message whose only field is a list of `M`, as its bytes, in pieces as they were written.
#[derive(Debug)]
pub struct Batch<M> {
    pieces: Vec<Bytes>,
    of: PhantomData<fn() -> M>,
}

impl<M> Default for Batch<M> {
    fn default() -> Self {
        Self::of_pieces(Vec::new())
    }
}

impl<M> Batch<M> {
    /// What [`Items`], or [`put_request`], has written.
    #[must_use]
    pub const fn of_pieces(pieces: Vec<Bytes>) -> Self {
        Self { pieces, of: PhantomData }
    }

    /// The bytes of each item, one after the other.
    pub fn parts(self) -> impl Iterator<Item = Result<Bytes, DecodeError>> {
        let mut pieces = self.pieces;
        // What comes from a connection is one piece.
        let mut rest = if pieces.len() > 1 { pieces.concat().into() } else { pieces.pop().unwrap_or_default() };
        std::iter::from_fn(move || next_part(&mut rest).transpose())
    }
}

impl<M: Message + Default> Batch<M> {
    /// A batch of these.
    #[must_use]
    pub fn of(items: &[M]) -> Self {
        let mut bytes = Vec::new();
        items.iter().for_each(|item| message::encode(ITEMS, item, &mut bytes));
        Self::of_pieces(vec![bytes.into()])
    }

    /// Every item.
    ///
    /// # Errors
    /// When the bytes are not those of such messages.
    pub fn items(self) -> Result<Vec<M>, DecodeError> {
        self.parts().map(|part| M::decode(part?)).collect()
    }
}

fn next_part(rest: &mut Bytes) -> Result<Option<Bytes>, DecodeError> {
    while rest.has_remaining() {
        let (tag, wire_type) = decode_key(rest)?;
        if tag != ITEMS {
            skip_field(wire_type, tag, rest, DecodeContext::default())?;
            continue;
        }
        check_wire_type(WireType::LengthDelimited, wire_type)?;
        let length = decode_varint(rest)?;
        let length = usize::try_from(length).ok().filter(|length| *length <= rest.len());
        return Ok(Some(rest.split_to(length.ok_or_else(super::rows::cut_short)?)));
    }
    Ok(None)
}

impl<M> Message for Batch<M> {
    fn encode_raw(&self, buf: &mut impl BufMut) {
        self.pieces.iter().for_each(|piece| buf.put_slice(piece));
    }

    /// Of a buffer that shares its bytes, as HTTP/2's does, nothing is copied.
    fn merge(&mut self, mut buf: impl Buf) -> Result<(), DecodeError> {
        self.pieces.push(buf.copy_to_bytes(buf.remaining()));
        Ok(())
    }

    /// As a part of another message, which nothing of ours is.
    fn merge_field(
        &mut self,
        tag: u32,
        wire_type: WireType,
        buf: &mut impl Buf,
        context: DecodeContext,
    ) -> Result<(), DecodeError> {
        skip_field(wire_type, tag, buf, context)
    }

    fn encoded_len(&self) -> usize {
        self.pieces.iter().map(Bytes::len).sum()
    }

    fn clear(&mut self) {
        self.pieces.clear();
    }
}

/// A request without its id and deadline, which are said when it is sent.
#[must_use]
pub fn request_body(route: Option<&v1::Route>, op: Option<&request::Op>) -> Vec<u8> {
    let route_len = route.map_or(0, |route| message::encoded_len(ROUTE, route));
    let mut body = Vec::with_capacity(route_len + op.map_or(0, request::Op::encoded_len));
    if let Some(route) = route {
        message::encode(ROUTE, route, &mut body);
    }
    if let Some(op) = op {
        op.encode(&mut body);
    }
    body
}

/// Most bytes that a request takes in a batch besides its body.
pub const REQUEST_HEAD_BYTES_MAX: usize = 28;

/// Appends a request to a batch.
pub fn put_request(out: &mut Vec<u8>, id: u64, deadline_ms: u32, body: &[u8]) {
    let (id, deadline) = (Head::of_number(ID, id), Head::of_number(DEADLINE_MS, deadline_ms.into()));
    let item = Head::new(ITEM, (id.len() + deadline.len() + body.len()) as u64);
    for part in [item.bytes(), id.bytes(), deadline.bytes(), body] {
        out.extend_from_slice(part);
    }
}

/// The id that an answer begins with.
///
/// # Errors
/// When the bytes are not those of a `Reply`.
pub fn reply_id(reply: &Bytes) -> Result<u64, DecodeError> {
    let mut rest: &[u8] = reply;
    while !rest.is_empty() {
        match decode_key(&mut rest)? {
            (1, WireType::Varint) => return decode_varint(&mut rest),
            (tag, wire_type) => skip_field(wire_type, tag, &mut rest, DecodeContext::default())?,
        }
    }
    Ok(0)
}

/// Answers that are being written, of requests that were executed together: who served it how fresh is the same for most
/// of them, and is put into bytes once.
#[derive(Debug, Default)]
pub struct Items {
    /// What was written before `bytes`.
    pieces: Vec<Bytes>,
    bytes: Vec<u8>,
    /// The last one, and its bytes with their head.
    read: Option<(v1::ReadInfo, Vec<u8>)>,
}

impl Items {
    /// Appends an answer.
    pub fn push(&mut self, mut reply: v1::Reply) {
        match &mut reply.result {
            Some(reply::Result::Get(get)) => self.push_get(reply.id, get),
            Some(reply::Result::Scan(scan)) if scan.packed_rows.len() >= PIECE_BYTES_MIN => {
                self.push_scan(reply.id, scan);
            }
            _ => message::encode(ITEMS, &reply, &mut self.bytes),
        }
    }

    fn push_get(&mut self, id: u64, get: &v1::GetReply) {
        let read: &[u8] = match &get.read {
            None => &[],
            Some(read) => {
                if self.read.as_ref().is_none_or(|(last, _)| last != read) {
                    let mut bytes = Vec::new();
                    message::encode(u32::from(READ >> 3), read, &mut bytes);
                    self.read = Some((read.clone(), bytes));
                }
                self.read.as_ref().map_or(&[], |(_, bytes)| bytes)
            }
        };
        let found: &[u8] = if get.found { &FOUND } else { &[] };
        let row = get.row.as_ref().map(|row| RowBody::of(&row.key, &row.value, row.version));
        let row_head = row.as_ref().map_or_else(Head::default, |row| Head::new(ROW, row.len() as u64));
        let row_len = row_head.len() + row.as_ref().map_or(0, RowBody::len);
        let get_head = Head::new(GET, (found.len() + row_len + read.len()) as u64);
        let id = Head::of_number(ID, id);
        let item = Head::new(ITEM, (id.len() + get_head.len() + found.len() + row_len + read.len()) as u64);
        self.bytes.reserve(item.len() + id.len() + get_head.len() + found.len() + row_len + read.len());
        for part in [item.bytes(), id.bytes(), get_head.bytes(), found, row_head.bytes()] {
            self.bytes.extend_from_slice(part);
        }
        if let Some(row) = row {
            row.put(&mut self.bytes);
        }
        self.bytes.extend_from_slice(read);
    }

    /// The rows of a page, which are the last of its fields, stay where they were packed, as a piece of their own.
    fn push_scan(&mut self, id: u64, scan: &mut v1::ScanReply) {
        let packed = std::mem::take(&mut scan.packed_rows);
        let packed_head = Head::new(PACKED_ROWS, packed.len() as u64);
        let scan_len = scan.encoded_len() + packed_head.len() + packed.len();
        let (id, scan_head) = (Head::of_number(ID, id), Head::new(SCAN, scan_len as u64));
        let item = Head::new(ITEM, (id.len() + scan_head.len() + scan_len) as u64);
        for part in [item.bytes(), id.bytes(), scan_head.bytes()] {
            self.bytes.extend_from_slice(part);
        }
        scan.encode_raw(&mut self.bytes);
        self.bytes.extend_from_slice(packed_head.bytes());
        self.pieces.extend([std::mem::take(&mut self.bytes).into(), packed]);
    }

    /// All of them, as pieces of a batch.
    #[must_use]
    pub fn finish(mut self) -> Vec<Bytes> {
        if !self.bytes.is_empty() {
            self.pieces.push(self.bytes.into());
        }
        self.pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The messages as prost would have generated them.
    #[derive(Clone, PartialEq, Message)]
    struct PlainRequests {
        #[prost(message, repeated, tag = "1")]
        requests: Vec<v1::Request>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct PlainReplies {
        #[prost(message, repeated, tag = "1")]
        replies: Vec<v1::Reply>,
    }

    fn any_bytes() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..200).prop_map(Bytes::from)
    }

    fn any_read() -> impl Strategy<Value = v1::ReadInfo> {
        (0..3_u64, any::<bool>(), any_bytes()).prop_map(|(partition, degraded, session_token)| v1::ReadInfo {
            partition,
            degraded,
            session_token,
            epoch: Some(v1::Epoch { bounds: partition, members: 1 }),
            ..Default::default()
        })
    }

    fn any_reply() -> impl Strategy<Value = v1::Reply> {
        let row = (any_bytes(), any_bytes(), prop_oneof![Just(0), any::<u64>()])
            .prop_map(|(key, value, version)| v1::Row { key, value, version });
        let get = (any::<bool>(), prop::option::of(row), prop::option::of(any_read()))
            .prop_map(|(found, row, read)| reply::Result::Get(v1::GetReply { found, row, read }));
        let scan = (prop_oneof![Just(0), Just(9), Just(PIECE_BYTES_MIN)], prop::option::of(any_read())).prop_map(
            |(length, read)| {
                let (packed_rows, reads) = (vec![7; length].into(), read.into_iter().collect());
                reply::Result::Scan(v1::ScanReply { packed_rows, reads, ..Default::default() })
            },
        );
        let count = any::<u64>().prop_map(|count| reply::Result::Count(v1::CountReply { count, ..Default::default() }));
        let result = prop::option::of(prop_oneof![4 => get, 1 => scan, 1 => count]);
        (prop_oneof![Just(0), any::<u64>()], result).prop_map(|(id, result)| v1::Reply { id, result })
    }

    fn any_request() -> impl Strategy<Value = v1::Request> {
        let put = (any_bytes(), any_bytes()).prop_map(|(key, value)| {
            request::Op::Put(v1::PutRequest { keyspace: "some".into(), key, value, ..Default::default() })
        });
        let route = (any::<u64>(), any::<bool>()).prop_map(|(partition, some)| v1::Route {
            partition,
            tokens: some.then_some(v1::Tokens { first: 1, last: 9 }),
        });
        (any::<u64>(), any::<u32>(), prop::option::of(route), prop::option::of(put))
            .prop_map(|(id, deadline_ms, route, op)| v1::Request { id, deadline_ms, route, op })
    }

    proptest! {
        #[test]
        fn answers_are_the_bytes_of_the_message(replies in prop::collection::vec(any_reply(), 0..20)) {
            let mut items = Items::default();
            replies.iter().cloned().for_each(|reply| items.push(reply));
            let batch = Replies::of_pieces(items.finish());
            let plain = PlainReplies { replies: replies.clone() }.encode_to_vec();
            prop_assert_eq!(batch.encoded_len(), plain.len());
            prop_assert_eq!(&batch.encode_to_vec(), &plain);
            prop_assert_eq!(&Replies::of(&replies).encode_to_vec(), &plain);
            let read = Replies::decode(Bytes::from(plain)).unwrap();
            for (part, reply) in read.parts().zip(&replies) {
                prop_assert_eq!(reply_id(&part.unwrap()).unwrap(), reply.id);
            }
            prop_assert_eq!(batch.items().unwrap(), replies);
        }

        #[test]
        fn requests_are_the_bytes_of_the_message(requests in prop::collection::vec(any_request(), 0..20)) {
            let mut bytes = Vec::new();
            for request in &requests {
                let (before, body) = (bytes.len(), request_body(request.route.as_ref(), request.op.as_ref()));
                put_request(&mut bytes, request.id, request.deadline_ms, &body);
                prop_assert!(bytes.len() - before <= body.len() + REQUEST_HEAD_BYTES_MAX);
            }
            prop_assert_eq!(&bytes, &PlainRequests { requests: requests.clone() }.encode_to_vec());
            prop_assert_eq!(Requests::decode(Bytes::from(bytes)).unwrap().items().unwrap(), requests);
        }

        #[test]
        fn damaged_bytes_are_an_error_or_what_prost_makes_of_them(
            replies in prop::collection::vec(any_reply(), 1..4),
            at in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            cut in any::<bool>(),
        ) {
            let mut bytes = Replies::of(&replies).encode_to_vec();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] = byte }
            let bytes = Bytes::from(bytes);
            let ours = Replies::decode(bytes.clone()).and_then(Batch::items);
            match (ours, PlainReplies::decode(bytes)) {
                (Ok(ours), Ok(theirs)) => prop_assert_eq!(ours, theirs.replies),
                (ours, theirs) => prop_assert!(ours.is_err() && theirs.is_err()),
            }
        }
    }

    #[test]
    fn fields_of_a_later_version_are_skipped() {
        let mut bytes = vec![0x18, 7];
        bytes.extend(Replies::of(&[v1::Reply { id: 3, result: None }]).encode_to_vec());
        let parts: Vec<Bytes> = Replies::decode(Bytes::from(bytes)).unwrap().parts().map(Result::unwrap).collect();
        assert_eq!(parts.len(), 1);
        let later = [[0x20, 1].as_slice(), &parts[0]].concat();
        assert_eq!(reply_id(&later.into()).unwrap(), 3);
    }
}
