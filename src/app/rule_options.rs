//! The options of a rule, for the command line, the file and the control socket: a field that is
//! added to [`RuleOptions`] is an option of all three.
//!
//! A new option is a field of [`Rule`] (`engine/rule.rs`), with its default in `Rule::new`, and a
//! field of [`RuleOptions`], with the same default in `Default`, `From<&Rule>` and
//! [`applied_to`](RuleOptions::applied_to). Each of these names all fields, so the compiler reports
//! a missing one. A new timeout is added in the same way to [`Timeouts`] and [`TimeoutOptions`].

use std::time::Duration;

use clap::Args;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::values::{self, parse_keepalive, parse_mode, parse_some_time, parse_time};
use crate::listener::DEFAULT_MODE;
use crate::proxy::{ProxyProtocol, Rule, Source, Timeouts};
use crate::time::write_seconds;

/// What a rule says beside its name and its addresses.
///
/// As JSON it is what the control socket tells and takes; [`keys`](RuleOptions::keys) are those of
/// the file.
#[derive(Args, Clone, Debug, Deserialize, PartialEq, Serialize)]
#[command(next_help_heading = "Limits")]
#[serde(default)]
pub(crate) struct RuleOptions {
    /// Permissions of Unix listening sockets, octal (a named pipe's are in its address)
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode, help_heading = None)]
    #[serde(deserialize_with = "read_mode", serialize_with = "write_mode")]
    mode: u32,
    /// Owner of Unix listening sockets, a user's name or id, which only root may give [default: who
    /// runs this]
    #[arg(long, value_name = "USER", value_parser = values::parse_owner, help_heading = None)]
    #[serde(deserialize_with = "read_owner")]
    owner: Option<u32>,
    /// Group of Unix listening sockets, its name or id; give it rights with --mode 660 [default:
    /// that of who runs this]
    #[arg(long, value_name = "GROUP", value_parser = values::parse_group, help_heading = None)]
    #[serde(deserialize_with = "read_group")]
    group: Option<u32>,
    /// Where clients may come from: to TCP networks or addresses (192.168.7.0/24,::1), to vsock
    /// CIDs; others are refused [default: from anywhere]
    #[arg(long, value_name = "FROM", value_delimiter = ',', help_heading = None)]
    #[serde(deserialize_with = "read_sources", serialize_with = "write_sources")]
    from: Vec<Source>,
    #[command(flatten)]
    timeouts: TimeoutOptions,
    /// Seconds that a client is held whose target isn't there yet, and is dialled again meanwhile
    /// [default: it is refused]
    #[arg(long, value_name = "SECONDS", value_parser = parse_time)]
    #[serde(deserialize_with = "read_wait", serialize_with = "write_seconds")]
    pub(crate) wait: Option<Duration>,
    /// Those of [`Rule::reserved`].
    #[arg(skip)]
    #[serde(deserialize_with = "read_reserved")]
    pub(crate) reserved: usize,
    /// Connections of each forward at a time; more clients wait [default: as many as all may have]
    #[arg(long, value_name = "N", value_parser = parse_connections)]
    #[serde(deserialize_with = "read_connections")]
    connections: Option<usize>,
    /// Seconds of silence after which TCP asks a client or target whether it is still there; one
    /// that is gone is noticed a minute later; 0 or "off": never
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_keepalive)]
    #[serde(deserialize_with = "read_keepalive", serialize_with = "write_seconds")]
    keepalive: Duration,
    /// Tell the target first who the client is, by that version of the PROXY protocol: v1 or v2
    /// [default: it isn't told]
    #[arg(long, value_name = "VERSION", help_heading = None)]
    #[serde(deserialize_with = "read_proxy_protocol")]
    proxy_protocol: Option<ProxyProtocol>,
    /// Proxies that say first who their client is, by the PROXY protocol: networks or addresses of
    /// TCP (10.0.0.0/8,::1), or CIDs of vsock [default: none]
    #[arg(long, value_name = "FROM", value_delimiter = ',', help_heading = None)]
    #[serde(deserialize_with = "read_sources", serialize_with = "write_sources")]
    accept_proxy: Vec<Source>,
}

