//! The calls of the control interface, and their answers.

use std::collections::HashSet;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use std::{fmt, thread};

use hyper::header::{ALLOW, HeaderValue};
use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use tracing::{info, warn};

use crate::address::Address;
use crate::app::needs::{Finding, Weight, look_at_access, look_at_targets};
use crate::app::output;
use crate::app::ranges::{BarePort, TAKEN_IN_RANGE, are_a_range, expand, name_of};
use crate::app::rule_options::RuleOptions;
use crate::app::values::{parse_local_addresses, parse_time};
use crate::error::counted;
use crate::lock::lock;
use crate::proxy::{ConnectionId, ForwardId, ForwardStatus, Handle, Rule};

use super::added::{Added, AdditionRecords};
use super::endpoint::{ServedInterface, ServiceEndpoint};
use super::events::Events;
use super::handover::give::{Finishing, Successor};
use super::handover::{self, FailedForwards};
use super::http::{HttpRequest, JSON, Response, lines, response};
use super::inherited::Inherited;
use super::lookup::ForwardLookup;
use super::metrics;
use super::model::{ConnectionInfo, EndedInfo, ForwardInfo, RuleBody, Status, read_rules};
use super::problem::ApiProblem;

/// What the program supplies to the server.
pub(crate) struct Actions {
    /// The default options of rules that are added.
    pub(crate) options: Box<dyn Fn() -> RuleOptions + Send + Sync>,
    /// The forwards that are wanted and can't be had now.
    pub(crate) pending: Box<dyn Fn() -> Vec<ForwardInfo> + Send + Sync>,
    /// Called when the end was asked for here, with the number of connections and how long they may
    /// take.
    pub(crate) stopping: fn(usize, Duration),
    /// Reads the configuration again, if there is one, and returns what has changed. No other
    /// change is made meanwhile.
    pub(crate) reload: Option<Reload>,
    /// How another process takes its place, if one can.
    pub(crate) succession: Option<Succession>,
    /// How long connections may take to finish unless a request says so.
    pub(crate) grace: Box<dyn Fn() -> Duration + Send + Sync>,
    /// Whether a forward to a program may be added.
    pub(crate) allows_exec: Box<dyn Fn() -> bool + Send + Sync>,
}

/// See [`Actions::reload`].
pub(crate) type Reload =
    Box<dyn Fn() -> std::result::Result<serde_json::Value, ApiProblem> + Send + Sync>;

/// How another process takes the place of this one.
pub(crate) struct Succession {
    /// The configuration file.
    pub(crate) file: PathBuf,
    /// The process that this one has taken over from.
    pub(crate) predecessor: Option<u32>,
    /// Calls its argument with the forwards that the file asks for, and prevents a reload
    /// meanwhile.
    pub(crate) while_unchanged: Box<WhileUnchanged>,
    /// Starts the program anew, so that it takes over.
    pub(crate) start: Box<dyn Fn() -> Result<Started, ApiProblem> + Send + Sync>,
    /// Ends this process, after the other has taken all its listeners.
    pub(crate) end: Box<dyn Fn(u32) + Send + Sync>,
}

/// A process that was started to take over.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
    /// Its standard error, which says why it doesn't take over.
    pub(crate) report: UnixStream,
}

impl Started {
    /// Returns the lines that it has written, once it has ended.
    fn reasons(mut self) -> Vec<String> {
        const MOST_BYTES: u64 = 64 * 1024;
        // Its own children may have the socket, too, and are not waited for.
        let _ = self.report.set_nonblocking(true);
        let mut said = Vec::new();
        let _ = (&mut self.report).take(MOST_BYTES).read_to_end(&mut said);
        let said = String::from_utf8_lossy(&said);
        said.lines().map(str::to_owned).collect()
    }
}

/// See [`Succession::while_unchanged`].
pub(crate) type WhileUnchanged = dyn Fn(&mut dyn FnMut(&HashSet<ForwardId>)) + Send + Sync;

impl fmt::Debug for Actions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Actions")
    }
}

