//! The configuration of a node, in layers: flag, else `MERIDIAN_*` variable, else TOML file, else default.
//!
//! Every setting has one name, e.g. `limits.key_bytes_max`; its variable is `MERIDIAN_LIMITS_KEY_BYTES_MAX`, and in the
//! file it stands in the table `[limits]`.
//!
//! Invariants:
//! * an unknown name is an error that names the nearest known one;
//! * all faults of all layers are reported at once, each with the place it comes from.

use super::units;
use crate::node::config::{Fault, LogFormat, NodeConfig, Storage};
use std::{collections::BTreeMap, ffi::OsString, net::SocketAddr, path::PathBuf};

/// Prefix of variables.
pub const VARIABLE_PREFIX: &str = "MERIDIAN_";

/// One setting.
struct Setting {
    name: &'static str,
    set: fn(&mut NodeConfig, &str) -> Result<(), String>,
}

macro_rules! settings {
    ($($name:literal => |$config:ident, $text:ident| $set:expr;)*) => {
        const SETTINGS: &[Setting] = &[$(Setting {
            name: $name,
            set: |$config, $text| { $set; Ok(()) },
        }),*];
    };
}

settings! {
    "data" => |config, text| config.data = PathBuf::from(text);
    "listen" => |config, text| config.listen = address(text)?;
    "advertise" => |config, text| config.advertise = (!text.is_empty()).then(|| text.to_owned());
    "join" => |config, text| config.join = list(text);
    "dial" => |config, text| config.dial = dial(text)?;
    "drill.control" => |config, text| config.drill_control = Some(PathBuf::from(text));
    "http" => |config, text| config.http = address(text)?;
    "zone" => |config, text| config.zone = text.to_owned();
    "weight" => |config, text| config.weight = text.parse().map_err(|_| format!("{text:?} is not a number"))?;
    "storage" => |config, text| config.storage = storage(text)?;
    "deadline_default_ms" => |config, text| config.deadline_default_ms = small(units::milliseconds(text)?)?;
    "down_after_ms" => |config, text| config.down_after_ms = units::milliseconds(text)?;
    "split_bytes" => |config, text| config.split_bytes = units::bytes(text)?;
    "merge_after_ms" => |config, text| config.merge_after_ms = units::milliseconds(text)?;
    "limits.key_bytes_max" => |config, text| config.limits.key_bytes_max = small(units::bytes(text)?)?;
    "limits.value_bytes_max" => |config, text| config.limits.value_bytes_max = small(units::bytes(text)?)?;
    "limits.batch_items_max" => |config, text| config.limits.batch_items_max = count(text)?;
    "limits.batch_bytes_max" => |config, text| config.limits.batch_bytes_max = small(units::bytes(text)?)?;
    "admission.writes_max" => |config, text| config.budgets.writes_max = count(text)? as u64;
    "admission.bytes_max" => |config, text| config.budgets.bytes_max = bytes_or_auto(text)?;
    "memory.bytes_max" => |config, text| config.budgets.memory_bytes_max = bytes_or_auto(text)?;
    "raft.heartbeat_ms" => |config, text| config.raft.heartbeat_ms = units::milliseconds(text)?;
    "raft.election_min_ms" => |config, text| config.raft.election_ms.start = units::milliseconds(text)?;
    "raft.election_max_ms" => |config, text| config.raft.election_ms.end = units::milliseconds(text)?;
    "raft.sleep_after_ms" => |config, text| config.raft.sleep_after_ms = units::milliseconds(text)?;
    "raft.snapshot_bytes" => |config, text| config.raft.snapshot_bytes = units::bytes(text)?;
    "raft.log_keep_bytes" => |config, text| config.raft.log_keep_bytes = units::bytes(text)?;
    "raft.log_bytes_max" => |config, text| config.raft.log_bytes_max = units::bytes(text)?;
    "raft.snapshot_bytes_per_s" => |config, text| config.raft.snapshot_bytes_per_s = units::bytes(text)?;
    "log.format" => |config, text| config.log_format = log_format(text)?;
    "log.level" => |config, text| config.log_level = text.to_owned();
}