/// How long the connections of a rule may take for what.
#[derive(Args, Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(default)]
struct TimeoutOptions {
    /// Seconds a client may wait for its target to be connected
    #[arg(long = "dial-timeout", value_name = "SECONDS", default_value = "30", value_parser = parse_time)]
    #[serde(deserialize_with = "read_time", serialize_with = "write_seconds")]
    dial: Duration,
    /// Seconds a guest may take to end a connection that is being closed (10 at most if it goes on
    /// sending). They begin when the client is known to be gone, not at its half-close
    #[arg(long = "drain-timeout", value_name = "SECONDS", default_value = "60", value_parser = parse_some_time)]
    #[serde(deserialize_with = "read_some_time", serialize_with = "write_seconds")]
    drain: Duration,
    /// Seconds without a byte either way after which a connection is cut off [default: never]
    #[arg(long = "idle-timeout", value_name = "SECONDS", value_parser = parse_some_time)]
    #[serde(deserialize_with = "read_idle", serialize_with = "write_seconds")]
    idle: Option<Duration>,
    /// The same, once one side has ended. A client that closes looks like that until keepalive, or
    /// something sent to it, finds it gone [default: never]
    #[arg(long = "half-closed-timeout", value_name = "SECONDS", value_parser = parse_some_time)]
    #[serde(deserialize_with = "read_idle", serialize_with = "write_seconds")]
    half_closed: Option<Duration>,
}

/// The most connections that a rule may have or reserve.
const MOST: u64 = 1_000_000;

impl Default for RuleOptions {
    fn default() -> RuleOptions {
        RuleOptions {
            mode: DEFAULT_MODE,
            owner: None,
            group: None,
            from: Vec::new(),
            timeouts: TimeoutOptions::default(),
            wait: None,
            reserved: 0,
            connections: None,
            keepalive: Duration::from_secs(60),
            proxy_protocol: None,
            accept_proxy: Vec::new(),
        }
    }
}

impl Default for TimeoutOptions {
    fn default() -> TimeoutOptions {
        Timeouts::default().into()
    }
}

impl From<&Rule> for RuleOptions {
    fn from(rule: &Rule) -> RuleOptions {
        let Rule {
            name: _,
            listen: _,
            connect: _,
            mode,
            owner,
            group,
            ref from,
            timeouts,
            wait,
            reserved,
            connections,
            keepalive,
            proxy_protocol,
            ref accept_proxy,
        } = *rule;
        RuleOptions {
            mode,
            owner,
            group,
            from: from.clone(),
            timeouts: timeouts.into(),
            wait,
            reserved,
            connections,
            keepalive: keepalive.unwrap_or_default(),
            proxy_protocol,
            accept_proxy: accept_proxy.clone(),
        }
    }
}

impl From<Timeouts> for TimeoutOptions {
    fn from(timeouts: Timeouts) -> TimeoutOptions {
        let Timeouts {
            dial,
            drain,
            idle,
            half_closed,
        } = timeouts;
        TimeoutOptions {
            dial,
            drain,
            idle,
            half_closed,
        }
    }
}

impl From<TimeoutOptions> for Timeouts {
    fn from(timeouts: TimeoutOptions) -> Timeouts {
        let TimeoutOptions {
            dial,
            drain,
            idle,
            half_closed,
        } = timeouts;
        Timeouts {
            dial,
            drain,
            idle,
            half_closed,
        }
    }
}

impl Rule {
    /// Returns the rule with absolute paths, to be shown.
    pub(crate) fn absolute(mut self) -> Rule {
        #[cfg(unix)]
        for address in [&mut self.listen, &mut self.connect] {
            // Without a current directory it stays relative.
            if let Ok(absolute) = address.clone().absolute() {
                *address = absolute;
            }
        }
        // On Windows the paths are names of pipes.
        let _ = &mut self;
        self
    }
}

impl RuleOptions {
    /// Returns how many seconds a guest may take to end a connection.
    #[cfg(unix)]
    pub(crate) fn drain_seconds(&self) -> f64 {
        self.timeouts.drain.as_secs_f64()
    }

