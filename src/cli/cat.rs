//! `hvsock cat`: standard input and output over any address.

use std::time::Duration;

use clap::Args;

use super::options::parse_mode;
use super::signals::EndSignals;
use super::{Failure, Outcome, complain};
use crate::address::{Address, HyperkitAddress, Port};
use crate::cat::{self, Plan};
use crate::hyperkit::{Places, find};
use crate::listener::Listener;
use crate::serve::{self, Stop};
use crate::stream::Stream;

/// Carry standard input and output over any address, as netcat does
#[derive(Args, Debug)]
#[command(
    after_help = "EOF on standard input is passed on as a half-close, and the answer is read to its end. The exit code is 0 if all
of both went through.

Examples:
  hvsock cat vsock://2:1024 <request >answer
  hvsock cat --vm docker 2375
  ssh -o ProxyCommand='hvsock cat --wait 30 --vm docker 22' root@docker
  hvsock cat -l vsock://:1024 >upload
  hvsock cat -lk --echo vsock://:7
Addresses: see `hvsock forward --help`."
)]
pub(super) struct Cat {
    /// Where to connect to, or with -l to listen on; with --vm, a vsock port
    #[arg(value_name = "ADDRESS")]
    address: String,
    /// The VM that ADDRESS is a port of: its state directory, the name of one that can be found, or
    /// hyperkit:///STATE/DIR
    #[arg(long, value_name = "VM")]
    vm: Option<String>,
    /// Listen, and serve one client
    #[arg(short = 'l', long)]
    listen: bool,
    /// With -l, serve one client after the other; with --echo, all at the same time
    #[arg(short = 'k', long, requires = "listen")]
    keep_listening: bool,
    /// Send back what comes, instead of standard input
    #[arg(long)]
    echo: bool,
    /// With -l, register the service in the registry (Windows only)
    #[arg(long)]
    register: bool,
    /// Seconds to go on trying when nobody is there yet
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    wait: u32,
    /// Seconds a guest may take to end the connection when we are told to end; to vsock-mux, seconds without a byte
    /// until EOF on standard input is passed on all the same, and to a pipe without a half-close until all is over
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain_timeout: u32,
    /// With -l, permissions of a Unix listening socket, octal
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode)]
    mode: u32,
}

/// How many clients are echoed at a time.
const ECHOES: usize = 1000;

impl Cat {
    pub(super) fn run(self) -> Outcome {
        if self.register {
            return Err(Failure::Usage(
                "--register is for Windows, where a service has to be in the registry before guests can dial it; here \
                 nothing needs it"
                    .to_owned(),
            ));
        }
        let plan = Plan {
            address: self.address()?,
            wait: Duration::from_secs(self.wait.into()),
            drain: Duration::from_secs(self.drain_timeout.into()),
            keeps: self.keep_listening,
        };
        match (self.listen, self.echo) {
            (_, true) => self.echo(plan),
            (false, false) => carry(plan, None, false),
            (true, false) => {
                let listener = Listener::bind_with_mode(&plan.address, self.mode)?;
                tell_address(&listener, &plan.address);
                carry(plan, Some(listener), self.keep_listening)
            }
        }
    }

    fn address(&self) -> Result<Address, Failure> {
        let Some(vm) = &self.vm else {
            let parsed = self.address.parse::<Address>();
            return parsed.map_err(|e| Failure::Usage(e.to_string()));
        };
        let port: Port = self
            .address
            .parse()
            .map_err(|e| Failure::Usage(format!("{:?} with --vm: {e}", self.address)))?;
        let vm = find(vm, &Places::from_env())?;
        Ok(HyperkitAddress { vm, port }.into())
    }

    fn echo(&self, plan: Plan) -> Outcome {
        let stop = Stop::default();
        let drain = plan.drain;
        if !self.listen {
            let cat = cat::Cat::new(plan);
            let (stream, _) = cat.dial()?;
            return echo_back(&stream, drain);
        }
        let listener = Listener::bind_with_mode(&plan.address, self.mode)?;
        let mut signals = EndSignals::take()?;
        tell_address(&listener, &plan.address);
        let stopper = stop.clone();
        std::thread::spawn(move || signals.each().for_each(|()| stopper.ask()));
        let plan = serve::Plan {
            at_a_time: ECHOES,
            in_all: (!self.keep_listening).then_some(1),
            grace: drain,
        };
        let _ = crate::sys::raise_descriptor_limit();
        let failure = std::sync::Mutex::new(None);
        serve::serve(
            &listener,
            plan,
            &stop,
            |_, stream, peer| match serve::echo(stream, &[]) {
                Ok(bytes) => tracing::debug!("echoed {bytes} bytes to {peer}"),
                Err(e) if self.keep_listening => tracing::debug!("{peer}: {e}"),
                Err(e) => {
                    if let Ok(mut failure) = failure.lock() {
                        *failure = Some(e);
                    }
                }
            },
        )?;
        match failure.into_inner() {
            Ok(Some(e)) => Err(e.into()),
            _ => Ok(()),
        }
    }
}

fn echo_back(stream: &Stream, drain: Duration) -> Outcome {
    let echoed = serve::echo(stream, &[]);
    if echoed.is_err() && stream.address().is_delicate() {
        let _ = stream.finish(drain);
    }
    Ok(echoed.map(drop)?)
}

/// Says where it listens if that wasn't known before.
fn tell_address(listener: &Listener, asked: &Address) {
    if listener.address() != asked {
        complain(format_args!("listening on {}", listener.address()));
    }
}

fn carry(plan: Plan, listener: Option<Listener>, keep: bool) -> Outcome {
    let mut cat = cat::Cat::new(plan);
    let mut signals = EndSignals::take()?;
    let interrupter = cat.interrupter();
    std::thread::spawn(move || signals.each().for_each(|()| interrupter.interrupt()));
    let Some(listener) = listener else {
        return Ok(cat.connect()?);
    };
    loop {
        match cat.accept(&listener) {
            Ok(served) if served && !keep => return Ok(()),
            Ok(_) => {}
            Err(cat::Failure::Failed(why)) if keep => complain(why),
            Err(failure) => return Err(failure.into()),
        }
    }
}

impl From<cat::Failure> for Failure {
    fn from(failure: cat::Failure) -> Failure {
        match failure {
            cat::Failure::Failed(why) => Failure::Failed(why),
            // ssh ends its ProxyCommand by a signal whenever it has done.
            cat::Failure::Interrupted | cat::Failure::OutputClosed => Failure::Silent,
        }
    }
}
