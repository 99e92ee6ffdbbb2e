//! The options of a rule that a command line gives.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

use crate::app::needs::ACCESS_KEYS;
use crate::app::rule_options::RuleOptions;

/// The options of a rule, and which of them the command line gives.
#[derive(Clone, Debug)]
pub(super) struct GivenOptions {
    /// All options; those that aren't given have their defaults.
    pub(super) all: RuleOptions,
    /// The given options, as JSON. A running hvsock may have other defaults for the rest.
    pub(super) given: Map<String, Value>,
}

impl GivenOptions {
    /// Returns the given keys that apply only to the file of a Unix socket.
    pub(super) fn access(&self) -> Vec<&'static str> {
        let keys = ACCESS_KEYS.into_iter();
        keys.filter(|key| self.given.contains_key(*key)).collect()
    }
}

impl Args for GivenOptions {
    fn augment_args(command: Command) -> Command {
        RuleOptions::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        RuleOptions::augment_args_for_update(command)
    }
}

impl FromArgMatches for GivenOptions {
    fn from_arg_matches(matches: &ArgMatches) -> Result<GivenOptions, clap::Error> {
        let all = RuleOptions::from_arg_matches(matches)?;
        let options = serde_json::to_value(&all).unwrap_or_default();
        let mut given = Map::new();
        for (_, path) in RuleOptions::keys() {
            let is_given = |id: &String| {
                let known = matches.try_contains_id(id).is_ok();
                known && matches.value_source(id) == Some(ValueSource::CommandLine)
            };
            if !path.last().is_some_and(is_given) {
                continue;
            }
            match &path[..] {
                [key] => drop(given.insert(key.clone(), options[key].clone())),
                [of, key] => {
                    let of_it = given.entry(of.clone()).or_insert_with(|| Map::new().into());
                    of_it[key] = options[of][key].clone();
                }
                _ => {}
            }
        }
        Ok(GivenOptions { all, given })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = GivenOptions::from_arg_matches(matches)?;
        Ok(())
    }
}