    /// Returns a rule with these options.
    pub(crate) fn applied_to(&self, rule: Rule) -> Rule {
        let RuleOptions {
            mode,
            owner,
            group,
            ref from,
            timeouts,
            wait,
            reserved,
            connections,
            keepalive,
            proxy_protocol,
            ref accept_proxy,
        } = *self;
        Rule {
            name: rule.name,
            listen: rule.listen,
            connect: rule.connect,
            mode,
            owner,
            group,
            from: match from.is_empty() {
                // Sources that the VM requires stay: other guests may dial the same port.
                true => rule.from,
                false => from.clone(),
            },
            timeouts: timeouts.into(),
            wait,
            reserved,
            connections,
            keepalive: Some(keepalive).filter(|time| !time.is_zero()),
            proxy_protocol,
            accept_proxy: accept_proxy.clone(),
        }
    }

    /// Returns the keys of the options in a file, each with its path in the JSON: `dial-timeout` is
    /// `dial` in `timeouts`.
    pub(crate) fn keys() -> Vec<(String, Vec<String>)> {
        let mut keys = Vec::new();
        for (key, value) in json(&RuleOptions::default())
            .as_object()
            .into_iter()
            .flatten()
        {
            match value {
                Value::Object(times) => keys.extend(times.keys().map(|time| {
                    let name = format!("{}-timeout", time.replace('_', "-"));
                    (name, vec![key.clone(), time.clone()])
                })),
                _ => keys.push((key.replace('_', "-"), vec![key.clone()])),
            }
        }
        keys
    }

    /// Sets the value at a path in the JSON. `null` leaves an optional value unchanged.
    ///
    /// # Errors
    /// Returns what is wrong with the value; nothing is changed then.
    pub(crate) fn set(&mut self, path: &[String], value: Value) -> Result<(), String> {
        let mut all = json(self);
        let mut place = &mut all;
        for key in path {
            let known = place.as_object().into_iter().flat_map(|it| it.keys());
            let known: Vec<String> = known.map(|key| format!("`{key}`")).collect();
            let unknown = || format!("there is no `{key}`; there are {}", known.join(", "));
            place = place.get_mut(key).ok_or_else(unknown)?;
        }
        if place.is_object() {
            let kind = values::kind(&value);
            return Err(format!("it is {kind}; write an object of times in seconds"));
        }
        let is_left_out = value.is_null();
        *place = value;
        match serde_json::from_value(all) {
            Ok(options) => *self = options,
            Err(_) if is_left_out => {}
            Err(e) => return Err(e.to_string()),
        }
        Ok(())
    }
}

fn json(options: &RuleOptions) -> Value {
    // Objects, strings and numbers can always be serialised.
    serde_json::to_value(options).unwrap_or_default()
}

fn read<'de, T, D: Deserializer<'de>>(
    from: D,
    read: impl FnOnce(&Value) -> Result<T, String>,
) -> Result<T, D::Error> {
    read(&Value::deserialize(from)?).map_err(D::Error::custom)
}

fn read_reserved<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
    read(from, values::count(0..=MOST as usize))
}

fn read_connections<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
    read(from, |value| match value {
        Value::Null => Ok(None),
        other => values::count(1..=MOST as usize)(other).map(Some),
    })
}

fn parse_connections(text: &str) -> Result<usize, String> {
    // Truncation can't happen below `MOST`.
    values::number(1..=MOST)(text).map(|connections| connections as usize)
}

fn read_keepalive<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    read(from, values::keepalive)
}

fn read_proxy_protocol<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<Option<ProxyProtocol>, D::Error> {
    read(from, values::proxy_protocol)
}

fn read_sources<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Source>, D::Error> {
    read(from, values::sources)
}

/// Writes CIDs as numbers, as in the file.
fn write_sources<S: Serializer>(sources: &[Source], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(sources.iter().map(|source| match source.as_cid() {
        Some(cid) => Value::from(cid),
        None => Value::from(source.to_string()),
    }))
}

fn read_mode<'de, D: Deserializer<'de>>(from: D) -> Result<u32, D::Error> {
    read(from, values::mode)
}

fn write_mode<S: Serializer>(mode: &u32, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{mode:o}"))
}

fn read_owner<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    read(from, values::owner)
}

fn read_group<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    read(from, values::group)
}

fn read_time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    read(from, values::time)
}

