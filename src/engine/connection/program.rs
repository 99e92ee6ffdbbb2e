//! The program that a connection leads to (`exec:`). How it has ended is heard some time after the
//! end of its output, and so, as a rule, after both sides were closed: the report of the
//! connection's end waits for it, the sides do not.

use std::time::Duration;

use crate::engine::Phase;
use crate::engine::end_reason::{EndReason, ProgramFailure};
use crate::time::after;

use super::action::Context;
use super::closing_times::ClosingTimes;
use super::socket::ConnectionSocket;
use super::state::{Connection, Program, State};

/// How long a connection without sockets waits for the end of its program. One that has ended its
/// output ends itself within a millisecond, as a rule; one that goes on is not waited for.
const WAIT: Duration = Duration::from_secs(1);

impl<S: ConnectionSocket> Connection<S> {
    /// Notes that the target was connected: a program was started, if the rule leads to one. Its
    /// end may have been heard before.
    pub(super) fn note_program(&mut self) {
        if self.forward.rule.connect.transport().runs_program && self.program == Program::None {
            self.program = Program::Running;
        }
    }

    /// Takes the end of the program, and how it has failed, if it has.
    pub(crate) fn take_program_end(
        &mut self,
        failure: Option<ProgramFailure>,
        cx: &mut Context<'_, S>,
    ) {
        let before = std::mem::replace(&mut self.program, Program::Ended);
        if let Some(failure) = failure {
            self.end_because(EndReason::ProgramFailed(failure));
        }
        if let Program::Awaited(_) = before {
            self.close(cx);
        }
    }

    /// Returns whether the connection, which has no socket any more, goes on to wait for the end of
    /// its program.
    pub(super) fn awaits_program(&mut self, cx: &mut Context<'_, S>) -> bool {
        let until = match self.program {
            Program::None | Program::Ended => return false,
            _ if self.is_cut_off || cx.phase == Phase::Cutting => return false,
            Program::Running => after(cx.now, WAIT),
            Program::Awaited(until) => until,
        };
        if cx.now >= until {
            return false;
        }
        if self.program == Program::Running {
            self.program = Program::Awaited(until);
            self.enter(State::Closing {
                ends: [None, None],
                times: ClosingTimes::ending_at(Some(until)),
            });
            // What both sides had is given back in the next turn.
            cx.has_more_work = true;
        }
        self.wake_at = Some(until);
        true
    }
}
