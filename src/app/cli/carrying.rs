//! Carries the rules of a command line, and serves the control socket and the metrics.

use std::sync::Arc;

#[cfg(unix)]
use tracing::warn;

use super::console::{complain, say};
#[cfg(unix)]
use super::control_socket;
#[cfg(unix)]
use super::ending::tell_manager_of_end;
use super::ending::{log_start, run_proxy};
use super::kept::{Describe, KeepTrying, KeptRules};
use super::options::ProxyOptions;
use super::outcome::{Failure, Outcome};
use super::rules::{Later, refuse_collisions, refuse_useless_access, refuse_what_can_not_work};
use super::signals::EndSignals;
#[cfg(unix)]
use crate::app::control::{self, Actions, Bound};
use crate::app::needs::{Weight, look_at_targets};
use crate::proxy::Rule;

/// The rules that a command line asks for.
pub(super) struct WantedRules {
    pub(super) rules: Vec<Rule>,
    /// Returns the rules once the VM is there.
    pub(super) later: Option<Later>,
}

/// Carries rules until the process is told to end. Serves the control socket and the metrics as the
/// options say.
pub(super) fn carry(
    options: &ProxyOptions,
    patience: KeepTrying,
    wanted: WantedRules,
    describe: Describe,
    signals: EndSignals,
) -> Outcome {
    refuse_collisions(&wanted.rules)?;
    #[cfg_attr(not(unix), allow(unused_mut))]
    let mut config = options.config(wanted.rules);
    refuse_useless_access(&config.rules, &options.given_access())?;
    refuse_what_can_not_work(&config.rules)?;
    look_at_needs(&config.rules)?;
    let later = wanted.later.map(|later| -> Later {
        let of_all = options.rule().clone();
        Box::new(move || {
            let rules = later()?.into_iter();
            Some(rules.map(|rule| of_all.applied_to(rule)).collect())
        })
    });
    #[cfg(unix)]
    let bound = options
        .control()
        .sockets(patience.unavailable())
        .map(|sockets| control_socket::open(&sockets, &mut config))
        .transpose()?;
    #[cfg(unix)]
    refuse_own_places(&config.rules, bound.as_ref())?;
    #[cfg(unix)]
    let warning = bound.as_ref().and_then(Bound::warning);
    #[cfg(unix)]
    let bound = bound.filter(|bound| !bound.is_empty());
    let (proxy, kept) = patience.start(config, later, describe)?;
    // If the start fails, only that failure is printed.
    #[cfg(unix)]
    warning.iter().for_each(|warning| warn!("{warning}"));
    let kept = kept.map(Arc::new);
    #[cfg(unix)]
    let _control = bound
        .map(|bound| control_socket::serve(bound, &proxy, actions(options, kept.clone())))
        .transpose()?;
    log_start(&proxy);
    proxy.forwards().iter().map(describe).for_each(say);
    kept.iter().for_each(|kept| kept.complain());
    let _retry = kept.map(KeptRules::keep_trying).transpose()?;
    run_proxy(proxy, options, signals)
}

/// Refuses rules that listen on this process' own control socket or metrics address.
#[cfg(unix)]
fn refuse_own_places(rules: &[Rule], bound: Option<&Bound>) -> Outcome {
    let own = bound.map(Bound::endpoint_states).unwrap_or_default();
    for Rule { listen, .. } in rules {
        if let Some((what, place, _)) = own.iter().find(|(_, own, _)| own.collides(listen)) {
            let why = control::describe_own_place(listen, what, place);
            return Err(Failure::Usage(format!(
                "{why}; choose another address for one of them"
            )));
        }
    }
    Ok(())
}

/// Prints what the rules of a command line need and lack now. Refuses rules that can never work.
fn look_at_needs(rules: &[Rule]) -> Outcome {
    let findings = look_at_targets(rules).unwrap_or_else(|why| {
        complain(format_args!("the targets were not looked at: {why}"));
        Vec::new()
    });
    for finding in findings {
        match finding.weight {
            Weight::Mistake => return Err(Failure::Failed(finding.to_string())),
            Weight::Note => complain(finding),
        }
    }
    Ok(())
}

/// Returns what the control socket can do beside what the proxy itself can.
#[cfg(unix)]
fn actions(options: &ProxyOptions, kept: Option<Arc<KeptRules>>) -> Actions {
    let (grace, rule) = (options.grace(), options.rule().clone());
    let allows_exec = options.control().allows_exec();
    Actions {
        options: Box::new(move || rule.clone()),
        pending: Box::new(move || kept.as_ref().map(|it| it.shown()).unwrap_or_default()),
        stopping: tell_manager_of_end,
        reload: None,
        succession: None,
        grace: Box::new(move || grace),
        allows_exec: Box::new(move || allows_exec),
    }
}