/// Variables that begin with the prefix and belong to the other commands, to scripts or to containers.
const OTHER_VARIABLES: &[&str] = &[
    "MERIDIAN_ENDPOINTS",
    "MERIDIAN_KEYSPACE",
    "MERIDIAN_CONSISTENCY",
    "MERIDIAN_DEADLINE",
    "MERIDIAN_OUTPUT",
    "MERIDIAN_CONFIG",
    "MERIDIAN_BIN",
];

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse().map_err(|_| format!("{text:?} is not IP:port, e.g. 0.0.0.0:7170"))
}

fn list(text: &str) -> Vec<String> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(str::to_owned).collect()
}

fn dial(text: &str) -> Result<BTreeMap<String, String>, String> {
    let pair = |item: String| match item.split_once('=') {
        Some((to, via)) => Ok((to.to_owned(), via.to_owned())),
        None => Err(format!("{item:?} is not ADDRESS=VIA")),
    };
    list(text).into_iter().map(pair).collect()
}

fn storage(text: &str) -> Result<Storage, String> {
    match text {
        "disk" => Ok(Storage::Disk),
        "memory" => Ok(Storage::Memory),
        _ => Err(format!("{text:?} is neither disk nor memory")),
    }
}

fn log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("{text:?} is neither text nor json")),
    }
}

fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| format!("{text:?} is not a whole number"))
}

fn bytes_or_auto(text: &str) -> Result<Option<u64>, String> {
    if text == "auto" { Ok(None) } else { units::bytes(text).map(Some) }
}

fn small<T: TryFrom<u64>>(number: u64) -> Result<T, String> {
    T::try_from(number).map_err(|_| format!("{number} is too large"))
}

/// What the layers above the defaults say.
#[derive(Debug, Default)]
pub struct Layers {
    /// Text of the TOML file, with its path for messages.
    pub file: Option<(PathBuf, String)>,
    /// The process's environment.
    pub variables: Vec<(OsString, OsString)>,
    /// Settings given as flags, name and text.
    pub flags: Vec<(String, String)>,
}

/// The configuration, and what is worth a warning about it.
pub type Resolved = (NodeConfig, Vec<String>);

/// Puts the layers on top of each other and checks the result.
///
/// # Errors
/// Every fault of every layer; or, if each layer is well-formed, every fault of the whole.
pub fn resolve(layers: &Layers) -> Result<Resolved, Vec<Fault>> {
    let mut config = NodeConfig::default();
    let mut faults = Vec::new();
    let mut warnings = Vec::new();
    let mut http_given = false;
    let mut set = |name: &str, text: &str, place: &str, faults: &mut Vec<Fault>| {
        http_given |= name == "http";
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name == name) else {
            faults.push(unknown(name, place));
            return;
        };
        if let Err(message) = (setting.set)(&mut config, text) {
            faults.push(Fault { setting: name.to_owned(), message: format!("{message} (from {place})") });
        }
    };
    if let Some((path, text)) = &layers.file {
        let place = path.display().to_string();
        match text.parse::<toml::Table>() {
            Ok(table) => flatten("", &table, &mut |name, value| match value {
                Ok(value) => set(name, &value, &place, &mut faults),
                Err(message) => {
                    faults.push(Fault { setting: name.to_owned(), message: format!("{message} ({place})") })
                }
            }),
            Err(error) => {
                faults.push(Fault { setting: place.clone(), message: error.to_string().trim_end().to_owned() })
            }
        }
    }
    for (name, text) in variables(layers, &mut faults, &mut warnings) {
        set(name, &text, &variable_of(name), &mut faults);
    }
    for (name, text) in &layers.flags {
        set(name, text, "the command line", &mut faults);
    }
    if !http_given {
        config.http.set_port(http_port(config.listen.port()));
    }
    if faults.is_empty() {
        config.validate().map_err(|found| faults.extend(found)).ok();
    }
    if faults.is_empty() { Ok((config, warnings)) } else { Err(faults) }
}

