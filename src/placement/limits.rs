//! What the placement driver accepts: named limits, and the checks of names, nodes and cuts against them.

use super::command::{Cuts, Field, Refusal, RegisterNode};
use super::map::{Node, Standing, WEIGHT_MILLI_DEFAULT};
use crate::key::{KeyKind, Layout, NodeId, Span, integer_key, position_of_token, printable};
use bytes::Bytes;
use std::ops::RangeInclusive;

/// Most bytes of a keyspace's name.
pub const NAME_BYTES_MAX: usize = 64;
/// Most bytes of a cluster id or a zone.
pub const LABEL_BYTES_MAX: usize = 64;
/// Most bytes of an address: a host name of 255, a colon, a port of five digits.
pub const ADDRESS_BYTES_MAX: usize = 261;
/// Members that a keyspace may ask for. Odd numbers survive as much as the next even one.
pub const REPLICAS: RangeInclusive<u32> = 1..=9;
/// Members of keyspaces when neither they nor the cluster say.
pub const REPLICAS_DEFAULT: u32 = 3;
/// Shares of load, in thousandths.
pub const WEIGHT_MILLI: RangeInclusive<u32> = 10..=10_000;
/// Most partitions that a keyspace may be created with.
pub const PARTITIONS_PER_CREATE_MAX: usize = 1_024;
/// Most bytes of a split point.
pub const SPLIT_POINT_BYTES_MAX: usize = 1_024;
/// Most nodes ever registered.
pub const NODES_MAX: usize = 10_000;
/// Most keyspaces at one time.
pub const KEYSPACES_MAX: usize = 1_024;
/// Most partitions at one time.
pub const PARTITIONS_MAX: usize = 200_000;
/// Most bytes of rows and remembered answers of a partition that is merged into its neighbour. They travel as one entry of a
/// log: in one frame between nodes, of which at most 32 MiB may wait, and in one write to the disk, while clients of the
/// partition wait.
pub const MERGE_BYTES_MAX: u64 = 8 << 20;
/// The keyspace that always exists.
pub const DEFAULT_KEYSPACE: &str = "default";

fn field(field: Field, why: String) -> Refusal {
    Refusal::FieldInvalid { field, why }
}

/// Checks a keyspace's name.
///
/// # Errors
/// [`Refusal::NameInvalid`].
pub fn check_name(name: &str) -> Result<(), Refusal> {
    let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte);
    let refuse = |why: &str| Err(Refusal::NameInvalid(format!("keyspace name {}: {why}", printable(name.as_bytes()))));
    if name.starts_with('_') {
        return refuse("names that begin with \"_\" are reserved");
    }
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return refuse(&format!("a name has 1 to {NAME_BYTES_MAX} bytes, this one has {}", name.len()));
    }
    if !name.as_bytes()[0].is_ascii_lowercase() || !name.bytes().all(allowed) {
        return refuse("a name begins with a letter and has only a-z, 0-9, \".\", \"_\" and \"-\"");
    }
    Ok(())
}