fn read_some_time<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    read(from, values::some_time)
}

fn read_idle<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    read(from, |value| values::time_or("never", value))
}

fn read_wait<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    read(from, |value| values::time_or("fail", value))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: RuleOptions,
    }

    fn rule() -> Rule {
        Rule::new("/a".parse().unwrap(), "/b".parse().unwrap())
    }

    #[test]
    fn what_is_not_said_is_the_same_everywhere() {
        let line = Line::parse_from(["x"]).options;
        assert_eq!(line, RuleOptions::default());
        assert_eq!(line.applied_to(rule()), rule());
        assert_eq!(RuleOptions::from(&rule()), line);
    }

    /// Each option by each of the three ways, with a value that no other option has.
    #[test]
    fn each_option_is_on_the_command_line_in_the_file_and_in_json() {
        let json = json!({"mode": "640", "owner": 1, "group": 2, "from": [3, "10.0.0.0/8", "::1"], "timeouts": {"dial": 1.0, "drain": 2.0, "idle": 3.0, "half_closed": 4.0},
            "wait": 5.0, "reserved": 0, "connections": 7, "keepalive": 8.0,
            "proxy_protocol": "v2", "accept_proxy": [4, "10.0.0.0/8", "::1"]});
        let options: RuleOptions = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&options).unwrap(), json);
        let mut by_file = RuleOptions::default();
        let mut words = vec!["x".to_owned()];
        for (key, path) in RuleOptions::keys() {
            let value = json.pointer(&format!("/{}", path.join("/"))).unwrap();
            by_file.set(&path, value.clone()).unwrap();
            if key != "reserved" {
                let text = value
                    .as_str()
                    .map_or_else(|| value.to_string(), str::to_owned);
                // On the command line a list is its elements.
                let text = text.replace(['[', ']', '"'], "");
                words.push(format!("--{key}={text}"));
            }
        }
        assert_eq!(by_file, options);
        assert_eq!(Line::parse_from(words).options, options);
        assert_eq!(RuleOptions::from(&options.applied_to(rule())), options);
    }

    #[test]
    fn what_can_not_be_is_told_and_changes_nothing() {
        let mut options = RuleOptions::default();
        let mut set = |path: &str, value| {
            let path: Vec<String> = path.split('.').map(str::to_owned).collect();
            let set = options.set(&path, value);
            (
                set.map_or_else(|why| why, |()| String::new()),
                options.clone(),
            )
        };
        for (path, value, part) in [
            ("mode", json!(600), "write permissions as a string"),
            ("timeouts", json!([]), "an object of times"),
            ("timeouts.x", json!(1), "there is no `x`; there are `dial`"),
            ("colour", json!(1), "there is no `colour`"),
            ("connections", json!(0), "0 is not a number from 1"),
            ("keepalive", json!("250ms"), "whole seconds"),
            ("keepalive", json!("1d"), "more than 9 hours"),
            ("proxy_protocol", json!("v3"), "v1 or v2"),
            (
                "accept_proxy",
                json!("example.org"),
                "is no address, network or CID",
            ),
            // As if it were left out.
            ("mode", Value::Null, ""),
        ] {
            let (why, options) = set(path, value);
            assert!(
                why.contains(part) && (part.is_empty() == why.is_empty()),
                "{path}: {why}"
            );
            assert_eq!(options, RuleOptions::default(), "{path}");
        }
        let idle = |(_, options): (String, RuleOptions)| options.timeouts.idle;
        assert_eq!(
            idle(set("timeouts.idle", json!("1m"))),
            Some(Duration::from_secs(60))
        );
        assert_eq!(idle(set("timeouts.idle", Value::Null)), None);
    }

    #[test]
    fn keepalive_can_be_turned_off() {
        for off in ["0", "off"] {
            let options = Line::parse_from(["x", "--keepalive", off]).options;
            assert_eq!(options.applied_to(rule()).keepalive, None);
            assert_eq!(RuleOptions::from(&options.applied_to(rule())), options);
        }
        let options = Line::parse_from(["x", "--keepalive", "5m"]).options;
        let five = Some(Duration::from_secs(300));
        assert_eq!(options.applied_to(rule()).keepalive, five);
    }
}
