//! The options of a rule that stand on a command line.

use clap::parser::ValueSource;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value};

use crate::app::rule::RuleOptions;

/// The options of a rule that a command line gives, as JSON: those that it doesn't give are
/// another's to say.
#[derive(Clone, Debug)]
pub(super) struct GivenOptions(pub(super) Map<String, Value>);

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
        let options =
            serde_json::to_value(RuleOptions::from_arg_matches(matches)?).unwrap_or_default();
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
        Ok(GivenOptions(given))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = GivenOptions::from_arg_matches(matches)?;
        Ok(())
    }
}
