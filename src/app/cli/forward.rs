//! `hvsock forward`: forwards any address to any address.

use clap::Args;
use clap_complete::ArgValueCompleter;

use super::arguments::{self, Addresses};
use super::carrying::{WantedRules, carry};
use super::complete;
use super::kept::KeepTrying;
use super::options::ProxyOptions;
use super::outcome::Outcome;
use super::rules::rules_of;
use super::signals::EndSignals;
use crate::app::log::LogOptions;
use crate::proxy::ForwardStatus;

/// Forward any address to any address
#[derive(Args, Debug)]
#[command(after_help = "Addresses:
  tcp://HOST:PORT                 hyperkit://[CID]:PORT/STATE/DIR
  unix:///PATH, /PATH, ./PATH     vsock://[CID]:PORT (Linux)
  unix:@NAME (abstract, Linux)    vsock-mux://:PORT/PATH (Firecracker, …)
  npipe:////./pipe/NAME (Windows; ?sddl=… says who may connect)
  tcp4://HOST:PORT, tcp6://HOST:PORT
                                one family; tcp://localhost and tcp://* are both
  HOST:PORT, PORT               TCP as well; PORT alone is of 127.0.0.1
To connect to (not on Windows):
  exec:/PROGRAM?arg=…&env=NAME=VALUE&pty=yes
                                a program that is started for each connection,
                                which is its standard input and output; arg and
                                env as often as wanted, percent-encoded
  file:/PATH                    the content of a file
Listening on hyperkit:// is taking what the guest dials: port PORT of the host, CID 2.

Examples:
  hvsock forward 8080 /run/web.sock
  hvsock forward vsock://:2375 unix:///var/run/docker.sock
  hvsock forward tcp://127.0.0.1:8000-8010 vsock://3:8000-8010
  hvsock forward /tmp/docker.sock hyperkit://:2375/path/to/state
  hvsock forward hyperkit://:5000/path/to/state tcp://localhost:5000
  hvsock forward vsock://:22 'exec:/usr/sbin/sshd?arg=-i'")]
pub(super) struct ForwardArgs {
    /// Pairs of an address to listen on and the address that its connections go to; both may have a
    /// range of ports, as tcp://127.0.0.1:8000-8010 has
    #[arg(value_name = "LISTEN CONNECT", required = true, num_args = 2.., add = ArgValueCompleter::new(complete::address), value_parser = arguments::addresses())]
    addresses: Vec<Addresses>,
    #[command(flatten)]
    patience: KeepTrying,
    #[command(flatten)]
    options: ProxyOptions,
}

impl ForwardArgs {
    pub(super) fn log(&self) -> LogOptions {
        self.options.log().clone()
    }

    pub(super) fn run(self) -> Outcome {
        let rules = rules_of(&self.addresses)?.concat();
        let signals = EndSignals::take()?;
        let describe = |it: &ForwardStatus| format!("{} -> {}", it.listen, it.rule.connect);
        let wanted = WantedRules { rules, later: None };
        carry(&self.options, self.patience, wanted, describe, signals)
    }
}
