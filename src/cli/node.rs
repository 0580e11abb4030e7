//! `meridian node`: the nodes, and how one of them drains, leaves and comes back.
//!
//! Invariant: a command that waits can be interrupted at any time; what it has begun goes on, and asking again waits on.

use super::{
    cluster::node_json,
    failure::Failure,
    options::{Format, Options},
    output::Output,
    remote::Remote,
    units,
};
use crate::{
    error::{Error, Reason},
    proto::v1,
};
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// About nodes.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// The nodes, what they are there for, their load, and when they were last heard from
    List,
    /// Before a restart: the node keeps its replicas, hands over what it leads, and gets nothing new
    Drain(Leave),
    /// For good: the node's replicas move to others, then it is removed; for a dead node, they are built anew at once
    Decommission(Leave),
    /// Take a drain or a decommission back
    Resume {
        /// Node, e.g. n3
        #[arg(value_parser = node_id)]
        node: u64,
    },
}

/// How a node drains or leaves.
#[derive(Args, Debug)]
pub struct Leave {
    /// Node, e.g. n3
    #[arg(value_parser = node_id)]
    node: u64,
    /// Only say what it would mean, and what stands in the way
    #[arg(long)]
    dry_run: bool,
    /// Wait until it is done; the default
    #[arg(long, overrides_with = "no_wait")]
    wait: bool,
    /// Only begin it
    #[arg(long)]
    no_wait: bool,
    /// Longest wait
    #[arg(long, default_value = "1h", value_name = "DURATION", value_parser = units::duration_ms)]
    wait_max: u64,
}

fn node_id(text: &str) -> Result<u64, String> {
    let number = text.strip_prefix('n').unwrap_or(text).parse().ok().filter(|id| *id > 0);
    number.ok_or_else(|| format!("{text:?} is not a node such as n3; `meridian node list` shows all"))
}

/// Runs `node …`.
///
/// # Errors
/// Why there is no answer, or what was refused.
pub async fn run(command: &Command, options: &Options, output: &mut Output) -> Result<(), Failure> {
    let remote = Remote::connect(options).await?;
    match command {
        Command::List => list(&remote, output).await,
        Command::Drain(leave) => depart(&remote, leave, v1::NodeStanding::Draining, output).await,
        Command::Decommission(leave) => depart(&remote, leave, v1::NodeStanding::Leaving, output).await,
        Command::Resume { node } => {
            let reply = remote.set_node_standing(*node, v1::NodeStanding::Active, false).await?;
            report(*node, &reply, output)
        }
    }
}

async fn list(remote: &Remote, output: &mut Output) -> Result<(), Failure> {
    let nodes = remote.nodes().await?;
    let nodes = nodes.into_iter().map(|status| (status.node.clone().unwrap_or_default(), status));
    match output.format {
        Format::Json => nodes.into_iter().try_for_each(|(node, status)| {
            let mut object = node_json(&node);
            object["replicas"] = status.replicas.into();
            object["leaders"] = status.leaders.into();
            output.json(&object)
        }),
        Format::Plain => nodes.into_iter().try_for_each(|(node, _)| output.line(&node.address)),
        Format::Table => {
            let line = |(node, status): (v1::Node, v1::NodeStatus)| {
                vec![
                    format!("n{}", node.id),
                    node.address.clone(),
                    if node.alive { "alive" } else { "DOWN" }.to_owned(),
                    standing(node.standing()).to_owned(),
                    node.last_contact_ms.map_or_else(|| "never".to_owned(), |ms| format!("{ms} ms ago")),
                    status.replicas.to_string(),
                    status.leaders.to_string(),
                    if node.zone.is_empty() { "-".to_owned() } else { node.zone.clone() },
                    node.weight.to_string(),
                ]
            };
            let header = ["NODE", "ADDRESS", "STATE", "STANDING", "HEARD", "REPLICAS", "LEADS", "ZONE", "WEIGHT"];
            output.table(&header, nodes.map(line).collect())
        }
    }
}

/// A standing in a word.
#[must_use]
pub fn standing(standing: v1::NodeStanding) -> &'static str {
    match standing {
        v1::NodeStanding::Unspecified => "unknown",
        v1::NodeStanding::Active => "active",
        v1::NodeStanding::Draining => "draining",
        v1::NodeStanding::Leaving => "leaving",
        v1::NodeStanding::Removed => "removed",
        v1::NodeStanding::Gone => "gone",
    }
}