/// Answers requests.
#[derive(Debug)]
pub(super) struct Api {
    handle: Handle,
    actions: Actions,
    /// The endpoints at which it is asked.
    endpoints: Vec<Arc<ServiceEndpoint>>,
    pub(super) events: Arc<Events>,
    lanes: Lanes,
    added: AdditionRecords,
    handover: Mutex<HandoverState>,
    inherited: Inherited,
    /// The connection to the process that has taken over, until this one ends.
    finishing: Mutex<Option<Finishing>>,
    started: Instant,
}

/// The state of a hand-over to another process.
#[derive(Debug, Default)]
struct HandoverState {
    /// The process that was started for it, and may not take over any more.
    given_up: Option<u32>,
    /// The process that is taking over, or has.
    successor: Option<u32>,
    /// The forwards that it could not take.
    failed: FailedForwards,
    is_done: bool,
}

/// The queues of calls, one a kind. A call may block, and then holds up those of its own kind only:
/// the end can be asked for though a change hangs.
#[derive(Debug)]
struct Lanes {
    looks: Arc<Semaphore>,
    /// For changes, one at a time: what a change has checked stays true while it is made.
    changes: Arc<Semaphore>,
    stops: Arc<Semaphore>,
    /// For upgrades. They are no changes, since the process that is started asks for one.
    upgrades: Arc<Semaphore>,
}

const LOOKS_AT_A_TIME: usize = 4;

/// How long a call may wait for its turn: half as long as hvsock's own clients wait for an answer.
const TURN: Duration = Duration::from_secs(5);

/// The most calls at a time, of all kinds together.
pub(super) const CALLS_AT_A_TIME: usize = LOOKS_AT_A_TIME + 3;

/// How long a process that was started may take to take over: a little less than hvsock's own
/// clients wait for an answer.
const UPGRADE: Duration = Duration::from_secs(9);

/// How often it is checked whether that has happened.
const LOOK: Duration = Duration::from_millis(10);

type ApiResult = Result<(u16, String), ApiProblem>;

fn json(status: u16, body: &impl Serialize) -> ApiResult {
    match serde_json::to_string_pretty(body) {
        Ok(text) => Ok((status, text + "\n")),
        Err(e) => Err(ApiProblem::new(500, format!("the answer is no JSON: {e}"))),
    }
}

/// Returns whether a call concerns the process and not what it carries.
fn is_for_this_machine(request: &HttpRequest) -> bool {
    matches!(
        request.path.as_str(),
        "/v1/stop" | "/v1/upgrade" | "/v1/take-over"
    )
}

