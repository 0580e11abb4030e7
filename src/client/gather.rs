//! Requests that concern more than one partition: batches, scans, counts and ranged deletes.
//!
//! Invariants:
//! * partitions are asked concurrently, within a window;
//! * what an answer covered decides what is asked next, never what the map said.

use super::{
    attempt::{Served, is_unavailable},
    page::{self, Position, Query},
    query,
    router::{Caller, Router, Space, mismatched},
    scan::{Ask, Coverage, Page, Stitch},
};
use crate::{
    error::{Error, Outcome, Reason},
    key::{Layout, PartitionId, Span, printable},
    placement::Map,
    plant::{Bug, planted},
    proto::{
        rows,
        v1::{self, batch_item, batch_item_reply, reply, request},
    },
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream, stream::FuturesUnordered};
use prost::Message as _;
use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    time::Duration,
};
use tokio::time::Instant;

/// Partitions of an ordered scan asked ahead, at most; it begins with one and doubles while partitions turn out small.
const WINDOW_ORDERED_MAX: usize = 16;
/// Partitions of a hashed keyspace asked at once for a scan.
const WINDOW_HASHED: usize = 64;
/// Partitions asked at once for a count or a ranged delete.
const WINDOW_FOLD: usize = 32;
/// Rows asked of each partition of a hashed keyspace beyond its even share.
const SHARE_SLACK: usize = 16;

/// A scan between two pages.
pub(crate) struct Cursor {
    space: Space,
    whole: Span,
    stitch: Stitch,
    request: v1::ScanRequest,
    reverse: bool,
    skips: bool,
    window: usize,
    /// Partitions that share a page's rows: 1 in an ordered keyspace.
    lanes: usize,
    /// Rows of the last whole partition of an ordered scan: what the next one is taken to have.
    part_rows: usize,
}

impl Cursor {
    fn query(&self) -> Query<'_> {
        Query {
            keyspace: self.space.id,
            whole: &self.whole,
            reverse: self.reverse,
            limit: self.request.limit,
            keys_only: self.request.keys_only,
        }
    }

    /// The next part to ask, with the request for it. None while what is fetched, and what the `asked` parts are taken to
    /// have, will do: a row moved and not returned is moved in vain.
    fn next_ask(&mut self, map: &Map, room: usize, asked: usize) -> Option<(Ask, request::Op)> {
        let id = self.space.id;
        let enough = self.stitch.limit().map_or(room, |limit| room.min(usize::try_from(limit).unwrap_or(room)));
        // The first part asked is the next in order: nothing comes before its rows.
        let follows = self.lanes == 1 && asked > 0;
        let ahead = if follows { self.stitch.fetched() + asked * self.part_rows } else { 0 };
        if ahead >= enough {
            return None;
        }
        let ask = self.stitch.next_ask(|edge| query::partition_at(map, id, edge).map(|(_, span)| span))?;
        let wanted = enough - ahead;
        let share = if self.lanes > 1 { wanted / self.lanes * 5 / 4 + SHARE_SLACK } else { wanted };
        let request = v1::ScanRequest {
            range: Some(query::range_of_span(&ask.span)),
            packed: true,
            page_rows: share.clamp(1, query::PAGE_ROWS_MAX as usize) as u32,
            ..self.request.clone()
        };
        Some((ask, request::Op::Scan(v1::ScanRequest { limit: None, ..request })))
    }
}

impl<C: Caller> Router<C> {
    /// One page.
    pub(crate) async fn scan(&self, scan: v1::ScanRequest, deadline: Instant) -> Result<v1::ScanReply, Error> {
        let mut cursor = self.open_scan(scan, deadline).await?;
        self.next_page(&mut cursor, deadline).await
    }

