//! Standard input and output, or a program's, over a connection of any family.

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
    /// How long a connection that can't be had yet is tried for again.
    pub(crate) wait: Duration,
    /// How long the peer may take to end when we are told to; and how long nothing may come before
    /// a half-close that is kept back is sent all the same.
    pub(crate) drain: Duration,
    /// One client is served after the other.
    pub(crate) keeps: bool,
    /// What is started for each connection, in the place of standard input and output.
    #[cfg(unix)]
    pub(crate) exec: Option<ExecAddress>,
    /// A connection is over when the peer has ended, whatever standard input still has.
    pub(crate) ends_with_peer: bool,
}

/// One standard input and output, and the connections that have them one after the other.
#[derive(Debug)]
pub(crate) struct Cat {
    plan: CatPlan,
    input: StandardInput,
    events: Receiver<CatEvent>,
    tell: Sender<CatEvent>,
    sessions: u64,
}

/// Tells a [`Cat`] to end.
#[derive(Clone, Debug)]
pub(crate) struct Interrupter(Sender<CatEvent>);

impl Interrupter {
    pub(crate) fn interrupt(&self) {
        // Without a receiver it has ended already.
        let _ = self.0.send(CatEvent::Interrupt);
    }
}

impl Cat {
    pub(crate) fn new(plan: CatPlan) -> Cat {
        let (tell, events) = channel();
        // The output of a program is not ours.
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

    /// Connects and carries, to the end of both directions.
    pub(crate) fn connect(&mut self) -> CatResult {
        #[cfg(unix)]
        if let Address::Exec(exec) = &self.plan.address {
            return self.connect_to_program(&exec.clone());
        }
        let (stream, connected) = self.dial(|left| self.dial_once(left))?;
        self.carry(stream, connected)
    }

    /// Connects to the standard input and output of a program, which is started, and carries.
    /// Returns its failure, if it fails.
    #[cfg(unix)]
    fn connect_to_program(&mut self, exec: &ExecAddress) -> CatResult {
        let (stream, ending) = self.dial(|_| {
            let is_interrupted = || self.is_interrupted();
            program::connect(exec, &is_interrupted).map_err(DialFailure::from)
        })?;
        let outcome = self.carry(stream, Instant::now());
        match outcome {
            // What it leaves unread, and how it breaks off, is its own choice.
            Ok(()) | Err(CatFailure::Failed(_)) => {}
            Err(_) => return outcome,
        }
        match self.wait_for_end(exec, |time| ending.wait_for_code(time)) {
            Ok(()) => outcome,
            failed => failed,
        }
    }

    /// Takes a client and carries, to the end of both directions; false if none has come for a
    /// while.
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
                // A guest's connection is not just closed.
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

    /// Waits until a program has ended, unless it is interrupted; `ended_within` waits for so long,
    /// and returns its exit code.
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

    /// Returns whether the end was asked for since the last call, by a signal or by the end of
    /// standard output's reader.
    pub(crate) fn is_interrupted(&self) -> bool {
        // What an earlier session's threads have sent means nothing any more.
        self.events
            .try_iter()
            .any(|event| matches!(event, CatEvent::Interrupt | CatEvent::OutputClosed))
    }

    /// Dials, again and again while there is time, which each dial is given.
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
            // An attempt may take longer than it was to.
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

    /// Connects once; and when that was.
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

    /// Waits until it is known that the guest has taken a dial.
    ///
    /// hyperkit tells a refusal by EOF and nothing else, and a guest that boots says nothing for a
    /// while. But a guest answers dials in their order: when one behind ours, to a port that nobody
    /// can have, is refused, ours has been answered, too.
    fn is_taken(
        &self,
        stream: &Stream,
        vm: &HyperkitVm,
        deadline: Instant,
    ) -> Result<(), DialFailure> {
        // With `guest_forwards` alone there is nothing to probe with. And a VM that has gone ends
        // ours, too.
        let Ok(probe) = Stream::connect_timeout(&vm.probe_address().into(), DIAL) else {
            return self.is_refused(stream, LOOK);
        };
        let answered = self.is_answered(&probe, deadline);
        // However that went: a probe, too, is a dial that must not just be closed.
        let _ = probe.finish(LEAVE);
        if answered? {
            return self.is_refused(stream, Duration::ZERO);
        }
        let cause = io::Error::new(io::ErrorKind::TimedOut, "the guest doesn't answer");
        let error = Error::new(Operation::Connect, &self.plan.address, cause);
        Err(error.with_remedy("is it booting, paused or asleep?").into())
    }

    /// Waits for `timeout`, and fails if the guest ends the connection meanwhile.
    fn is_refused(&self, stream: &Stream, timeout: Duration) -> Result<(), DialFailure> {
        match stream.wait(Wanted::Readable, timeout) {
            Ok(true) if stream.has_ended() => Err(dial::refused_by_eof(&self.plan.address).into()),
            _ => Ok(()),
        }
    }

    /// Returns whether the guest ends the probe in time.
    fn is_answered(&self, probe: &Stream, deadline: Instant) -> Result<bool, DialFailure> {
        loop {
            if self.is_interrupted() {
                return Err(DialFailure::Interrupted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            // If the probe's socket fails, ours does, too, and tells why.
            if probe.wait(Wanted::Readable, left.min(LOOK)).unwrap_or(true) {
                return Ok(true);
            }
        }
    }
}

/// Tells of the end of standard output's reader. A write would say so, too, but only once something
/// has come.
fn watch_output(tell: Sender<CatEvent>) {
    let watch = move || {
        if crate::sys::wait_until_output_is_unread() {
            let _ = tell.send(CatEvent::OutputClosed);
        }
    };
    // Without a thread the next write tells of it.
    let _ = start_thread("hvsock-output", "to watch the output", watch);
}

/// Why a dial came to nothing.
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

/// How long one dial may take when it isn't to be tried again.
const DIAL: Duration = Duration::from_secs(30);

/// How long a dial of which only the end is wanted may take to be ended.
const LEAVE: Duration = Duration::from_secs(1);
