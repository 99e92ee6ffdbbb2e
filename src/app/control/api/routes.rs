//! Which call a request makes, when its turn comes, and who may make it.

use std::sync::Arc;
use std::time::Duration;

use hyper::header::{ALLOW, HeaderValue};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use super::super::endpoint::ServedInterface;
use super::super::http::{HttpRequest, JSON, Response, lines, response};
use super::super::metrics;
use super::super::model::{ConnectionInfo, EndedInfo};
use super::super::problem::ApiProblem;
use super::process::unknown_key;
use super::state::{Api, json};

/// How long a call may wait for its turn: half as long as hvsock's own clients wait for an answer.
const TURN: Duration = Duration::from_secs(5);

/// The path below which each connection has one of its own.
const CONNECTIONS: &str = "/v1/connections/";

const ENDED: &str = "/v1/connections/ended";

const EVENTS: &str = "/v1/events";

/// The calls that there are, for a person who has asked for another.
const CALLS: &str = "there are GET /v1/status, GET and POST /v1/forwards, GET and DELETE /v1/forwards/NAME, \
    GET /v1/events, GET /v1/connections, GET /v1/connections/ended, DELETE /v1/connections/ID, POST /v1/reload, POST /v1/take-over, POST /v1/upgrade, POST /v1/stop, \
    GET /metrics";

impl Api {
    /// Answers on a thread that may block, when it is the request's turn. A request whose turn
    /// doesn't come soon is refused, since its client would have given up.
    pub(crate) async fn answer(
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
}

/// Returns whether a call concerns the process and not what it carries.
fn is_for_this_machine(request: &HttpRequest) -> bool {
    matches!(
        request.path.as_str(),
        "/v1/stop" | "/v1/upgrade" | "/v1/take-over"
    )
}

fn refuse_query(query: &[(String, String)]) -> Result<(), ApiProblem> {
    match query.first() {
        None => Ok(()),
        Some((key, _)) => Err(unknown_key(key)),
    }
}

fn no_such_call(path: &str) -> ApiProblem {
    ApiProblem::new(404, format!("there is no {path:?} here")).with_remedy(CALLS)
}

fn wrong_method(allow: &'static str) -> Response {
    let mut response = ApiProblem::new(405, format!("that takes {allow}")).response();
    let allow = HeaderValue::from_static(allow);
    response.headers_mut().insert(ALLOW, allow);
    response
}