    /// Every page, one after the other, each within `page_deadline`. Rows fetched ahead are kept between pages. After
    /// an error the stream ends; the last page's token goes on from there.
    pub fn scan_pages(
        &self,
        scan: v1::ScanRequest,
        page_deadline: Duration,
    ) -> impl Stream<Item = Result<v1::ScanReply, Error>> + Send + use<C> {
        enum State {
            Begin(Box<v1::ScanRequest>),
            Go(Box<Cursor>),
            End,
        }
        let router = self.clone();
        stream::unfold(State::Begin(Box::new(scan)), move |state| {
            let router = router.clone();
            Box::pin(async move {
                let deadline = Instant::now() + page_deadline;
                let mut cursor = match state {
                    State::End => return None,
                    State::Go(cursor) => cursor,
                    State::Begin(scan) => match router.open_scan(*scan, deadline).await {
                        Ok(cursor) => Box::new(cursor),
                        Err(error) => return Some((Err(error), State::End)),
                    },
                };
                Some(match router.next_page(&mut cursor, deadline).await {
                    Ok(page) if page.next_page_token.is_empty() => (Ok(page), State::End),
                    Ok(page) => (Ok(page), State::Go(cursor)),
                    Err(error) => (Err(error), State::End),
                })
            })
        })
    }

    async fn open_scan(&self, mut scan: v1::ScanRequest, deadline: Instant) -> Result<Cursor, Error> {
        let space = self.space(&scan.keyspace, deadline).await?;
        let whole = query::span_of_query(space.kind, scan.range.as_ref(), &scan.prefix)?;
        query::check_scan(&scan)?;
        let reverse = scan.order() == v1::Order::Descending;
        let token = std::mem::take(&mut scan.page_token);
        scan.prefix = Bytes::new();
        if scan.page_rows == 0 {
            scan.page_rows = query::PAGE_ROWS_DEFAULT;
        }
        let lanes = match space.layout {
            Layout::Ordered => 1,
            Layout::Hashed => self.routing().look().partitions_of(space.id).count().max(1),
        };
        let mut cursor = Cursor {
            space,
            stitch: Stitch::new(space.layout, whole.clone(), reverse, scan.limit),
            whole,
            reverse,
            skips: scan.on_partition_failure() == v1::OnPartitionFailure::Skip,
            window: if space.layout == Layout::Hashed { WINDOW_HASHED } else { 1 },
            lanes,
            part_rows: 0,
            request: scan,
        };
        if !token.is_empty() {
            let position = page::decode(&cursor.query(), &token)?;
            cursor.stitch = Stitch::new(space.layout, position.rest, reverse, position.limit);
        }
        Ok(cursor)
    }

    async fn next_page(&self, cursor: &mut Cursor, deadline: Instant) -> Result<v1::ScanReply, Error> {
        let rows_max = cursor.request.page_rows as usize;
        let (mut page, mut reply) = (Page::default(), v1::ScanReply::default());
        let mut flight = FuturesUnordered::new();
        while !cursor.stitch.take(&mut page, rows_max, query::PAGE_BYTES_MAX) && !cursor.stitch.is_done() {
            let map = self.routing().map();
            while flight.len() < cursor.window {
                let Some((ask, op)) = cursor.next_ask(&map, rows_max - page.rows.len(), flight.len()) else { break };
                flight.push(self.scan_part(cursor.space, ask, op, cursor.skips, deadline));
            }
            let Some((ask, result)) = flight.next().await else {
                return Err(Error::new(Reason::Internal, "a scan has nothing to wait for and is not at its end"));
            };
            match result {
                Ok((covered, part)) => {
                    // A partition that was not asked from end to end says nothing of those that follow.
                    let whole = query::partition_at(&map, cursor.space.id, &ask.edge)
                        .is_some_and(|(_, partition)| ask.span.contains_span(&partition));
                    if cursor.space.layout == Layout::Ordered && whole && covered.span.contains_span(&ask.span) {
                        cursor.window = (cursor.window * 2).min(WINDOW_ORDERED_MAX);
                        cursor.part_rows = part.rows.len();
                    }
                    cursor.stitch.answer(ask.cell, &covered, part.rows)?;
                    reply.reads.extend(part.reads);
                }
                Err(error) if is_unavailable(error.reason) && planted(Bug::ScanSkipsSilently) => {
                    cursor.stitch.skip(ask.cell);
                }
                Err(error) if cursor.skips && is_unavailable(error.reason) => {
                    let skipped = cursor.stitch.skip(ask.cell).unwrap_or_else(|| ask.span.clone());
                    let partition = query::partition_at(&map, cursor.space.id, &ask.edge);
                    reply.missing.push(v1::MissingRange {
                        range: Some(query::range_of_span(&skipped)),
                        partition: partition.map_or(0, |(id, _)| id.0),
                        error: Some((&error).into()),
                    });
                }
                Err(error) => return Err(error),
            }
        }
        drop(flight);
        cursor.stitch.release();
        if let Some(mut rest) = cursor.stitch.rest() {
            if let Some(row) = page.rows.last().filter(|_| !cursor.reverse && planted(Bug::PageRepeatsRow)) {
                rest.start = row.key.clone();
            }
            let position = Position { rest, limit: cursor.stitch.limit() };
            reply.next_page_token = page::encode(&cursor.query(), &position);
        }
        if cursor.request.packed {
            reply.packed_rows = v1::PackedRows { rows: page.rows }.encode_to_vec().into();
        } else {
            reply.rows = page.rows;
        }
        Ok(reply)
    }

