//! The calls by which another process takes the place of this one.

use std::sync::{Arc, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::lock::lock;

use super::super::handover;
use super::super::handover::give::{Finishing, Successor};
use super::super::problem::ApiProblem;
use super::actions::Succession;
use super::state::{Api, ApiResult, HandoverState, json};

/// How long a process that was started may take to take over: a little less than hvsock's own
/// clients wait for an answer.
const UPGRADE: Duration = Duration::from_secs(9);

/// How often it is checked whether that has happened.
const LOOK: Duration = Duration::from_millis(10);

impl Api {
    /// Returns what a process needs to take over, or why none can.
    fn succession(&self) -> Result<&Succession, ApiProblem> {
        let Some(succession) = &self.actions.succession else {
            let problem = ApiProblem::new(
                409,
                "it was started without a file, and no other can take over from it",
            );
            return Err(problem
                .with_remedy("`hvsock run CONFIG` has one; stop this one, and start another"));
        };
        match self.handle.is_stopping() {
            true => Err(ApiProblem::new(503, "it is stopping")),
            false => Ok(succession),
        }
    }

    /// Begins to hand over to the process that asks for it.
    pub(super) fn take_over(self: &Arc<Api>, body: &[u8]) -> ApiResult {
        self.succession()?;
        let asked: handover::TakeOverRequest = serde_json::from_slice(body)
            .map_err(|e| ApiProblem::new(400, format!("that says nobody who takes over: {e}")))?;
        if asked.protocol != handover::PROTOCOL {
            let (theirs, ours) = (asked.protocol, handover::PROTOCOL);
            let why = format!("it hands over by version {ours} of the protocol, not by {theirs}");
            let problem = ApiProblem::new(409, why);
            return Err(problem.with_remedy("stop this hvsock, and start the other one"));
        }
        let successor = Successor::connect(&asked.socket)
            .map_err(|e| ApiProblem::new(400, format!("{}: {e}", asked.socket)))?;
        let api = Arc::clone(self);
        // The other can't take anything before it has its answer.
        let hand_over = move || api.hand_over(successor, asked.pid);
        thread::Builder::new()
            .name("hvsock-handover".to_owned())
            .spawn(hand_over)
            .map_err(|e| ApiProblem::new(500, format!("there can be no thread: {e}")))?;
        json(202, &serde_json::json!({"pid": std::process::id()}))
    }

    /// Returns the process that has taken over.
    pub(super) fn successor(&self) -> Option<u32> {
        let state = self.handover_state();
        state.successor.filter(|_| state.is_done)
    }

    fn handover_state(&self) -> MutexGuard<'_, HandoverState> {
        lock(&self.handover)
    }

    fn hand_over(&self, successor: Successor, pid: u32) {
        let Some(succession) = &self.actions.succession else {
            return;
        };
        let agree = || {
            let mut state = self.handover_state();
            let agreed = state.given_up != Some(pid);
            state.successor = agreed.then_some(pid);
            agreed
        };
        let (mut successor, mut finishing) = (Some(successor), None);
        (succession.while_unchanged)(&mut |listed| {
            let Some(successor) = successor.take() else {
                return;
            };
            match successor.give(&self.handle, &self.endpoints, listed, &self.added, agree) {
                Ok(left) => {
                    (succession.end)(pid);
                    for (name, why) in &left.failed {
                        warn!("process {pid} can't have forward {name} now: {why}");
                    }
                    let mut state = self.handover_state();
                    state.failed.clone_from(&left.failed);
                    state.is_done = true;
                    drop(state);
                    finishing = Some(left);
                }
                Err(e) => {
                    self.handover_state().successor = None;
                    warn!("process {pid} has not taken over ({e}); going on");
                }
            }
        });
        if let Some(left) = finishing {
            *self.finishing() = Some(left);
            while self.tell_successor() {
                thread::sleep(handover::TELL_PAUSE);
            }
        }
    }

    fn finishing(&self) -> MutexGuard<'_, Option<Finishing>> {
        lock(&self.finishing)
    }

    /// Sends what is new to the process that has taken over. Returns false once that one has ended.
    fn tell_successor(&self) -> bool {
        let mut finishing = self.finishing();
        let Some(wire) = &mut *finishing else {
            return false;
        };
        let is_told = wire.send_progress(&self.handle, self.ended()).is_ok();
        if !is_told {
            *finishing = None;
        }
        is_told
    }

    /// Sends the process that has taken over, if one has, the ends of the last connections. Nothing
    /// is sent after that.
    pub(crate) fn tell_successor_the_rest(&self) {
        self.tell_successor();
        *self.finishing() = None;
    }

    /// Starts another process, and answers when it has taken over.
    pub(super) fn upgrade(&self) -> ApiResult {
        let succession = self.succession()?;
        let fail = |why: String, remedy: &str| {
            // Whoever reads the log later is to know as well.
            warn!("the upgrade has failed: {why}; going on as before");
            let remedy = format!("this one goes on as before; {remedy}");
            ApiProblem::new(500, why).with_remedy(remedy)
        };
        let mut started = (succession.start)().map_err(|problem| {
            warn!("the upgrade has failed: {problem}; going on as before");
            let remedy = problem.remedy.clone().unwrap_or_default();
            problem.with_remedy(format!("this one goes on as before; {remedy}"))
        })?;
        let pid = started.child.id();
        info!("started process {pid} to take over");
        let end = Instant::now() + UPGRADE;
        loop {
            if let Some(pid) = self.successor() {
                let grace = (self.actions.grace)().as_secs_f64();
                let live = self.handle.live();
                let failed = self.handover_state().failed.clone();
                let told = serde_json::json!({"pid": pid, "live": live, "grace_seconds": grace, "failed": failed});
                return json(200, &told);
            }
            if let Ok(Some(status)) = started.child.try_wait() {
                if let [first, rest @ ..] = &started.reasons()[..] {
                    let why = format!("the new process {pid} has not taken over: {first}");
                    warn!("the upgrade has failed: {why}; going on as before");
                    rest.iter().for_each(|line| warn!("{line}"));
                    let mut lines = format!("{why}; this one goes on as before");
                    for line in rest {
                        lines += "\n";
                        lines += line;
                    }
                    return Err(ApiProblem::new(500, lines));
                }
                let why = format!("the new process {pid} has ended before it took over: {status}");
                return Err(fail(
                    why,
                    match status.code() {
                        Some(_) => {
                            "what the new one has said is where this one's standard error goes"
                        }
                        None => "something has killed the new one",
                    },
                ));
            }
            if Instant::now() >= end && self.give_up(pid) {
                let _ = started.child.kill();
                let _ = started.child.wait();
                let seconds = UPGRADE.as_secs();
                let why = format!(
                    "the new process {pid} has not taken over within {seconds} s, and was ended"
                );
                return Err(fail(
                    why,
                    "is the new program an hvsock, and does its start hang?",
                ));
            }
            thread::sleep(LOOK);
        }
    }

    /// Keeps other processes from taking over. Returns false if one already does.
    fn give_up(&self, pid: u32) -> bool {
        let mut state = self.handover_state();
        state.given_up = Some(pid);
        state.successor != Some(pid)
    }
}
