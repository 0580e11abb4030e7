//! Options that every command takes: where the cluster is, how fresh reads must be, how to print.
//!
//! Invariant: a consistency that is not understood is a usage error, never a weaker read.

use super::{failure::Failure, units};
use crate::{node::config, proto::v1};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use clap::{ArgMatches, Args, ValueEnum, parser::ValueSource};
use std::time::Duration;

/// Options before or after any command.
#[derive(Args, Clone, Debug)]
pub struct Options {
    /// Nodes to talk to, `host:port` separated by commas; any node answers for all
    #[arg(long, global = true, env = "MERIDIAN_ENDPOINTS", value_delimiter = ',', value_parser = endpoint)]
    #[arg(default_value = "127.0.0.1:7170", value_name = "HOST:PORT,…", help_heading = "Options of every command")]
    pub endpoints: Vec<String>,
    /// Keyspace to work on
    #[arg(long, global = true, env = "MERIDIAN_KEYSPACE", default_value = "default", value_name = "NAME")]
    #[arg(help_heading = "Options of every command")]
    pub keyspace: String,
    /// How fresh reads must be: linearizable, lease, bounded=200ms, session=TOKEN or eventual
    #[arg(long, global = true, env = "MERIDIAN_CONSISTENCY", default_value = "linearizable", value_name = "LEVEL")]
    #[arg(value_parser = Level::parse, help_heading = "Options of every command")]
    pub consistency: Level,
    /// Time each request may take, e.g. 500ms or 5s
    #[arg(long, global = true, env = "MERIDIAN_DEADLINE", default_value = "5s", value_name = "DURATION")]
    #[arg(value_parser = deadline, help_heading = "Options of every command")]
    pub deadline: Duration,
    /// How results are printed
    #[arg(short, long, global = true, env = "MERIDIAN_OUTPUT", value_enum, default_value_t = Format::Table)]
    #[arg(help_heading = "Options of every command")]
    pub output: Format,
    /// Keys and values given as arguments are hexadecimal
    #[arg(long, global = true, help_heading = "Options of every command")]
    pub hex: bool,
    /// What was said on the command line itself.
    #[arg(skip)]
    pub given: Given,
}

/// Options said on the command line, not by a variable and not by default. A drill hurts no cluster because of a variable.
#[derive(Clone, Copy, Default, Debug)]
pub struct Given {
    /// `--endpoints`.
    pub endpoints: bool,
    /// `--consistency`.
    pub consistency: bool,
}

impl Given {
    /// What these arguments say.
    #[must_use]
    pub fn of(matches: &ArgMatches) -> Self {
        let last = matches.subcommand().map_or(matches, |(_, matches)| matches);
        let given = |id| last.value_source(id) == Some(ValueSource::CommandLine);
        Self { endpoints: given("endpoints"), consistency: given("consistency") }
    }
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// One JSON object per line
    Json,
    /// Bare: a value as it is, rows as TSV
    Plain,
}

/// Freshness asked for, as on the command line.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Level {
    /// Every acknowledged write is seen.
    Linearizable,
    /// The same, from the leader's lease.
    Lease,
    /// Nothing acknowledged earlier than this is missed.
    Bounded {
        /// Largest staleness.
        staleness_ms: u64,
    },
    /// At least what the token saw.
    Session {
        /// Token of an earlier answer.
        token: Bytes,
    },
    /// Some past state.
    Eventual,
}

