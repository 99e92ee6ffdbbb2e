//! The options that all commands with a proxy have.

use std::num::NonZeroUsize;
use std::time::Duration;

use clap::Args;

use crate::proxy::{ProxyConfig, Rule};
use crate::sys;

#[derive(Args, Debug)]
#[command(next_help_heading = "Limits")]
pub(super) struct ProxyOptions {
    /// Permissions of Unix listening sockets, octal (a named pipe's are in its address)
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode)]
    mode: u32,
    /// Threads, at most 256 [default: one a core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: Option<u16>,
    /// Seconds that live connections may take to finish after the first SIGINT or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u32,
    /// Seconds a client may wait for its target to be connected
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    dial_timeout: u32,
    /// Seconds a guest may take to end a connection after our half-close
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    drain_timeout: u32,
    /// Connections at a time to one VM, at most 1000 (about 200 if hyperkit runs with 256 descriptors)
    #[arg(long, value_name = "N", default_value_t = 900, value_parser = clap::value_parser!(u16).range(1..=1000))]
    vm_connections: u16,
    /// Dials to one VM that the guest may leave unanswered before more clients wait, at most 400
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=400))]
    vm_unanswered: u16,
}

impl ProxyOptions {
    /// A proxy of these rules, with as many connections as there can be descriptors for.
    pub(super) fn config(&self, rules: impl IntoIterator<Item = Rule>) -> ProxyConfig {
        let rules = rules
            .into_iter()
            .map(|rule| Rule {
                mode: self.mode,
                ..rule
            })
            .collect();
        let mut config = ProxyConfig::new(rules);
        config.workers = self.workers.and_then(|n| NonZeroUsize::new(n.into()));
        // Without it there are fewer; the proxy knows.
        let _ = sys::raise_descriptor_limit();
        config.limits.connections = usize::MAX;
        config.limits.vm_connections = self.vm_connections.into();
        config.limits.vm_unanswered = self.vm_unanswered.into();
        config.limits.dial_timeout = Duration::from_secs(self.dial_timeout.into());
        config.limits.drain_timeout = Duration::from_secs(self.drain_timeout.into());
        config
    }

    pub(super) fn grace(&self) -> Duration {
        Duration::from_secs(self.grace.into())
    }
}

/// Permissions, octal.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permissions are up to three octal digits, such as 600 or 660".into()),
    }
}