/// The HTTP port that goes with a gRPC port; any free one with any free one.
fn http_port(listen: u16) -> u16 {
    if listen == 0 { 0 } else { listen.wrapping_add(crate::node::config::HTTP_PORT_OFFSET) }
}

/// Name of a setting's variable.
fn variable_of(name: &str) -> String {
    format!("{VARIABLE_PREFIX}{}", name.replace('.', "_").to_uppercase())
}

/// The settings found among the variables. A variable that is nearly one is worth a warning only: platforms make up
/// variables of their own from the names of services.
fn variables(layers: &Layers, faults: &mut Vec<Fault>, warnings: &mut Vec<String>) -> BTreeMap<&'static str, String> {
    let mut found = BTreeMap::new();
    for (variable, value) in &layers.variables {
        let Some(variable) = variable.to_str().filter(|variable| variable.starts_with(VARIABLE_PREFIX)) else {
            continue;
        };
        let setting = SETTINGS.iter().find(|setting| variable_of(setting.name) == variable);
        match (setting, value.to_str()) {
            (Some(setting), Some(value)) => {
                found.insert(setting.name, value.to_owned());
            }
            (Some(setting), None) => {
                let message = format!("is not UTF-8 (from {variable})");
                faults.push(Fault { setting: setting.name.to_owned(), message });
            }
            (None, _) if OTHER_VARIABLES.contains(&variable) => {}
            (None, _) => {
                let names: Vec<String> = SETTINGS.iter().map(|setting| variable_of(setting.name)).collect();
                if let Some(near) = nearest(variable, names.iter().map(String::as_str)) {
                    warnings.push(format!("{variable} is not a setting; is {near} meant?"));
                }
            }
        }
    }
    found
}

fn unknown(name: &str, place: &str) -> Fault {
    let near = nearest(name, SETTINGS.iter().map(|setting| setting.name));
    let hint = near.map(|near| format!("; the nearest is `{near}`")).unwrap_or_default();
    Fault { setting: name.to_owned(), message: format!("there is no such setting{hint} (from {place})") }
}

/// The name most like `name`.
fn nearest<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const LIKENESS_MIN: f64 = 0.5;
    names
        .map(|known| (strsim::normalized_damerau_levenshtein(name, known), known))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

