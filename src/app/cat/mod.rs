//! Connects standard input and output, or a program's, to an address of any family.

mod event;
mod near;
#[cfg(unix)]
mod program;
mod session;

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

#[cfg(unix)]
use crate::address::ExecAddress;
use crate::address::{Address, HyperkitVm};
use crate::app::serve::LOOK;
use crate::dial;
use crate::error::{Error, Operation};
use crate::listener::lasting::LastingListener;
use crate::stream::Stream;
use crate::sys::Wanted;
use crate::thread::start_thread;
use crate::time::after;

use event::CatEvent;
pub(crate) use event::{CatFailure, CatResult};
use near::{Near, StandardInput};
#[cfg(unix)]
use program::SessionProgram;
use session::Session;

/// What `cat` is to do.
#[derive(Clone, Debug)]
pub(crate) struct CatPlan {
    pub(crate) address: Address,
    /// How long a connection is retried.
    pub(crate) wait: Duration,
    /// How long the peer may take to end after a signal. Also how long the peer may be silent
    /// before a half-close that is kept back is sent.
    pub(crate) drain: Duration,
    /// Whether clients are served one after the other until a signal comes.
    pub(crate) keeps: bool,
    /// The program that is started for each connection, instead of standard input and output.
    #[cfg(unix)]
    pub(crate) exec: Option<ExecAddress>,
    /// Whether a connection is over when the peer has ended, even before standard input.
    pub(crate) ends_with_peer: bool,
}

/// Standard input and output, and the connections that use them one after the other.
#[derive(Debug)]
pub(crate) struct Cat {
    plan: CatPlan,
    input: StandardInput,
    events: Receiver<CatEvent>,
    tell: Sender<CatEvent>,
    sessions: u64,
}

/// Interrupts a [`Cat`].
#[derive(Clone, Debug)]
pub(crate) struct Interrupter(Sender<CatEvent>);

impl Interrupter {
    pub(crate) fn interrupt(&self) {
        // It may have ended already.
        let _ = self.0.send(CatEvent::Interrupt);
    }
}

impl Cat {
    pub(crate) fn new(plan: CatPlan) -> Cat {
        let (tell, events) = channel();
        // A program has its own output.
        #[cfg(unix)]
        let is_ours = plan.exec.is_none();
        #[cfg(not(unix))]
        let is_ours = true;
        if is_ours {
            watch_output(tell.clone());
        }
        Cat {
            plan,
            input: StandardInput::default(),
            events,
            tell,
            sessions: 0,
        }
    }

    pub(crate) fn interrupter(&self) -> Interrupter {
        Interrupter(self.tell.clone())
    }

    /// Connects, and carries both directions to their ends.
    pub(crate) fn connect(&mut self) -> CatResult {
        #[cfg(unix)]
        if let Address::Exec(exec) = &self.plan.address {
            return self.connect_to_program(&exec.clone());
        }
        let (stream, connected) = self.dial(|left| self.dial_once(left))?;
        self.carry(stream, connected)
    }

    /// Starts a program, connects to its standard input and output, and carries. Returns the
    /// program's failure, if it fails.
    #[cfg(unix)]
    fn connect_to_program(&mut self, exec: &ExecAddress) -> CatResult {
        let (stream, ending) = self.dial(|_| {
            let is_interrupted = || self.is_interrupted();
            program::connect(exec, &is_interrupted).map_err(DialFailure::from)
        })?;
        let outcome = self.carry(stream, Instant::now());
        match outcome {
            // The program may leave bytes unread, and may end at any time.
            Ok(()) | Err(CatFailure::Failed(_)) => {}
            Err(_) => return outcome,
        }
        match self.wait_for_end(exec, |time| ending.wait_for_code(time)) {
            Ok(()) => outcome,
            failed => failed,
        }
    }