    async fn scan_part(
        &self,
        space: Space,
        ask: Ask,
        op: request::Op,
        skips: bool,
        deadline: Instant,
    ) -> (Ask, Result<(Coverage, v1::ScanReply), Error>) {
        let now = Instant::now();
        // With SKIP a part that hangs must leave time for the page.
        let deadline = if skips { now + deadline.saturating_duration_since(now) / 2 } else { deadline };
        let result = self.read_part(space, &ask, op, deadline).await.and_then(|served| match served.result {
            reply::Result::Scan(mut part) => {
                if !part.packed_rows.is_empty() {
                    part.rows = rows::unpack(&part.packed_rows).map_err(|error| damaged(&error))?;
                }
                for cost in part.reads.iter_mut().filter_map(|read| read.scan.as_mut()) {
                    cost.attempts = served.attempts;
                    cost.took_us = now.elapsed().as_micros() as u64;
                }
                Ok((query::coverage_of_pb(part.covered.as_ref())?, part))
            }
            _ => Err(mismatched()),
        });
        (ask, result)
    }

    async fn read_part(
        &self,
        space: Space,
        ask: &Ask,
        mut op: request::Op,
        deadline: Instant,
    ) -> Result<Served, Error> {
        let place = |map: &Map| Ok(query::partition_at(map, space.id, &ask.edge).map(|(id, _)| id));
        let tokens = (space.layout == Layout::Hashed).then(|| query::tokens_to_pb(&ask.tokens)).flatten();
        self.read(&place, &mut op, tokens, deadline).await
    }

    /// Counts the rows of a range.
    pub(crate) async fn count(&self, count: v1::CountRequest, deadline: Instant) -> Result<v1::CountReply, Error> {
        let space = self.space(&count.keyspace, deadline).await?;
        let whole = query::span_of_query(space.kind, count.range.as_ref(), &count.prefix)?;
        query::serve_of(count.options.as_ref())?;
        let mut total = v1::CountReply::default();
        let count = &v1::CountRequest { prefix: Bytes::new(), ..count };
        let each = |ask: Ask| async move {
            let range = Some(query::range_of_span(&ask.span));
            let op = request::Op::Count(v1::CountRequest { range, ..count.clone() });
            let result = self.read_part(space, &ask, op, deadline).await.and_then(|served| match served.result {
                reply::Result::Count(part) => Ok((query::coverage_of_pb(part.covered.as_ref())?, part)),
                _ => Err(mismatched()),
            });
            (ask, result)
        };
        self.fold(space, whole, WINDOW_FOLD, each, |part: v1::CountReply| {
            total.count += part.count;
            total.reads.extend(part.reads);
        })
        .await
        .map_err(|(error, _)| error)?;
        Ok(total)
    }