/// Calls `each` with the dotted name and the text of every value.
fn flatten(prefix: &str, table: &toml::Table, each: &mut impl FnMut(&str, Result<String, String>)) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            toml::Value::Table(table) => flatten(&name, table, each),
            toml::Value::Array(items) => {
                let items: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
                let text = items.map(|items| items.join(",")).ok_or_else(|| "must be a list of strings".to_owned());
                each(&name, text);
            }
            toml::Value::String(text) => each(&name, Ok(text.clone())),
            toml::Value::Integer(number) => each(&name, Ok(number.to_string())),
            toml::Value::Float(number) => each(&name, Ok(number.to_string())),
            toml::Value::Boolean(_) | toml::Value::Datetime(_) => {
                each(&name, Err("must be text or a number".to_owned()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layers(file: &str, variables: &[(&str, &str)], flags: &[(&str, &str)]) -> Layers {
        Layers {
            file: Some((PathBuf::from("node.toml"), file.to_owned())),
            variables: variables.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
            flags: flags.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        }
    }

    #[test]
    fn flag_beats_variable_beats_file_beats_default() {
        let file =
            "zone = 'file'\nweight = 2\njoin = ['a:1', 'b:2']\n[limits]\nkey_bytes_max = '8KiB'\n[log]\nlevel = 'warn'";
        let variables = [("MERIDIAN_ZONE", "variable"), ("MERIDIAN_LOG_LEVEL", "error"), ("HOME", "/")];
        let (config, warnings) = resolve(&layers(file, &variables, &[("zone", "flag")])).unwrap();
        assert_eq!((config.zone.as_str(), config.log_level.as_str()), ("flag", "error"));
        assert_eq!((config.weight, config.limits.key_bytes_max), (2.0, 8192));
        assert_eq!(config.join, ["a:1", "b:2"]);
        assert_eq!(config.storage, NodeConfig::default().storage);
        assert!(warnings.is_empty());
    }

    #[test]
    fn all_faults_of_all_layers_come_at_once_with_the_nearest_name() {
        let file = "zonne = 'a'\nweight = true\n[limits]\nkey_byte_max = 5\n[raft]\nheartbeat_ms = 'soon'";
        let faults = resolve(&layers(file, &[("MERIDIAN_STORAGE", "tape")], &[("listen", "here")])).unwrap_err();
        let text: Vec<String> = faults.iter().map(ToString::to_string).collect();
        let expected = [
            "limits.key_byte_max: there is no such setting; the nearest is `limits.key_bytes_max` (from node.toml)",
            "raft.heartbeat_ms: \"soon\" is not a duration such as 200ms, 5s, 2m or 1h (from node.toml)",
            "weight: must be text or a number (node.toml)",
            "zonne: there is no such setting; the nearest is `zone` (from node.toml)",
            "storage: \"tape\" is neither disk nor memory (from MERIDIAN_STORAGE)",
            "listen: \"here\" is not IP:port, e.g. 0.0.0.0:7170 (from the command line)",
        ];
        assert_eq!(text, expected);
    }

    #[test]
    fn the_whole_is_validated_when_its_parts_are_well_formed() {
        let faults = resolve(&layers("listen = '0.0.0.0:7170'\nweight = 0", &[], &[])).unwrap_err();
        let settings: Vec<_> = faults.iter().map(|fault| fault.setting.as_str()).collect();
        assert_eq!(settings, ["advertise", "weight"]);
    }

    #[test]
    fn a_file_that_is_not_toml_is_named_with_the_line() {
        let faults = resolve(&layers("zone = ", &[], &[])).unwrap_err();
        assert_eq!(faults[0].setting, "node.toml");
        assert!(faults[0].message.contains("line 1"), "{}", faults[0].message);
    }

    #[test]
    fn the_http_port_follows_the_listening_port() {
        let (config, _) = resolve(&layers("listen = '127.0.0.1:9000'", &[], &[])).unwrap();
        assert_eq!(config.http.port(), 9100);
        let (config, _) = resolve(&layers("listen = '127.0.0.1:0'", &[], &[])).unwrap();
        assert_eq!(config.http.port(), 0);
        let (config, _) = resolve(&layers("http = '127.0.0.1:1'", &[], &[])).unwrap();
        assert_eq!(config.http.port(), 1);
    }

    #[test]
    fn a_misspelt_variable_is_a_warning_and_a_foreign_one_is_not() {
        let variables =
            [("MERIDIAN_LISTN", "x"), ("MERIDIAN_SERVICE_PORT_7170_TCP_ADDR", "x"), ("MERIDIAN_ENDPOINTS", "x")];
        let (_, warnings) = resolve(&layers("", &variables, &[])).unwrap();
        assert_eq!(warnings, ["MERIDIAN_LISTN is not a setting; is MERIDIAN_LISTEN meant?"]);
    }

    #[test]
    fn every_setting_has_a_variable_of_its_own() {
        let variables: std::collections::BTreeSet<_> =
            SETTINGS.iter().map(|setting| variable_of(setting.name)).collect();
        assert_eq!(variables.len(), SETTINGS.len());
        assert!(OTHER_VARIABLES.iter().all(|other| !variables.contains(*other)));
    }
}