    /// Accepts a client, and carries both directions to their ends. Returns false if no client has
    /// come for a while.
    pub(crate) fn accept(&mut self, listener: &mut LastingListener) -> Result<bool, CatFailure> {
        let Some((stream, _)) = listener.accept_timeout(LOOK) else {
            return Ok(false);
        };
        self.carry(stream, Instant::now()).map(|()| true)
    }

    fn carry(&mut self, stream: Stream, connected: Instant) -> CatResult {
        #[cfg(unix)]
        if let Some(exec) = self.plan.exec.clone() {
            return self.carry_to_program(&exec, stream, connected);
        }
        self.sessions += 1;
        self.session(Near::Standard(&self.input), stream, connected)
            .run()
    }

    #[cfg(unix)]
    fn carry_to_program(
        &mut self,
        exec: &ExecAddress,
        stream: Stream,
        connected: Instant,
    ) -> CatResult {
        let program = match SessionProgram::start(exec) {
            Ok(program) => program,
            Err(e) => {
                // A guest's connection must not just be closed.
                if stream.address().transport().needs_graceful_close {
                    let _ = stream.finish(LEAVE);
                }
                return Err(e.into());
            }
        };
        self.sessions += 1;
        let near = Near::Program(&program);
        let outcome = self.session(near, stream, connected).run();
        if outcome.is_err() {
            program.cut_connection();
        }
        outcome?;
        self.wait_for_end(exec, |time| program.ended_within(time))
    }

    /// Waits until a program has ended, unless interrupted. `ended_within` waits for the given
    /// time, and returns the exit code.
    #[cfg(unix)]
    fn wait_for_end(
        &self,
        exec: &ExecAddress,
        ended_within: impl Fn(Duration) -> Option<io::Result<u8>>,
    ) -> CatResult {
        loop {
            match ended_within(LOOK) {
                Some(Ok(0)) => return Ok(()),
                Some(Ok(code)) => return Err(CatFailure::Program(code)),
                Some(Err(e)) => {
                    let program = exec.program.display();
                    let why = format!("the exit code of {program} can't be had: {e}");
                    return Err(CatFailure::Failed(why));
                }
                None if self.is_interrupted() => return Err(CatFailure::Interrupted),
                None => {}
            }
        }
    }

    fn session<'a>(&'a self, near: Near<'a>, stream: Stream, connected: Instant) -> Session<'a> {
        Session {
            number: self.sessions,
            stream: stream.into(),
            connected,
            drain: self.plan.drain,
            keeps: self.plan.keeps,
            near,
            ends_with_peer: self.plan.ends_with_peer,
            events: &self.events,
            tell: &self.tell,
        }
    }

    /// Returns whether the end was requested since the last call, by a signal or because standard
    /// output was closed.
    pub(crate) fn is_interrupted(&self) -> bool {
        // Events of an earlier session's threads are discarded.
        self.events
            .try_iter()
            .any(|event| matches!(event, CatEvent::Interrupt | CatEvent::OutputClosed))
    }

    /// Dials repeatedly until the time is over. `dial` is given the time left.
    fn dial<T>(
        &self,
        dial_once: impl Fn(Duration) -> Result<T, DialFailure>,
    ) -> Result<T, CatFailure> {
        let begun = Instant::now();
        let mut pause = Duration::from_millis(50);
        loop {
            let left = self.plan.wait.saturating_sub(begun.elapsed());
            let error = match dial_once(left) {
                Ok(connected) => return Ok(connected),
                Err(DialFailure::Interrupted) => return Err(CatFailure::Interrupted),
                Err(DialFailure::Failed(e)) => e,
            };
            // The attempt may have taken longer than the time left.
            let left = self.plan.wait.saturating_sub(begun.elapsed());
            if left.is_zero() || !dial::is_worth_retrying(&error) {
                return Err(error.into());
            }
            let until = Instant::now() + pause.min(left);
            while Instant::now() < until {
                if self.is_interrupted() {
                    return Err(CatFailure::Interrupted);
                }
                let rest = until.saturating_duration_since(Instant::now());
                std::thread::sleep(rest.min(LOOK));
            }
            pause = (pause * 2).min(Duration::from_secs(1));
        }
    }

