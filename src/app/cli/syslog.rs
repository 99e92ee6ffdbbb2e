//! `hvsock syslog`: carries log messages of local programs to a collector elsewhere.

use std::path::PathBuf;

use clap::Args;
use clap_complete::ArgValueCompleter;

use super::console::say;
use super::outcome::{Failure, Outcome};
use super::signals::EndSignals;
use super::{complete, table};
use crate::address::Address;
use crate::app::log::LogOptions;
use crate::app::serve::Stop;
use crate::app::syslog::{Log, carry};
use crate::app::values::parse_mode;

/// Carry the syslog messages of local programs to a collector, framed as RFC 6587 says
#[derive(Args, Debug)]
#[command(
    after_help = "While the collector can't be had, the last 4 MiB of messages are kept; programs are never made to wait. \
    When a connection is lost, what it was given in its last 2 seconds, and what nobody has taken, is sent again: some \
    may come twice. After SIGINT or SIGTERM the last ones have 2 seconds, and the exit code is 1 if some may not have \
    been delivered.

Example, in a guest:
  hvsock syslog /dev/log vsock://host:514"
)]
pub(super) struct SyslogArgs {
    /// The datagram socket that programs write to
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Where the collector listens
    #[arg(value_name = "ADDRESS", add = ArgValueCompleter::new(complete::address), value_parser = super::arguments::address())]
    target: Address,
    /// Permissions of the socket, octal
    #[arg(long, value_name = "OCTAL", default_value = "666", value_parser = parse_mode)]
    mode: u32,
    #[command(flatten)]
    log: LogOptions,
}

impl SyslogArgs {
    pub(super) fn log(&self) -> LogOptions {
        self.log.clone()
    }

    pub(super) fn run(self) -> Outcome {
        let stop = Stop::default();
        let signals = EndSignals::take()?;
        let log = Log::bind(&self.path, self.mode)?;
        let stopper = stop.clone();
        signals.call_at_each(move || stopper.request_end())?;
        say(format_args!("{} -> {}", self.path.display(), self.target));
        match carry(log, &self.target, &stop)? {
            0 => Ok(()),
            count => Err(Failure::Failed(format!(
                "{} may not have been delivered to {}",
                table::counted(count, "message"),
                self.target
            ))),
        }
    }
}
