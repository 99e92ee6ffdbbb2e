//! `hvsock cat`: standard input and output over any address.

use std::time::{Duration, Instant};

use clap::Args;
#[cfg(unix)]
use clap_complete::ArgValueCompleter;
#[cfg(unix)]
use std::ffi::OsString;

#[cfg(unix)]
use super::arguments;
#[cfg(unix)]
use super::complete;
use super::console::complain;
use super::options::{PeerArgs, refuse_impossible};
use super::outcome::{Failure, Outcome};
use super::services;
use super::signals::EndSignals;
use crate::address::Address;
#[cfg(unix)]
use crate::address::ExecAddress;
use crate::app::cat::{self, CatPlan};
use crate::app::serve::{self, Stop};
use crate::app::values::{parse_mode, parse_time};
use crate::error::Operation;
use crate::listener::lasting::LastingListener;

/// Carry standard input and output over any address, as netcat does
#[derive(Args, Debug)]
#[command(
    after_help = "EOF on standard input is passed on as a half-close, and the answer is read to its end. The exit code \
    is 0 if all of both went through. It ends, too, when the reader of its standard output has gone.

Examples:
  hvsock cat vsock://2:1024 <request >answer
  hvsock cat --vm docker 2375
  ssh -o ProxyCommand='hvsock cat --wait 30 --vm docker 22' root@docker
  hvsock cat -l vsock://:1024 >upload
  hvsock cat -lk --echo vsock://:7
  hvsock cat 'exec:/usr/bin/sort?arg=-u' <lines
  hvsock cat -l --exec /bin/tar vsock://:1024 -- -x -C /srv
  (echo status; sleep 60) | hvsock cat --end-with-peer --vm docker 7070
Addresses: see `hvsock forward --help`."
)]
pub(super) struct CatArgs {
    #[command(flatten)]
    peer: PeerArgs,
    /// Listen, and serve one client
    #[arg(short = 'l', long, conflicts_with = "wait")]
    listen: bool,
    /// With -l, serve one client after the other; with --echo, all at the same time
    #[arg(short = 'k', long, requires = "listen")]
    keep_listening: bool,
    /// End once the peer has ended, whatever standard input may still have, as hvcat and socat do
    #[arg(long, conflicts_with = "echo")]
    end_with_peer: bool,
    /// With -l, send back what comes, instead of standard input
    #[arg(long, requires = "listen")]
    echo: bool,
    /// With -l, register the service of an hvsock:// address first, as `hvsock register` does
    /// (Windows only)
    #[arg(long, requires = "listen")]
    register: bool,
    /// Seconds to go on trying when nobody is there yet
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = parse_time)]
    wait: Duration,
    /// After SIGINT or SIGTERM, seconds a guest may take to end the connection; to vsock-mux,
    /// seconds without a byte until EOF on standard input is passed on all the same, and to a pipe
    /// without a half-close until all is over
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = parse_time)]
    drain_timeout: Duration,
    /// With -l, permissions of a Unix listening socket, octal
    #[arg(long, value_name = "OCTAL", default_value = "600", value_parser = parse_mode, requires = "listen")]
    mode: u32,
    /// Start a program for the connection, which is its standard input and output; its exit code is
    /// that of cat. It is named by its path, and its arguments follow behind --, or by
    /// exec:/PROGRAM?arg=…&env=NAME=VALUE&pty=yes
    #[cfg(unix)]
    #[arg(long, value_name = "PROGRAM", conflicts_with = "echo", add = ArgValueCompleter::new(complete::address), value_parser = arguments::program())]
    exec: Option<ExecAddress>,
    /// Arguments of that program
    #[cfg(unix)]
    #[arg(last = true, value_name = "ARG", requires = "exec")]
    args: Vec<OsString>,
}

