//! What all calls need: the proxy, what the program supplies, and the state of a hand-over.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use serde::Serialize;
use tokio::sync::Semaphore;

use crate::proxy::Handle;

use super::super::added::AdditionRecords;
use super::super::endpoint::ServiceEndpoint;
use super::super::events::Events;
use super::super::handover::FailedForwards;
use super::super::handover::give::Finishing;
use super::super::inherited::Inherited;
use super::super::problem::ApiProblem;
use super::actions::Actions;

/// Answers requests.
#[derive(Debug)]
pub(crate) struct Api {
    pub(super) handle: Handle,
    pub(super) actions: Actions,
    /// The endpoints at which it is asked.
    pub(super) endpoints: Vec<Arc<ServiceEndpoint>>,
    pub(in super::super) events: Arc<Events>,
    pub(super) lanes: Lanes,
    pub(super) added: AdditionRecords,
    pub(super) handover: Mutex<HandoverState>,
    pub(super) inherited: Inherited,
    /// The connection to the process that has taken over, until this one ends.
    pub(super) finishing: Mutex<Option<Finishing>>,
    pub(super) started: Instant,
}

/// The state of a hand-over to another process.
#[derive(Debug, Default)]
pub(super) struct HandoverState {
    /// The process that was started for it, and may not take over any more.
    pub(super) given_up: Option<u32>,
    /// The process that is taking over, or has.
    pub(super) successor: Option<u32>,
    /// The forwards that it could not take.
    pub(super) failed: FailedForwards,
    pub(super) is_done: bool,
}

/// The queues of calls, one a kind. A call may block, and then holds up those of its own kind only:
/// the end can be asked for though a change hangs.
#[derive(Debug)]
pub(super) struct Lanes {
    pub(super) looks: Arc<Semaphore>,
    /// For changes, one at a time: what a change has checked stays true while it is made.
    pub(super) changes: Arc<Semaphore>,
    pub(super) stops: Arc<Semaphore>,
    /// For upgrades. They are no changes, since the process that is started asks for one.
    pub(super) upgrades: Arc<Semaphore>,
}

const LOOKS_AT_A_TIME: usize = 4;

/// The most calls at a time, of all kinds together.
pub(crate) const CALLS_AT_A_TIME: usize = LOOKS_AT_A_TIME + 3;

pub(super) type ApiResult = Result<(u16, String), ApiProblem>;

pub(super) fn json(status: u16, body: &impl Serialize) -> ApiResult {
    match serde_json::to_string_pretty(body) {
        Ok(text) => Ok((status, text + "\n")),
        Err(e) => Err(ApiProblem::new(500, format!("the answer is no JSON: {e}"))),
    }
}

impl Api {
    pub(crate) fn new(
        handle: Handle,
        actions: Actions,
        endpoints: Vec<Arc<ServiceEndpoint>>,
        events: Arc<Events>,
    ) -> Api {
        let lane = |count| Arc::new(Semaphore::new(count));
        Api {
            handle,
            actions,
            endpoints,
            events,
            lanes: Lanes {
                looks: lane(LOOKS_AT_A_TIME),
                changes: lane(1),
                stops: lane(1),
                upgrades: lane(1),
            },
            added: AdditionRecords::default(),
            handover: Mutex::default(),
            inherited: Inherited::default(),
            finishing: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Sets the ended connections of earlier processes, to be shown beside those of this one, and
    /// how these forwards were added.
    pub(crate) fn with_inherited(self, inherited: Inherited, added: AdditionRecords) -> Api {
        Api {
            inherited,
            added,
            ..self
        }
    }
}