    /// Deletes a range, partition by partition.
    pub(crate) async fn delete_range(
        &self,
        delete: v1::DeleteRangeRequest,
        deadline: Instant,
    ) -> Result<v1::DeleteRangeReply, Error> {
        let space = self.space(&delete.keyspace, deadline).await?;
        let whole = query::span_of_query(space.kind, delete.range.as_ref(), &Bytes::new())?;
        let foreign = delete.session.as_ref().is_some_and(|session| !session.client_id.is_empty());
        // Under the caller's sequence a partition is asked for everything from its own start to the caller's end, so that
        // a retry through another router, with another map, sends the same to it; and one partition after the other, so
        // that a remembered answer which reaches beyond its partition is seen before the neighbour is asked.
        let (window, end) = if foreign { (1, Some(whole.end.clone())) } else { (WINDOW_FOLD, None) };
        let mut total = v1::DeleteRangeReply::default();
        let (delete, end) = (&delete, &end);
        let each = |ask: Ask| async move {
            let span = end.clone().map_or_else(|| ask.span.clone(), |end| Span::new(ask.span.start.clone(), end));
            let range = Some(query::range_of_span(&span));
            let mut op = request::Op::DeleteRange(v1::DeleteRangeRequest { range, ..delete.clone() });
            let place = |map: &Map| Ok(query::partition_at(map, space.id, &ask.edge).map(|(id, _)| id));
            let narrow = space.layout == Layout::Hashed && !foreign;
            let tokens = narrow.then(|| query::tokens_to_pb(&ask.tokens)).flatten();
            let result = self.write(&place, &mut op, tokens, deadline).await.and_then(|served| match served.result {
                reply::Result::DeleteRange(part) => Ok((query::coverage_of_pb(part.covered.as_ref())?, part)),
                _ => Err(mismatched()),
            });
            (ask, result)
        };
        let folded = self
            .fold(space, whole, window, each, |part: v1::DeleteRangeReply| {
                total.deleted += part.deleted;
                total.infos.extend(part.infos);
            })
            .await;
        match folded {
            Ok(()) => Ok(total),
            Err((error, alone)) if alone && total.infos.is_empty() => Err(error),
            Err((error, _)) => Err(error.outcome(Outcome::Unknown).with("deleted_at_least", total.deleted)),
        }
    }

    /// Asks every partition of `whole`, without order. An error comes with whether nothing else was under way.
    async fn fold<T, F>(
        &self,
        space: Space,
        whole: Span,
        window: usize,
        each: impl Fn(Ask) -> F,
        mut add: impl FnMut(T),
    ) -> Result<(), (Error, bool)>
    where
        F: Future<Output = (Ask, Result<(Coverage, T), Error>)>,
    {
        let mut stitch = Stitch::new(space.layout, whole, false, None);
        let mut flight = FuturesUnordered::new();
        while !stitch.is_done() {
            let map = self.routing().map();
            while flight.len() < window {
                let bounds = |edge: &_| query::partition_at(&map, space.id, edge).map(|(_, span)| span);
                let Some(ask) = stitch.next_ask(bounds) else { break };
                flight.push(each(ask));
            }
            let Some((ask, result)) = flight.next().await else {
                return Err((Error::new(Reason::Internal, "a range has nothing to wait for"), true));
            };
            let (covered, part) = result.map_err(|error| (error, flight.is_empty()))?;
            add(part);
            stitch.answer_folded(ask.cell, &covered).map_err(|error| (error, false))?;
        }
        Ok(())
    }