/// Lets a node drain or leave, and sees to it until it is done.
async fn depart(remote: &Remote, leave: &Leave, asked: v1::NodeStanding, output: &mut Output) -> Result<(), Failure> {
    let reply = remote.set_node_standing(leave.node, asked, leave.dry_run).await?;
    if leave.dry_run || leave.no_wait {
        return report(leave.node, &reply, output);
    }
    let reply = wait(remote, leave, asked).await?;
    report(leave.node, &reply, output)
}

/// What a node has to get rid of: leaderships to drain, replicas to leave.
fn left(reply: &v1::SetNodeStandingReply, asked: v1::NodeStanding) -> u64 {
    if asked == v1::NodeStanding::Draining { reply.leaders } else { reply.replicas }
}

async fn wait(remote: &Remote, leave: &Leave, asked: v1::NodeStanding) -> Result<v1::SetNodeStandingReply, Failure> {
    let deadline = Instant::now() + Duration::from_millis(leave.wait_max);
    let mut bar: Option<ProgressBar> = None;
    loop {
        let reply = remote.set_node_standing(leave.node, asked, true).await?;
        let done = match asked {
            v1::NodeStanding::Draining => reply.leaders == 0,
            _ => matches!(reply.standing(), v1::NodeStanding::Removed | v1::NodeStanding::Gone),
        };
        let left = left(&reply, asked);
        let bar = bar.get_or_insert_with(|| progress_bar(left, asked));
        bar.set_position(bar.length().unwrap_or(left).saturating_sub(left));
        let blocker = reply.waiting.first().map(|blocker| format!("{}: {}", partition(blocker), blocker.why));
        bar.set_message(blocker.unwrap_or_default());
        if done {
            bar.finish_and_clear();
            return Ok(reply);
        }
        // Somebody else took it back: there is nothing to wait for.
        if reply.standing() != asked && reply.standing() != v1::NodeStanding::Removed {
            let message =
                format!("n{} is {} again: the command was taken back", leave.node, standing(reply.standing()));
            return Err(Error::new(Reason::NodeNeeded, message).into());
        }
        if Instant::now() >= deadline {
            let waiting: Vec<String> =
                reply.waiting.iter().map(|blocker| format!("{}: {}", partition(blocker), blocker.why)).collect();
            let message = format!(
                "n{} still has {left} to hand over after {} s ({}); it goes on: the same command waits on",
                leave.node,
                leave.wait_max / 1_000,
                waiting.join("; ")
            );
            return Err(Error::new(Reason::DeadlineExceeded, message).into());
        }
        sleep(LOOK_EVERY).await;
    }
}

fn progress_bar(total: u64, asked: v1::NodeStanding) -> ProgressBar {
    let what = if asked == v1::NodeStanding::Draining { "leaderships handed over" } else { "replicas moved" };
    let template = format!("{{bar:40}} {{pos}}/{{len}} {what}, {{eta}} left  {{msg}}");
    ProgressBar::new(total).with_style(ProgressStyle::with_template(&template).expect("the template is well-formed"))
}

fn partition(blocker: &v1::NodeBlocker) -> String {
    if blocker.partition == 0 { "the placement driver".to_owned() } else { format!("p{}", blocker.partition) }
}

fn report(node: u64, reply: &v1::SetNodeStandingReply, output: &mut Output) -> Result<(), Failure> {
    let blockers = |blockers: &[v1::NodeBlocker]| -> Vec<Value> {
        blockers.iter().map(|blocker| json!({ "partition": blocker.partition, "why": blocker.why })).collect()
    };
    let stands = standing(reply.standing());
    match output.format {
        Format::Json => output.json(&json!({
            "node": node,
            "standing": stands,
            "changed": reply.changed,
            "replicas": reply.replicas,
            "leaders": reply.leaders,
            "refused": blockers(&reply.refused),
            "waiting": blockers(&reply.waiting),
        })),
        Format::Plain => output.line(stands),
        Format::Table => {
            let (replicas, leaders) = (reply.replicas, reply.leaders);
            output.line(&format!("n{node} is {stands}: it has {replicas} replicas and leads {leaders} partitions"))?;
            for blocker in &reply.refused {
                output.line(&format!("refused: {}: {}", partition(blocker), blocker.why))?;
            }
            for blocker in &reply.waiting {
                output.line(&format!("waits for {}: {}", partition(blocker), blocker.why))?;
            }
            if reply.standing() == v1::NodeStanding::Removed {
                output.line("its process can be stopped, and its data directory deleted")?;
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_named_with_or_without_their_letter() {
        assert_eq!((node_id("n3"), node_id("12")), (Ok(3), Ok(12)));
        for bad in ["", "n", "n0", "3n", "node3", "-1"] {
            assert!(node_id(bad).is_err(), "{bad}");
        }
    }
}