    /// Connects once. Returns the connection, and the time at which it was made.
    fn dial_once(&self, left: Duration) -> Result<(Stream, Instant), DialFailure> {
        let address = &self.plan.address;
        let timeout = match self.plan.wait.is_zero() {
            true => DIAL,
            false => left.max(LOOK),
        };
        let deadline = after(Instant::now(), timeout);
        let stream = Stream::connect_unless(address, timeout, &|| self.is_interrupted())?;
        let connected = Instant::now();
        if let Some(vm) = address.hyperkit_vm()
            && !self.plan.wait.is_zero()
        {
            let outcome = self.is_taken(&stream, vm, deadline);
            if outcome.is_err() {
                let _ = stream.finish(LEAVE);
            }
            outcome?;
        }
        Ok((stream, connected))
    }

    /// Waits until it is certain that the guest has accepted a dial.
    ///
    /// hyperkit reports a refusal by EOF only, and a booting guest says nothing for a while. But a
    /// guest answers dials in their order: when a second dial, to a port that no program can have,
    /// is refused, the first was answered.
    fn is_taken(
        &self,
        stream: &Stream,
        vm: &HyperkitVm,
        deadline: Instant,
    ) -> Result<(), DialFailure> {
        // With `guest_forwards` alone no probe is possible. If the VM has ended, so has this
        // connection.
        let Ok(probe) = Stream::connect_timeout(&vm.probe_address().into(), DIAL) else {
            return self.is_refused(stream, LOOK);
        };
        let answered = self.is_answered(&probe, deadline);
        // The probe, too, must be closed gracefully, whatever its outcome.
        let _ = probe.finish(LEAVE);
        if answered? {
            return self.is_refused(stream, Duration::ZERO);
        }
        let cause = io::Error::new(io::ErrorKind::TimedOut, "the guest doesn't answer");
        let error = Error::new(Operation::Connect, &self.plan.address, cause);
        Err(error.with_remedy("is it booting, paused or asleep?").into())
    }

    /// Fails if the guest ends the connection within `timeout`.
    fn is_refused(&self, stream: &Stream, timeout: Duration) -> Result<(), DialFailure> {
        match stream.wait(Wanted::Readable, timeout) {
            Ok(true) if stream.has_ended() => Err(dial::refused_by_eof(&self.plan.address).into()),
            _ => Ok(()),
        }
    }

    /// Returns whether the guest ends the probe before the deadline.
    fn is_answered(&self, probe: &Stream, deadline: Instant) -> Result<bool, DialFailure> {
        loop {
            if self.is_interrupted() {
                return Err(DialFailure::Interrupted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // If the probe's socket fails, this connection does too, and reports why.
            if probe.wait(Wanted::Readable, left.min(LOOK)).unwrap_or(true) {
                return Ok(true);
            }
        }
    }
}

/// Reports when standard output's reader has closed it. A write would report it, too, but only when
/// bytes have come.
fn watch_output(tell: Sender<CatEvent>) {
    let watch = move || {
        if crate::sys::wait_until_output_is_unread() {
            let _ = tell.send(CatEvent::OutputClosed);
        }
    };
    // Without a thread the next write reports it.
    let _ = start_thread("hvsock-output", "to watch the output", watch);
}

/// Why a dial failed.
enum DialFailure {
    Failed(Error),
    Interrupted,
}

impl From<Error> for DialFailure {
    fn from(error: Error) -> DialFailure {
        match error.kind() {
            io::ErrorKind::Interrupted => DialFailure::Interrupted,
            _ => DialFailure::Failed(error),
        }
    }
}

/// How long a single dial may take if it isn't retried.
const DIAL: Duration = Duration::from_secs(30);

/// How long a guest may take to end a connection that is being closed.
const LEAVE: Duration = Duration::from_secs(1);