    /// Reads many rows: the keys of one partition in one request.
    pub(crate) async fn batch_get(
        &self,
        get: v1::BatchGetRequest,
        deadline: Instant,
    ) -> Result<v1::BatchGetReply, Error> {
        let space = self.space(&get.keyspace, deadline).await?;
        query::serve_of(get.options.as_ref())?;
        query::check_items("keys", get.keys.len())?;
        for key in &get.keys {
            query::check_key(space.kind, key)?;
        }
        let positions: Vec<Bytes> = get.keys.iter().map(|key| crate::key::position(space.layout, key)).collect();
        let mut groups: BTreeMap<Option<PartitionId>, Vec<usize>> = BTreeMap::new();
        let map = self.routing().map();
        for (index, position) in positions.iter().enumerate() {
            groups.entry(map.locate(space.id, position).map(|p| p.id)).or_default().push(index);
        }
        let confirms = query::confirms_absent(get.options.as_ref());
        let (get, positions) = (&get, &positions);
        let mut flight: FuturesUnordered<_> = groups
            .into_values()
            .map(|indices| async move {
                let items = self.get_group(space, get, positions, &indices, deadline).await?;
                Ok::<_, Error>((indices, items))
            })
            .collect();
        let mut items = vec![v1::GetReply::default(); get.keys.len()];
        while let Some(group) = flight.next().await {
            let (indices, replies) = group?;
            for (index, reply) in indices.into_iter().zip(replies) {
                items[index] = reply;
            }
        }
        drop(flight);
        if confirms {
            self.confirm_items(space, get, &mut items, deadline).await?;
        }
        Ok(v1::BatchGetReply { items })
    }

    /// Keys that lay in one partition when last looked; one by one if they no longer do.
    async fn get_group(
        &self,
        space: Space,
        get: &v1::BatchGetRequest,
        positions: &[Bytes],
        indices: &[usize],
        deadline: Instant,
    ) -> Result<Vec<v1::GetReply>, Error> {
        let place = |map: &Map| one_partition(map, space, indices.iter().map(|index| &positions[*index]));
        let keys = indices.iter().map(|index| get.keys[*index].clone()).collect();
        let mut op = request::Op::BatchGet(v1::BatchGetRequest { keys, ..get.clone() });
        match self.read(&place, &mut op, None, deadline).await {
            Ok(served) => match served.result {
                reply::Result::BatchGet(reply) if reply.items.len() == indices.len() => Ok(reply.items),
                _ => Err(mismatched()),
            },
            Err(error) if error.reason == Reason::CrossPartition => {
                let singles = indices.iter().map(|index| self.get_one(space, get, *index, deadline));
                futures_util::future::try_join_all(singles).await
            }
            Err(error) => Err(error),
        }
    }

    /// Reads one of many rows by itself.
    async fn get_one(
        &self,
        space: Space,
        get: &v1::BatchGetRequest,
        index: usize,
        deadline: Instant,
    ) -> Result<v1::GetReply, Error> {
        let (keyspace, key, options) = (get.keyspace.clone(), get.keys[index].clone(), get.options.clone());
        self.get_in(space, &mut request::Op::Get(v1::GetRequest { keyspace, key, options }), deadline).await
    }

    async fn confirm_items(
        &self,
        space: Space,
        get: &v1::BatchGetRequest,
        items: &mut [v1::GetReply],
        deadline: Instant,
    ) -> Result<(), Error> {
        let absent = items.iter().enumerate().filter(|(_, item)| !item.found);
        let led = |item: &v1::GetReply| item.read.as_ref().is_some_and(|read| read.role() == v1::Role::Leader);
        let doubtful: Vec<usize> = absent.filter(|(_, item)| !led(item)).map(|(index, _)| index).collect();
        let again = doubtful.iter().map(|index| self.get_one(space, get, *index, deadline));
        for (index, reply) in doubtful.iter().zip(futures_util::future::try_join_all(again).await?) {
            items[*index] = reply;
        }
        Ok(())
    }

