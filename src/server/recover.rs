//! Going on with a partition whose quorum is lost for good: what the `Admin` service says of it before and after.

use crate::{
    error::Error,
    key::{NodeId, PartitionId},
    node::{Node, Survey},
    placement::recovery::silence_ms,
    proto::v1,
};
use tokio::time::Instant;

/// Looks at what is left of a partition, and goes on with it if the loss of data is accepted.
pub(super) async fn partition(
    node: &Node,
    request: v1::RecoverPartitionRequest,
    deadline: Instant,
) -> Result<v1::RecoverPartitionReply, Error> {
    let from = (request.from != 0).then_some(NodeId(request.from));
    let survey = node.survey(PartitionId(request.partition), from).await?;
    if request.accept_data_loss {
        node.recover(&survey, deadline).await?;
    }
    Ok(v1::RecoverPartitionReply {
        recovered: request.accept_data_loss,
        survivor: survey.choice.survivor.node.0,
        replicas: replicas(&survey),
        losses: losses(&survey),
    })
}

fn replicas(survey: &Survey) -> Vec<v1::SurveyedReplica> {
    let surveyed = |replica: crate::key::Replica| {
        let held = survey.accounts.get(&replica.node).and_then(|account| account.held);
        let held = held.filter(|held| held.replica == replica.id);
        v1::SurveyedReplica {
            replica: replica.id.0,
            node: replica.node.0,
            runs: held.is_some(),
            last_term: held.map_or(0, |held| held.last_term),
            last_index: held.map_or(0, |held| held.last_index),
            applied: held.map_or(0, |held| held.applied),
            silence_ms: silence_ms(&survey.accounts, replica.node),
        }
    };
    survey.partition.replicas().map(surveyed).collect()
}

/// What is, or may be, lost, a line each.
fn losses(survey: &Survey) -> Vec<String> {
    let (choice, partition) = (survey.choice, &survey.partition);
    let (node, held) = (choice.survivor.node, choice.held);
    let mut silences: Vec<Option<u64>> =
        partition.members.iter().map(|member| silence_ms(&survey.accounts, member.node)).collect();
    silences.sort_by_key(|silence| silence.unwrap_or(u64::MAX));
    let since = match silences[silences.len() / 2] {
        Some(ms) => format!("a quorum of its members was last heard from {} s ago", ms / 1_000),
        None => "since when it has no quorum is not known".to_owned(),
    };
    let mut losses = vec![
        format!(
            "{since}; it goes on from {node} alone, and every other replica is given up for good, come back or not"
        ),
        format!(
            "writes that were acknowledged by the others and that {node} does not hold are lost, answered or not; how far \
             {node} is behind them is not known"
        ),
    ];
    let unsure = held.last_index.saturating_sub(held.applied);
    if unsure > 0 {
        losses.push(format!("{unsure} entries that {node} holds and does not know to be committed count as written"));
    }
    if held.bounds < partition.epoch.bounds {
        losses.push(format!(
            "{node} may not have heard of the last split or merge: what the partition took in then is lost"
        ));
    }
    let longer = |other: &v1::SurveyedReplica| (other.last_term, other.last_index) > (held.last_term, held.last_index);
    if let Some(other) = replicas(survey).iter().find(|other| longer(other)) {
        losses.push(format!("n{} holds more than {node}: without --from it would be taken", other.node));
    }
    losses
}
