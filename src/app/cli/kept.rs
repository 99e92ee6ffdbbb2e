//! Forwards of a command line that are tried again until they can be had (`--keep-trying`).

use std::sync::Arc;

use clap::Args;

use super::console::{complain, say};
use super::outcome::Failure;
use super::passed::{on_passed_sockets, start};
use super::reconciler::{Occasion, Reconciler, RetryThread, name_of};
use super::summary::{Failed, Summary};
use crate::proxy::{ForwardStatus, Proxy, ProxyConfig, Rule, all_are_wanted};

/// What becomes of what can't be had at the start.
#[derive(Args, Clone, Copy, Debug)]
pub(super) struct KeepTrying {
    /// Start though something can't be listened on, and try that again every 2 s [default: it fails at
    /// once]
    #[arg(long)]
    keep_trying: bool,
}

/// A forward, on the line that tells of it.
pub(super) type Describe = fn(&ForwardStatus) -> String;

/// The rules of a command line, of which some may wait for what they need.
#[derive(Debug)]
pub(super) struct Kept {
    reconciler: Reconciler,
    rules: Vec<Rule>,
    describe: Describe,
}

impl KeepTrying {
    /// What becomes of a socket of the control interface that can't be had.
    #[cfg(unix)]
    pub(super) fn unavailable(self) -> crate::app::control::Unavailable {
        match self.keep_trying {
            true => crate::app::control::Unavailable::IsTriedAgain,
            false => crate::app::control::Unavailable::Fails,
        }
    }

    /// Starts a proxy, and leaves forwards that can't be had to what is returned beside it.
    ///
    /// # Errors
    /// As those of [`Proxy::start`]; of a patient one not that a rule can't be had.
    pub(super) fn start(
        self,
        mut config: ProxyConfig,
        describe: Describe,
    ) -> Result<(Proxy, Option<Kept>), Failure> {
        if !self.keep_trying {
            return Ok((start(config)?, None));
        }
        let rules = std::mem::take(&mut config.rules);
        let config = on_passed_sockets(config)?;
        all_are_wanted(&config.listeners, &rules)?;
        let proxy = Proxy::start(config)?;
        let reconciler = Reconciler::new(proxy.handle());
        reconciler.apply(&rules, &|_| None, Occasion::Asked);
        let kept = Kept {
            reconciler,
            rules,
            describe,
        };
        Ok((proxy, Some(kept)))
    }
}

impl Kept {
    /// The forwards that can't be had now.
    #[cfg(unix)]
    pub(super) fn shown(&self) -> Vec<crate::app::control::Forward> {
        self.reconciler.shown()
    }

    /// Tries again what could not be had, until what is returned is dropped.
    pub(super) fn keep_trying(self: Arc<Kept>) -> std::io::Result<RetryThread> {
        let again = move || {
            if self.reconciler.has_pending() && !self.reconciler.handle().is_stopping() {
                let summary = self.reconciler.try_again(&self.rules, &|_| None);
                self.tell_of(&summary);
            }
        };
        RetryThread::start(again, || ())
    }

    /// Says what could not be had so far.
    pub(super) fn complain(&self) {
        let failed = self.reconciler.failed();
        failed.iter().map(Failed::reason).for_each(complain);
    }

    fn tell_of(&self, summary: &Summary) {
        let forwards = self.reconciler.handle().forwards();
        let new = |it: &&ForwardStatus| summary.added.contains(&name_of(&it.rule));
        let new = forwards.iter().filter(new);
        new.map(self.describe).for_each(say);
        let failed = summary.failed.iter();
        failed.map(Failed::reason).for_each(complain);
    }
}