    /// Writes many rows, atomically or each on its own.
    pub(crate) async fn batch(&self, batch: v1::BatchRequest, deadline: Instant) -> Result<v1::BatchReply, Error> {
        let space = self.space(&batch.keyspace, deadline).await?;
        query::check_items("items", batch.items.len())?;
        let mut keys = BTreeSet::new();
        for item in &batch.items {
            let key = query::key_of_item(item)?;
            query::check_key(space.kind, key)?;
            if !keys.insert(key.clone()) {
                return Err(Error::field("items", format!("the key {} comes twice in the batch", printable(key))));
            }
        }
        if batch.atomic {
            return self.batch_atomic(space, batch, deadline).await;
        }
        query::check_batch_bytes(&batch.items)?;
        let mut flight: FuturesUnordered<_> = batch
            .items
            .into_iter()
            .enumerate()
            .map(|(index, item)| {
                let keyspace = batch.keyspace.clone();
                async move { (index, self.write_item(space, keyspace, item, deadline).await) }
            })
            .collect();
        let mut items = vec![v1::BatchItemReply::default(); flight.len()];
        while let Some((index, result)) = flight.next().await {
            let result = result.map_or_else(
                |error| {
                    let outcome = error.outcome.unwrap_or(Outcome::NotApplied);
                    batch_item_reply::Result::Error((&error.outcome(outcome)).into())
                },
                batch_item_reply::Result::Write,
            );
            items[index].result = Some(result);
        }
        let applied =
            |item: &v1::BatchItemReply| matches!(&item.result, Some(batch_item_reply::Result::Write(w)) if w.applied);
        Ok(v1::BatchReply { applied: items.iter().all(applied), items })
    }

    async fn batch_atomic(
        &self,
        space: Space,
        batch: v1::BatchRequest,
        deadline: Instant,
    ) -> Result<v1::BatchReply, Error> {
        let positions: Result<Vec<Bytes>, Error> =
            batch.items.iter().map(|item| Ok(crate::key::position(space.layout, query::key_of_item(item)?))).collect();
        let positions = positions?;
        let place = |map: &Map| one_partition(map, space, positions.iter());
        match self.write(&place, &mut request::Op::Write(batch), None, deadline).await?.result {
            reply::Result::Batch(reply) => Ok(reply),
            _ => Err(mismatched()),
        }
    }

    async fn write_item(
        &self,
        space: Space,
        keyspace: String,
        item: v1::BatchItem,
        deadline: Instant,
    ) -> Result<v1::WriteReply, Error> {
        query::key_of_item(&item)?;
        let session = None;
        let mut op = match item.op.expect("checked: it has a key") {
            batch_item::Op::Put(put) => request::Op::Put(v1::PutRequest { keyspace, session, ..put }),
            batch_item::Op::Delete(delete) => request::Op::Delete(v1::DeleteRequest { keyspace, session, ..delete }),
            batch_item::Op::CompareAndSet(cas) => {
                request::Op::CompareAndSet(v1::CompareAndSetRequest { keyspace, session, ..cas })
            }
            batch_item::Op::Increment(increment) => {
                request::Op::Increment(v1::IncrementRequest { keyspace, session, ..increment })
            }
        };
        self.write_one(space, &mut op, deadline).await
    }
}

fn damaged(error: &prost::DecodeError) -> Error {
    Error::new(Reason::Internal, format!("the rows of a page cannot be read: {error}"))
}

/// The partition that holds all positions.
fn one_partition<'a>(
    map: &Map,
    space: Space,
    positions: impl Iterator<Item = &'a Bytes>,
) -> Result<Option<PartitionId>, Error> {
    let mut split: BTreeMap<PartitionId, usize> = BTreeMap::new();
    for position in positions {
        let Some(partition) = map.locate(space.id, position) else { return Ok(None) };
        *split.entry(partition.id).or_default() += 1;
    }
    if split.len() > 1 {
        let split: Vec<String> = split.iter().map(|(partition, keys)| format!("{partition}: {keys}")).collect();
        return Err(Error::new(
            Reason::CrossPartition,
            format!(
                "an atomic batch must lie in one partition; its keys lie in {} ({}); send atomic=false, or choose keys \
                 that sort together",
                split.len(),
                split.join(", ")
            ),
        )
        .with("split", split.join(", ")));
    }
    Ok(split.into_keys().next())
}