/// Checks a cluster id.
///
/// # Errors
/// [`Refusal::FieldInvalid`].
pub fn check_cluster_id(cluster_id: &str) -> Result<(), Refusal> {
    if cluster_id.is_empty() || cluster_id.len() > LABEL_BYTES_MAX {
        return Err(field(Field::ClusterId, format!("a cluster id has 1 to {LABEL_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// The number of replicas meant by `asked`, where 0 means `default`.
///
/// # Errors
/// [`Refusal::FieldInvalid`].
pub fn replicas(asked: u32, default: u32) -> Result<u32, Refusal> {
    let meant = if asked == 0 { default } else { asked };
    if REPLICAS.contains(&meant) {
        return Ok(meant);
    }
    let (least, most) = REPLICAS.into_inner();
    Err(field(Field::Replicas, format!("{meant} replicas asked for, {least} to {most} are possible")))
}

/// The node that a process would be, its fields checked and in canonical form.
///
/// # Errors
/// [`Refusal::FieldInvalid`].
pub fn node(id: NodeId, process: &RegisterNode) -> Result<Node, Refusal> {
    let RegisterNode { uuid, address, zone, weight_milli, .. } = process;
    let uuid = uuid::Uuid::try_parse(uuid)
        .map_err(|error| field(Field::Uuid, format!("{} is no UUID: {error}", printable(uuid.as_bytes()))))?;
    check_address(address)?;
    if zone.len() > LABEL_BYTES_MAX || zone.chars().any(|c| c.is_control() || c.is_whitespace()) {
        let why = format!("a zone has at most {LABEL_BYTES_MAX} bytes and no white space");
        return Err(field(Field::Zone, why));
    }
    let weight_milli = if *weight_milli == 0 { WEIGHT_MILLI_DEFAULT } else { *weight_milli };
    if !WEIGHT_MILLI.contains(&weight_milli) {
        let (least, most) = WEIGHT_MILLI.into_inner();
        let why = format!("a weight of {weight_milli}/1000, {least}/1000 to {most}/1000 are possible");
        return Err(field(Field::Weight, why));
    }
    let (uuid, address, zone) = (uuid.to_string(), address.clone(), zone.clone());
    Ok(Node { id, uuid, address, zone, weight_milli, ephemeral: process.ephemeral, standing: Standing::Active })
}

fn check_address(address: &str) -> Result<(), Refusal> {
    let sound = address.len() <= ADDRESS_BYTES_MAX
        && !address.chars().any(|c| c.is_control() || c.is_whitespace())
        && address
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0));
    if sound {
        return Ok(());
    }
    let why = format!("{} is no address that others can reach, such as host:7700", printable(address.as_bytes()));
    Err(field(Field::Address, why))
}

/// The share of load `weight` in thousandths, as [`RegisterNode::weight_milli`] wants it; 0 and absent mean 1.
///
/// # Errors
/// [`Refusal::FieldInvalid`].
pub fn weight_milli(weight: f64) -> Result<u32, Refusal> {
    let (least, most) = WEIGHT_MILLI.into_inner();
    let milli = (weight * f64::from(WEIGHT_MILLI_DEFAULT)).round();
    if weight == 0.0 {
        Ok(WEIGHT_MILLI_DEFAULT)
    } else if milli >= f64::from(least) && milli <= f64::from(most) {
        Ok(milli as u32)
    } else {
        Err(field(Field::Weight, format!("a weight of {weight}, {} to {} are possible", 0.01, 10)))
    }
}

/// The spans of a new keyspace's partitions, in order.
///
/// # Errors
/// [`Refusal::FieldInvalid`] when the keyspace cannot be cut like this.
pub fn spans(kind: KeyKind, layout: Layout, cuts: &Cuts) -> Result<Vec<Span>, Refusal> {
    if let KeyKind::Integer { max: 0 } = kind {
        return Err(field(Field::Max, "integer keys lie in [0, max): max has to be at least 1".to_owned()));
    }
    let points = match cuts {
        Cuts::Even(count) => even_points(kind, layout, (*count).max(1))?,
        Cuts::At(keys) => {
            check_split_points(kind, layout, keys)?;
            keys.clone()
        }
    };
    let starts = std::iter::once(Bytes::new()).chain(points.iter().cloned());
    let ends = points.iter().cloned().map(Some).chain([None]);
    Ok(starts.zip(ends).map(|(start, end)| Span::new(start, end)).collect())
}

fn even_points(kind: KeyKind, layout: Layout, count: u32) -> Result<Vec<Bytes>, Refusal> {
    if count as usize > PARTITIONS_PER_CREATE_MAX {
        let why = format!("{count} partitions asked for, 1 to {PARTITIONS_PER_CREATE_MAX} are possible");
        return Err(field(Field::Partitions, why));
    }
    if count == 1 {
        return Ok(Vec::new());
    }
    // In 128 bits, because the width of all tokens does not fit 64.
    let point = |width: u128, i: u32| (width * u128::from(i) / u128::from(count)) as u64;
    match (layout, kind) {
        (Layout::Hashed, _) => Ok((1..count).map(|i| position_of_token(point(1 << 64, i))).collect()),
        (Layout::Ordered, KeyKind::Integer { max }) if u64::from(count) <= max => {
            Ok((1..count).map(|i| integer_key(point(max.into(), i))).collect())
        }
        (Layout::Ordered, KeyKind::Integer { max }) => {
            Err(field(Field::Partitions, format!("{count} partitions asked for, and there are only {max} keys")))
        }
        (Layout::Ordered, KeyKind::Bytes) => {
            let why = "an ordered keyspace of bytes cannot be cut evenly: name the keys to cut at in split_at";
            Err(field(Field::Partitions, why.to_owned()))
        }
    }
}

fn check_split_points(kind: KeyKind, layout: Layout, keys: &[Bytes]) -> Result<(), Refusal> {
    let refuse = |why: String| Err(field(Field::SplitAt, why));
    if !keys.is_empty() && (kind, layout) != (KeyKind::Bytes, Layout::Ordered) {
        return refuse("only an ordered keyspace of bytes is cut at keys; give a number of partitions".to_owned());
    }
    if keys.len() >= PARTITIONS_PER_CREATE_MAX {
        return refuse(format!("{} keys, at most {} are possible", keys.len(), PARTITIONS_PER_CREATE_MAX - 1));
    }
    if let Some(key) = keys.iter().find(|key| key.is_empty() || key.len() > SPLIT_POINT_BYTES_MAX) {
        return refuse(format!("a key to cut at has 1 to {SPLIT_POINT_BYTES_MAX} bytes, this one has {}", key.len()));
    }
    if let Some(pair) = keys.windows(2).find(|pair| pair[0] >= pair[1]) {
        let (a, b) = (printable(&pair[0]), printable(&pair[1]));
        return refuse(format!("keys have to ascend strictly, and {a} is followed by {b}"));
    }
    Ok(())
}
#[cfg(test)]
#[path = "limits_tests.rs"]
mod tests;
