//! Forwards of a command line that are retried until they can be had (`--keep-trying`).

use std::sync::{Arc, Mutex};

use clap::Args;

use super::console::{complain, say};
use super::ending::log_forward;
use super::outcome::Failure;
use super::passed::{on_passed_sockets, start};
use super::reconciler::{Occasion, Reconciler, RetryThread, name_of};
use super::rules::Later;
use super::summary::{Failed, Summary};
use crate::lock::lock;
use crate::proxy::{ForwardStatus, Proxy, ProxyConfig, Rule, all_are_wanted};

/// What becomes of what can't be had at the start.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct KeepTrying {
    /// Start though something can't be listened on, and try that again every 2 s [default: it fails
    /// at once]
    #[arg(long)]
    keep_trying: bool,
}

/// Describes a forward on one line.
pub(super) type Describe = fn(&ForwardStatus) -> String;

/// The rules of a command line, some of which may not be carried yet.
pub(super) struct KeptRules {
    reconciler: Reconciler,
    /// Locked during a retry.
    wanted: Mutex<RetriedRules>,
    describe: Describe,
}

struct RetriedRules {
    rules: Vec<Rule>,
    /// Returns the rules once their VM is there.
    later: Option<Later>,
}

impl KeepTrying {
    /// Returns what to do if a socket of the control interface can't be bound.
    #[cfg(unix)]
    pub(super) fn unavailable(self) -> crate::app::control::Unavailable {
        match self.keep_trying {
            true => crate::app::control::Unavailable::IsTriedAgain,
            false => crate::app::control::Unavailable::Fails,
        }
    }

    /// Starts a proxy. Forwards that can't be had now are left to the returned rules, if forwards
    /// are kept. With `later` the VM isn't there yet, and the forwards that its guest dials wait
    /// for it.
    ///
    /// # Errors
    /// Returns those of [`Proxy::start`]. With `--keep-trying` a rule that can't be had is no
    /// error.
    pub(super) fn start(
        self,
        mut config: ProxyConfig,
        later: Option<Later>,
        describe: Describe,
    ) -> Result<(Proxy, Option<KeptRules>), Failure> {
        if !self.keep_trying && later.is_none() {
            return Ok((start(config)?, None));
        }
        let rules = std::mem::take(&mut config.rules);
        let config = on_passed_sockets(config)?;
        all_are_wanted(&config.listeners, &rules)?;
        let proxy = Proxy::start(config)?;
        let reconciler = Reconciler::new(proxy.handle());
        reconciler.apply(&rules, &waits_for, Occasion::Asked);
        if let Some(why) = reconciler.failure().filter(|_| !self.keep_trying) {
            return Err(Failure::Failed(why));
        }
        let kept = KeptRules {
            reconciler,
            wanted: Mutex::new(RetriedRules { rules, later }),
            describe,
        };
        Ok((proxy, Some(kept)))
    }
}

impl KeptRules {
    /// Returns the forwards that can't be had now.
    #[cfg(unix)]
    pub(super) fn shown(&self) -> Vec<crate::app::control::ForwardInfo> {
        self.reconciler.shown()
    }

    /// Retries the failed forwards until the returned thread is dropped.
    pub(super) fn keep_trying(self: Arc<KeptRules>) -> std::io::Result<RetryThread> {
        let again = move || {
            if self.reconciler.handle().is_stopping() {
                return;
            }
            let mut wanted = lock(&self.wanted);
            if let Some(rules) = wanted.later.as_ref().and_then(|later| later()) {
                wanted.later = None;
                wanted.rules = rules;
                let rules = &wanted.rules;
                let summary = self.reconciler.apply(rules, &waits_for, Occasion::Asked);
                self.print_summary(&summary);
            } else if self.reconciler.has_pending() {
                let summary = self.reconciler.try_again(&wanted.rules, &waits_for);
                self.print_summary(&summary);
            }
        };
        RetryThread::start(again, || ())
    }

    /// Prints what could not be had so far, but not that the VM is missing: that was printed.
    pub(super) fn complain(&self) {
        let wanted = lock(&self.wanted);
        if wanted.later.is_none() || self.reconciler.failure().is_some() {
            let failed = self.reconciler.failed();
            failed.iter().map(Failed::reason).for_each(complain);
        }
    }

    fn print_summary(&self, summary: &Summary) {
        let forwards = self.reconciler.handle().forwards();
        let new = |it: &&ForwardStatus| {
            let name = name_of(&it.rule);
            summary.added.contains(&name) || summary.changed.contains(&name)
        };
        for forward in forwards.iter().filter(new) {
            say((self.describe)(forward));
            log_forward(forward);
        }
        let failed = summary.failed.iter();
        failed.map(Failed::reason).for_each(complain);
    }
}

/// Returns why a rule can't listen yet, if the directory of its VM is missing.
fn waits_for(rule: &Rule) -> Option<String> {
    let directory = &rule.listen.hyperkit_vm()?.state_dir;
    let why = format!(
        "waits for the VM's state directory, {}",
        directory.display()
    );
    (!directory.exists()).then_some(why)
}
