//! `meridian partition recover`: going on with a partition whose quorum is lost for good.

use super::{
    explain::{node_id, partition_id},
    failure::Failure,
    options::{Format, Options},
    output::Output,
    remote::Remote,
};
use crate::proto::v1;
use clap::Args;
use serde_json::json;

/// Which partition to go on with, and from what.
#[derive(Args, Debug)]
pub struct Recover {
    /// Id of the partition, such as p7
    #[arg(value_parser = partition_id)]
    partition: u64,
    /// Do it; without this, only say what would be done and what may be lost
    #[arg(long)]
    accept_data_loss: bool,
    /// Node whose replica to go on with; by default the one with the longest log
    #[arg(long, value_name = "NODE", value_parser = node_id)]
    from: Option<u64>,
}

/// Runs `partition recover`.
///
/// # Errors
/// A wrong use without `--accept-data-loss`, for nothing was changed; or why it was not done.
pub async fn run(args: &Recover, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let Recover { partition, accept_data_loss, from } = *args;
    let request = v1::RecoverPartitionRequest { partition, accept_data_loss, from: from.unwrap_or(0) };
    let reply = Remote::connect(options).await?.recover_partition(request).await?;
    match output.format {
        Format::Json => output.json(&json!({
            "partition": partition,
            "recovered": reply.recovered,
            "survivor": reply.survivor,
            "replicas": reply.replicas.iter().map(replica_json).collect::<Vec<_>>(),
            "losses": reply.losses,
        }))?,
        Format::Plain => output.line(&reply.survivor.to_string())?,
        Format::Table => {
            let header = ["REPLICA", "NODE", "STATE", "LAST ENTRY", "OF TERM", "APPLIED"];
            output.table(&header, reply.replicas.iter().map(row).collect())?;
            reply.losses.iter().try_for_each(|loss| output.line(&format!("loss: {loss}")))?;
        }
    }
    if !reply.recovered {
        return Err(Failure::Usage(format!(
            "nothing was changed; to go on with p{partition} from n{} and lose what is lost, add --accept-data-loss",
            reply.survivor
        )));
    }
    match output.format {
        Format::Table => output.line(&format!(
            "p{partition} goes on from n{}; its other replicas are built anew by themselves, and `meridian partition why \
             p{partition}` keeps what was done",
            reply.survivor
        )),
        Format::Json | Format::Plain => Ok(()),
    }
}

fn row(replica: &v1::SurveyedReplica) -> Vec<String> {
    let state = match (replica.runs, replica.silence_ms) {
        (true, _) => "runs".to_owned(),
        (false, Some(0)) => "not running".to_owned(),
        (false, Some(ms)) => format!("silent for {} s", ms / 1_000),
        (false, None) => "never heard".to_owned(),
    };
    let number = |number: u64| if replica.runs { number.to_string() } else { "-".to_owned() };
    vec![
        format!("r{}", replica.replica),
        format!("n{}", replica.node),
        state,
        number(replica.last_index),
        number(replica.last_term),
        number(replica.applied),
    ]
}

fn replica_json(replica: &v1::SurveyedReplica) -> serde_json::Value {
    json!({
        "replica": replica.replica, "node": replica.node, "runs": replica.runs, "last_term": replica.last_term,
        "last_index": replica.last_index, "applied": replica.applied, "silence_ms": replica.silence_ms,
    })
}