impl CatArgs {
    pub(super) fn run(self) -> Outcome {
        let begun = Instant::now();
        let address = self.peer.address(crate::time::after(begun, self.wait))?;
        let operation = match self.listen {
            true => Operation::Listen,
            false => Operation::Connect,
        };
        refuse_impossible(operation, &address)?;
        if self.register {
            register(&address)?;
        }
        let plan = CatPlan {
            address,
            wait: self.wait.saturating_sub(begun.elapsed()),
            drain: self.drain_timeout,
            keeps: self.keep_listening,
            #[cfg(unix)]
            exec: self.program(),
            ends_with_peer: self.end_with_peer,
        };
        if !self.listen {
            return connect(plan);
        }
        let signals = EndSignals::take()?;
        let listener = LastingListener::bind(&plan.address, self.mode)?;
        if listener.address() != &plan.address {
            // The kernel has chosen the port only now.
            complain(format_args!("listening on {}", listener.address()));
        }
        match self.echo {
            true => self.echo(plan, listener, signals),
            false => accept(plan, listener, signals),
        }
    }

    /// Returns the program to start.
    #[cfg(unix)]
    fn program(&self) -> Option<ExecAddress> {
        let mut program = self.exec.clone()?;
        program.args.extend(self.args.iter().cloned());
        Some(program)
    }

    fn echo(&self, plan: CatPlan, mut listener: LastingListener, signals: EndSignals) -> Outcome {
        let stop = Stop::default();
        let stopper = stop.clone();
        signals.call_at_each(move || stopper.request_end())?;
        let plan = serve::ServePlan {
            in_all: (!self.keep_listening).then_some(1),
            grace: plan.drain,
        };
        let _ = crate::sys::raise_descriptor_limit();
        let failure = std::sync::Mutex::new(None);
        serve::serve(
            &mut listener,
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
        );
        match failure.into_inner() {
            Ok(Some(e)) => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// Registers the service of an address, so that guests can dial it.
fn register(address: &Address) -> Outcome {
    let why = match address.registered_service() {
        _ if cfg!(not(windows)) => {
            "for Windows, where a service has to be in the registry before guests can dial it; here nothing needs it"
        }
        Some(service) => {
            complain(services::register(service, None)?);
            return Ok(());
        }
        None => "for hvsock:// addresses: no other has to be in the registry",
    };
    Err(Failure::Usage(format!("--register is {why}")))
}

fn connect(plan: CatPlan) -> Outcome {
    let signals = EndSignals::take()?;
    let mut cat = cat::Cat::new(plan);
    let interrupter = cat.interrupter();
    signals.call_at_each(move || interrupter.interrupt())?;
    let outcome = cat.connect();
    // A program whose connection was cut is ended, with the processes that it has started.
    #[cfg(unix)]
    crate::dial::Programs::alone().wait();
    Ok(outcome?)
}

fn accept(plan: CatPlan, listener: LastingListener, signals: EndSignals) -> Outcome {
    let keeps = plan.keeps;
    let mut cat = cat::Cat::new(plan);
    let interrupter = cat.interrupter();
    signals.call_at_each(move || interrupter.interrupt())?;
    let outcome = accept_each(&mut cat, listener, keeps);
    #[cfg(unix)]
    crate::dial::Programs::alone().wait();
    outcome
}

fn accept_each(cat: &mut cat::Cat, mut listener: LastingListener, keeps: bool) -> Outcome {
    loop {
        if cat.is_interrupted() {
            // Between two clients nothing is lost.
            return if keeps { Ok(()) } else { Err(Failure::Silent) };
        }
        match cat.accept(&mut listener) {
            Ok(served) if served && !keeps => return Ok(()),
            Ok(_) => {}
            Err(cat::CatFailure::Failed(why)) if keeps => complain(why),
            #[cfg(unix)]
            Err(cat::CatFailure::Program(code)) if keeps => {
                complain(format_args!("the program has ended with exit code {code}"));
            }
            Err(failure) => return Err(failure.into()),
        }
    }
}

impl From<cat::CatFailure> for Failure {
    fn from(failure: cat::CatFailure) -> Failure {
        match failure {
            cat::CatFailure::Failed(why) => Failure::Failed(why),
            #[cfg(unix)]
            cat::CatFailure::Program(code) => Failure::Program(code),
            // ssh always ends its ProxyCommand by a signal.
            cat::CatFailure::Interrupted | cat::CatFailure::OutputClosed => Failure::Silent,
        }
    }
}