impl Api {
    pub(super) fn new(
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
    pub(super) fn with_inherited(self, inherited: Inherited, added: AdditionRecords) -> Api {
        Api {
            inherited,
            added,
            ..self
        }
    }

    /// Answers on a thread that may block, when it is the request's turn. A request whose turn
    /// doesn't come soon is refused, since its client would have given up.
    pub(super) async fn answer(
        self: Arc<Api>,
        service: ServedInterface,
        request: HttpRequest,
    ) -> Response {
        if service != ServedInterface::Metrics
            && request.method == "GET"
            && request.path == EVENTS
            && request.query.is_empty()
        {
            // They go on for as long as their reader, and keep nobody else.
            return lines(self.events.read(&self.handle));
        }
        let lane = match (service, request.method.as_str(), request.path.as_str()) {
            (ServedInterface::Metrics, ..) | (_, "GET", _) => &self.lanes.looks,
            (_, _, "/v1/stop") => &self.lanes.stops,
            (_, _, "/v1/upgrade") => &self.lanes.upgrades,
            _ => &self.lanes.changes,
        };
        let Ok(turn) = timeout(TURN, Arc::clone(lane).acquire_owned()).await else {
            let problem = ApiProblem::new(503, "another call is under way, and takes long");
            return problem.with_remedy("try again later").response();
        };
        let api = Arc::clone(&self);
        let call = move || {
            // Until it is done, whoever waits for it.
            let _turn = turn;
            match service {
                ServedInterface::GuestControl if is_for_this_machine(&request) => ApiProblem::new(
                    403,
                    "guests can't end this process, or have another take its place",
                )
                .response(),
                ServedInterface::Control | ServedInterface::GuestControl => {
                    api.answer_all(&request)
                }
                ServedInterface::Metrics => api.answer_metrics(&request),
            }
        };
        let answered = spawn_blocking(call).await;
        answered
            .unwrap_or_else(|e| ApiProblem::new(500, format!("the call failed: {e}")).response())
    }

    fn answer_all(self: &Arc<Api>, request: &HttpRequest) -> Response {
        let path = request.path.as_str();
        let (method, query) = (request.method.as_str(), request.query.as_slice());
        let answer = match (method, path) {
            (_, "/metrics") => return self.answer_metrics(request),
            ("GET", "/v1/status") => refuse_query(query).and_then(|()| json(200, &self.status())),
            ("GET", "/v1/forwards") => {
                refuse_query(query).and_then(|()| json(200, &self.forwards()))
            }
            ("GET", "/v1/connections") => refuse_query(query)
                .and_then(|()| json(200, &ConnectionInfo::all(&self.handle.connections()))),
            ("GET", ENDED) => refuse_query(query).and_then(|()| {
                let mut ended = self.ended();
                EndedInfo::look_up_programs(&mut ended);
                json(200, &ended)
            }),
            ("POST", "/v1/forwards") => refuse_query(query).and_then(|()| self.add(&request.body)),
            ("POST", "/v1/reload") => refuse_query(query).and_then(|()| self.reload()),
            ("POST", "/v1/take-over") => {
                refuse_query(query).and_then(|()| self.take_over(&request.body))
            }
            ("POST", "/v1/upgrade") => refuse_query(query).and_then(|()| self.upgrade()),
            ("POST", "/v1/stop") => self.grace(query).and_then(|grace| self.stop(grace)),
            ("GET", EVENTS) => refuse_query(query).and_then(|()| Err(no_such_call(path))),
            (_, "/v1/status" | "/v1/connections" | ENDED | EVENTS) => return wrong_method("GET"),
            (_, "/v1/forwards") => return wrong_method("GET, POST"),
            (_, "/v1/reload" | "/v1/stop" | "/v1/take-over" | "/v1/upgrade") => {
                return wrong_method("POST");
            }
            _ if path.starts_with(CONNECTIONS) && method != "DELETE" => {
                return wrong_method("DELETE");
            }
            _ if path.starts_with(CONNECTIONS) => refuse_query(query)
                .and_then(|()| self.close(&path[CONNECTIONS.len()..], request.asked_by)),
            _ => match (path.strip_prefix("/v1/forwards/"), method) {
                (None | Some(""), _) => Err(no_such_call(path)),
                (Some(name), "GET") => refuse_query(query).and_then(|()| self.show(name)),
                (Some(name), "DELETE") => {
                    self.grace(query).and_then(|grace| self.remove(name, grace))
                }
                (Some(_), _) => return wrong_method("GET, DELETE"),
            },
        };
        match answer {
            Ok((status, body)) => response(status, JSON, body),
            Err(problem) => problem.response(),
        }
    }

    /// Answers where only the metrics are served.
    fn answer_metrics(&self, request: &HttpRequest) -> Response {
        match (request.method.as_str(), request.path.as_str()) {
            ("GET", "/metrics") => {
                response(200, metrics::CONTENT_TYPE, metrics::text(self.status()))
            }
            (_, "/metrics") => wrong_method("GET"),
            (_, path) => ApiProblem::new(404, format!("there is no {path} here"))
                .with_remedy("there is /metrics")
                .response(),
        }
    }

    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            file: self
                .actions
                .succession
                .as_ref()
                .map(|it| it.file.display().to_string()),
            predecessor: self
                .actions
                .succession
                .as_ref()
                .and_then(|it| it.predecessor),
            successor: self.successor(),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
            stopping: self.handle.is_stopping(),
            live: self.handle.live(),
            log_dropped: output::dropped(),
            carried: self.handle.carried(),
            forwards: self.forwards(),
            keeper: self.handle.keeper(),
            unserved: self
                .endpoints
                .iter()
                .filter_map(|it| it.trouble())
                .collect(),
        }
    }

    fn ended(&self) -> Vec<EndedInfo> {
        let own = self.handle.ended().iter().map(EndedInfo::from).collect();
        self.inherited.merge_with(own)
    }

    /// Returns whether a connection is among the last that have ended in this process.
    fn has_ended(&self, number: u64) -> bool {
        let ended = self.handle.ended();
        ended.iter().map(EndedInfo::from).any(|it| it.id == number)
    }

    fn forwards(&self) -> Vec<ForwardInfo> {
        // First: one that is carried at last just now has its row. It, and one that can't be
        // changed, have one only.
        let mut pending = (self.actions.pending)();
        let carried = self.handle.forwards();
        let is_carried = |it: &ForwardInfo| {
            let same = |other: &ForwardStatus| {
                other.rule.name == it.name && other.rule.listen.to_string() == it.listen
            };
            carried.iter().any(same)
        };
        pending.retain(|it| !is_carried(it));
        carried
            .iter()
            .map(ForwardInfo::from)
            .chain(pending)
            .collect()
    }

    fn forward(&self, name: &str) -> Result<ForwardInfo, ApiProblem> {
        let pending = self.pending(name);
        let carried = self.find(name).map(|it| ForwardInfo::from(&it));
        carried.or_else(|e| pending.ok_or(e))
    }

    /// Returns a forward, or those of a range that are there.
    fn show(&self, name: &str) -> ApiResult {
        let none = match self.forward(name) {
            Ok(found) => return json(200, &found),
            Err(none) => none,
        };
        let forwards = self.handle.forwards();
        let range = self.find_range(&forwards, name, none)?.into_iter();
        json(200, &range.map(ForwardInfo::from).collect::<Vec<_>>())
    }

    /// Returns the forward of that name or address that is wanted and can't be had now.
    fn pending(&self, name: &str) -> Option<ForwardInfo> {
        let mut pending = (self.actions.pending)().into_iter();
        pending.find(|it| it.name.as_deref() == Some(name) || it.listen == name)
    }

    /// Returns the forwards of that range, by its addresses or its name, that are wanted and can't
    /// be had now.
    fn pending_of_range(&self, name: &str) -> Vec<ForwardInfo> {
        let mut pending = (self.actions.pending)();
        match &expand(name, BarePort::Tcp).unwrap_or_default()[..] {
            [_, _, ..] => {
                let addresses = parse_local_addresses(name).unwrap_or_default();
                let addresses: HashSet<String> = addresses.iter().map(Address::to_string).collect();
                pending.retain(|it| addresses.contains(&it.listen));
            }
            _ => pending.retain(|it| {
                let listen = it.listen.parse().ok();
                listen.is_some_and(|listen| it.name == Some(name_of(name, &listen)))
            }),
        }
        pending
    }

    /// Returns the forward of that name, or else that listens there, or else that has this id, or
    /// else the only one that listens on this TCP port.
    fn find(&self, name: &str) -> Result<ForwardStatus, ApiProblem> {
        let forwards = self.handle.forwards();
        ForwardLookup::new(&forwards).find(name).cloned()
    }

    /// Adds a forward, or those of a range: all of them, or none.
    fn add(&self, body: &[u8]) -> ApiResult {
        let usual = (self.actions.options)();
        let rules = read_rules(body, usual.clone())?;
        if let Some(finding) = rules.iter().find_map(|it| look_at_access(it, &usual)) {
            return Err(problem_of_finding(finding));
        }
        let forwards = self.handle.forwards();
        let asked = rules.len();
        let lookup = ForwardLookup::new(&forwards);
        let there = rules.iter().map(|rule| self.find_same(rule, &lookup));
        let there: Vec<Option<ForwardId>> = there.collect::<Result<_, _>>()?;
        let lacking = rules
            .iter()
            .zip(&there)
            .filter(|(_, there)| there.is_none());
        let lacking: Vec<Rule> = lacking.map(|(rule, _)| rule.clone()).collect();
        look_at_targets_of(&lacking)?;
        let (mut ids, mut new) = (Vec::new(), Vec::new());
        for (rule, there) in rules.into_iter().zip(there) {
            if let Some(id) = there {
                ids.push(id);
                continue;
            }
            match self.handle.add(rule) {
                Ok(id) => {
                    ids.push(id);
                    new.push(id);
                }
                Err(e) => {
                    for id in new {
                        // That it is gone already is as good.
                        let _ = self.handle.remove(id, Duration::ZERO);
                    }
                    let is_taken = e.kind() == io::ErrorKind::AddrInUse;
                    let mut problem = ApiProblem::from(e);
                    if asked > 1 {
                        if is_taken {
                            problem = problem.with_remedy(TAKEN_IN_RANGE);
                        }
                        let all = counted(asked as u64, "forward");
                        problem.error += &format!(" (so that none of the {all} is added)");
                    }
                    return Err(problem);
                }
            }
        }
        let forwards = self.handle.forwards();
        self.added.note(&ids, &new, &forwards);
        let lookup = ForwardLookup::new(&forwards);
        let are_new: HashSet<ForwardId> = new.iter().copied().collect();
        let added = ids.iter().filter_map(|id| {
            let added = lookup.of_id(*id)?;
            if are_new.contains(id) {
                info!("added {}", describe(added));
            }
            Some(ForwardInfo::from(added))
        });
        let added: Vec<ForwardInfo> = added.collect();
        let status = if new.is_empty() { 200 } else { 201 };
        match &added[..] {
            [] => Err(ApiProblem::new(
                409,
                "it was removed at once by somebody else",
            )),
            [one] if asked == 1 => json(status, one),
            all => json(status, &all),
        }
    }

    /// Returns the forwards of a range, which is written as an address or by its name. For forwards
    /// that weren't added by the control socket it is not known whether they were a range; they
    /// count as one if they look like one.
    ///
    /// # Errors
    /// Why the range is none; that none of it is there: `none`.
    fn find_range<'a>(
        &self,
        forwards: &'a [ForwardStatus],
        name: &str,
        none: ApiProblem,
    ) -> Result<Vec<&'a ForwardStatus>, ApiProblem> {
        let addresses = expand(name, BarePort::Tcp).map_err(|why| ApiProblem::new(400, why))?;
        if addresses.len() > 1 {
            let lookup = ForwardLookup::new(forwards);
            let found = addresses.iter().filter_map(|it| lookup.find(it).ok());
            let found: Vec<_> = found.collect();
            return if found.is_empty() {
                Err(none)
            } else {
                Ok(found)
            };
        }
        let is_named =
            |it: &&ForwardStatus| it.rule.name.as_ref() == Some(&name_of(name, &it.listen));
        let alike: Vec<_> = forwards.iter().filter(is_named).collect();
        let is_unknown = |it: &ForwardStatus| self.added.of(it.id).is_none();
        let is_of_range = |it: &ForwardStatus| self.added.of(it.id) == Some(Added::InRange);
        let unknown = alike.iter().filter(|it| is_unknown(it));
        let unknown: Vec<_> = unknown.map(|it| (&it.listen, &it.rule.connect)).collect();
        // One that can't be had now leaves a gap.
        let pending = self.pending_of_range(name).into_iter();
        let ends = |it: ForwardInfo| Some((it.listen.parse().ok()?, it.connect.parse().ok()?));
        let pending: Vec<(Address, Address)> = pending.filter_map(ends).collect();
        let pending = pending.iter().map(|(listen, connect)| (listen, connect));
        let unknown_are_meant = are_a_range(&unknown)
            || are_a_range(&[&unknown[..], &pending.collect::<Vec<_>>()].concat());
        let is_meant = |it: &&ForwardStatus| is_of_range(it) || unknown_are_meant && is_unknown(it);
        let (meant, others): (Vec<_>, Vec<_>) = alike.into_iter().partition(is_meant);
        match (&meant[..], &others[..]) {
            ([], []) => Err(none),
            ([], [one]) => {
                let remedy = format!("{} is no part of a range: give this name", label(one));
                Err(none.with_remedy(remedy))
            }
            ([], [first, .., last]) => Err(none.with_remedy(format!(
                "{} to {} are no range: give each by its own name",
                label(first),
                label(last)
            ))),
            _ => Ok(meant),
        }
    }

    /// Returns the forward that does what a rule asks for, if one does.
    ///
    /// # Errors
    /// That the rule can't be carried beside the forwards that are there, or may not be.
    fn find_same(
        &self,
        rule: &Rule,
        forwards: &ForwardLookup<'_>,
    ) -> Result<Option<ForwardId>, ApiProblem> {
        let named = rule.name.as_deref().and_then(|name| forwards.named(name));
        if let Some(there) = named.or_else(|| forwards.listening_on(&rule.listen)) {
            if there.rule == *rule {
                return Ok(Some(there.id));
            }
            let name = label(there);
            let differs = RuleBody::from(&there.rule).difference(&RuleBody::from(rule));
            let problem =
                ApiProblem::new(409, format!("another forward is there, {name}: {differs}"));
            return Err(problem
                .with_remedy("remove that one first, or take another name and another address"));
        }
        if rule.connect.transport().runs_program && !(self.actions.allows_exec)() {
            let why = format!(
                "{}: no program may be started by who asks here",
                rule.connect
            );
            let remedy = "write allow-exec = true in the file of `hvsock run`, or start it with --allow-exec";
            return Err(ApiProblem::new(403, why).with_remedy(remedy));
        }
        Ok(None)
    }

    /// Removes a forward, or those of a range that are there.
    fn remove(&self, name: &str, grace: Duration) -> ApiResult {
        let pending = self.pending(name);
        let forwards = self.handle.forwards();
        let none = match ForwardLookup::new(&forwards).find(name) {
            Ok(found) => {
                self.handle.remove(found.id, grace)?;
                info!("removed {}", describe(found));
                return json(200, &ForwardInfo::from(found));
            }
            Err(none) => none,
        };
        if let Some(it) = pending {
            return Err(self.not_carried(name, it));
        }
        let range = self.find_range(&forwards, name, none);
        let range = range.map_err(|none| {
            let first = self.pending_of_range(name).into_iter().next();
            first.map_or(none, |it| self.not_carried(name, it))
        })?;
        for found in &range {
            self.handle.remove(found.id, grace)?;
            info!("removed {}", describe(found));
        }
        let removed: Vec<ForwardInfo> = range.into_iter().map(ForwardInfo::from).collect();
        json(200, &removed)
    }

    /// Returns why a forward that is wanted and can't be had now is not removed.
    fn not_carried(&self, name: &str, it: ForwardInfo) -> ApiProblem {
        let why = it.why.unwrap_or(it.state);
        let problem = ApiProblem::new(409, format!("{name:?} isn't carried: {why}"));
        problem.with_remedy(match self.actions.reload {
            Some(_) => "the file asks for it: take it out there, and reload",
            None => "it was asked for at the start, and is tried again",
        })
    }

    fn close(&self, id: &str, asked_by: Option<u32>) -> ApiResult {
        let remedy = "`hvsock connections` lists those that there are";
        let number = id.parse().map_err(|_| {
            let problem = ApiProblem::new(404, format!("there is no connection {id:?}"));
            problem.with_remedy(remedy)
        })?;
        let closed = self
            .handle
            .close(ConnectionId(number))
            .map_err(|e| match e.kind() {
                io::ErrorKind::NotFound if self.has_ended(number) => {
                    ApiProblem::new(404, format!("connection {number} has ended"))
                        .with_remedy("`hvsock connections --ended` says why")
                }
                io::ErrorKind::NotFound => {
                    ApiProblem::new(404, format!("there is no connection {number}"))
                        .with_remedy(remedy)
                }
                _ => e.into(),
            })?;
        let closed = ConnectionInfo::all(&[closed]);
        for it in &closed {
            let status = self.status();
            info!(
                "closing connection {number} of {}, from {}: {}",
                status.name_of(it.forward),
                it.peer_in_words(),
                match asked_by {
                    Some(pid) => format!("process {pid} asked for it"),
                    None => "that was asked for".to_owned(),
                }
            );
        }
        json(200, &closed.first())
    }

    fn reload(&self) -> ApiResult {
        let Some(reload) = &self.actions.reload else {
            let problem = ApiProblem::new(409, "there is no file to read again");
            return Err(problem.with_remedy("`hvsock run CONFIG` has one"));
        };
        json(200, &reload()?)
    }

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
    fn take_over(self: &Arc<Api>, body: &[u8]) -> ApiResult {
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
    fn successor(&self) -> Option<u32> {
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
    pub(super) fn tell_successor_the_rest(&self) {
        self.tell_successor();
        *self.finishing() = None;
    }

    /// Starts another process, and answers when it has taken over.
    fn upgrade(&self) -> ApiResult {
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

    fn stop(&self, grace: Duration) -> ApiResult {
        info!("stopping, as was asked for");
        self.handle.stop(grace);
        let live = self.handle.live();
        (self.actions.stopping)(live, grace);
        let body = serde_json::json!({"live": live, "grace_seconds": grace.as_secs_f64()});
        json(202, &body)
    }

    /// Returns how long live connections may take, as the query says.
    fn grace(&self, query: &[(String, String)]) -> Result<Duration, ApiProblem> {
        let mut grace = (self.actions.grace)();
        for (key, value) in query {
            if key != "grace" {
                return Err(unknown_key(key));
            }
            let wrong = |why| ApiProblem::new(400, format!("grace: {why}"));
            grace = parse_time(value).map_err(wrong)?;
        }
        Ok(grace)
    }
}

/// The path below which each connection has one of its own.
const CONNECTIONS: &str = "/v1/connections/";

const ENDED: &str = "/v1/connections/ended";

const EVENTS: &str = "/v1/events";

/// Logs what the targets of rules lack now, and refuses a target that can never work.
fn look_at_targets_of(rules: &[Rule]) -> Result<(), ApiProblem> {
    let findings = look_at_targets(rules).unwrap_or_else(|why| {
        warn!("the targets were not looked at: {why}");
        Vec::new()
    });
    for finding in findings {
        match finding.weight {
            Weight::Mistake => return Err(problem_of_finding(finding)),
            Weight::Note => warn!("{finding}"),
        }
    }
    Ok(())
}

fn problem_of_finding(finding: Finding) -> ApiProblem {
    ApiProblem::new(400, finding.what).with_remedy(finding.remedy)
}

/// Describes a forward on one line: its name, if it has one, and both its addresses.
fn describe(forward: &ForwardStatus) -> String {
    let name = forward.rule.name.as_ref();
    let name = name.map_or(String::new(), |name| format!("{name:?}: "));
    format!("{name}{} -> {}", forward.listen, forward.rule.connect)
}

/// Returns what a forward is called.
fn label(forward: &ForwardStatus) -> String {
    match &forward.rule.name {
        Some(name) => format!("{name:?}"),
        None => forward.listen.to_string(),
    }
}

fn refuse_query(query: &[(String, String)]) -> Result<(), ApiProblem> {
    match query.first() {
        None => Ok(()),
        Some((key, _)) => Err(unknown_key(key)),
    }
}

fn unknown_key(key: &str) -> ApiProblem {
    ApiProblem::new(400, format!("nothing is called {key:?} here"))
}

const CALLS: &str = "there are GET /v1/status, GET and POST /v1/forwards, GET and DELETE /v1/forwards/NAME, \
    GET /v1/events, GET /v1/connections, GET /v1/connections/ended, DELETE /v1/connections/ID, POST /v1/reload, POST /v1/take-over, POST /v1/upgrade, POST /v1/stop, \
    GET /metrics";

fn no_such_call(path: &str) -> ApiProblem {
    ApiProblem::new(404, format!("there is no {path:?} here")).with_remedy(CALLS)
}

fn wrong_method(allow: &'static str) -> Response {
    let mut response = ApiProblem::new(405, format!("that takes {allow}")).response();
    let allow = HeaderValue::from_static(allow);
    response.headers_mut().insert(ALLOW, allow);
    response
}