impl Level {
    /// Understands `linearizable`, `lease`, `bounded=DURATION`, `session=TOKEN` and `eventual`.
    ///
    /// # Errors
    /// A message naming the text and what is possible.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            None if text == "linearizable" => Ok(Self::Linearizable),
            None if text == "lease" => Ok(Self::Lease),
            None if text == "eventual" => Ok(Self::Eventual),
            None if text == "bounded" => Err("bounded needs a largest staleness, e.g. bounded=200ms".to_owned()),
            Some(("bounded", bound)) => match units::duration_ms(bound)? {
                0 => Err("the staleness must be at least 1ms; for none at all use linearizable".to_owned()),
                staleness_ms => Ok(Self::Bounded { staleness_ms }),
            },
            Some(("session", token)) => BASE64
                .decode(token)
                .map(|token| Self::Session { token: token.into() })
                .map_err(|_| "the session token is not as a reply printed it".to_owned()),
            _ => Err(format!("{text:?} is not one of linearizable, lease, bounded=200ms, session=TOKEN, eventual")),
        }
    }

    /// As read options of a request.
    #[must_use]
    pub fn read_options(&self) -> v1::ReadOptions {
        let (consistency, max_staleness_ms, session_token) = match self {
            Self::Linearizable => (v1::Consistency::Linearizable, 0, Bytes::new()),
            Self::Lease => (v1::Consistency::Lease, 0, Bytes::new()),
            Self::Bounded { staleness_ms } => (v1::Consistency::Bounded, *staleness_ms, Bytes::new()),
            Self::Session { token } => (v1::Consistency::Session, 0, token.clone()),
            Self::Eventual => (v1::Consistency::Eventual, 0, Bytes::new()),
        };
        v1::ReadOptions { consistency: consistency as i32, max_staleness_ms, session_token, ..Default::default() }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Linearizable => f.write_str("linearizable"),
            Self::Lease => f.write_str("lease"),
            Self::Bounded { staleness_ms } => write!(f, "bounded={staleness_ms}ms"),
            Self::Session { token } => write!(f, "session={}", BASE64.encode(token)),
            Self::Eventual => f.write_str("eventual"),
        }
    }
}

/// Options of commands that read.
#[derive(Args, Clone, Debug, Default)]
pub struct ReadArgs {
    /// If the consistency cannot be had, answer as eventual and say so
    #[arg(long)]
    pub degrade: bool,
}

impl ReadArgs {
    /// Read options of a request.
    ///
    /// # Errors
    /// Usage, when the options contradict each other.
    pub fn read_options(&self, level: &Level) -> Result<v1::ReadOptions, Failure> {
        let mut options = level.read_options();
        if self.degrade {
            if *level == Level::Eventual {
                return Err(Failure::Usage("error: --degrade means nothing with --consistency eventual".to_owned()));
            }
            options.set_on_unavailable(v1::OnUnavailable::Degrade);
        }
        Ok(options)
    }
}

fn endpoint(text: &str) -> Result<String, String> {
    if config::is_host_port(text) { Ok(text.to_owned()) } else { Err(format!("{text:?} is not host:port")) }
}

/// Zero is allowed: such a request is answered `DEADLINE_EXCEEDED` without being sent.
fn deadline(text: &str) -> Result<Duration, String> {
    let ms = units::duration_ms(text)?;
    if ms > u64::from(config::bounds::DEADLINE_MS_MAX) {
        return Err("at most 1h".to_owned());
    }
    Ok(Duration::from_millis(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_and_shown_alike() {
        for text in ["linearizable", "lease", "bounded=200ms", "session=AAE=", "eventual"] {
            assert_eq!(Level::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Level::parse("bounded=2s"), Ok(Level::Bounded { staleness_ms: 2_000 }));
    }

    #[test]
    fn what_is_not_a_level_is_refused() {
        for bad in ["", "strong", "bounded", "bounded=", "bounded=200", "bounded=0ms", "eventual=1", "session=?"] {
            assert!(Level::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn read_options_say_what_was_asked() {
        let bounded = Level::Bounded { staleness_ms: 5 };
        let options = ReadArgs { degrade: true }.read_options(&bounded).unwrap();
        assert_eq!(options.consistency(), v1::Consistency::Bounded);
        assert_eq!(options.max_staleness_ms, 5);
        assert_eq!(options.on_unavailable(), v1::OnUnavailable::Degrade);
        assert!(ReadArgs { degrade: true }.read_options(&Level::Eventual).is_err());
    }
}
