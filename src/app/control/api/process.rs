//! The calls about the process: its status, a reload, its end.

use std::time::Duration;

use tracing::info;

use crate::app::output;
use crate::app::values::parse_time;

use super::super::model::Status;
use super::super::problem::ApiProblem;
use super::state::{Api, ApiResult, json};

impl Api {
    pub(super) fn status(&self) -> Status {
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

    pub(super) fn reload(&self) -> ApiResult {
        let Some(reload) = &self.actions.reload else {
            let problem = ApiProblem::new(409, "there is no file to read again");
            return Err(problem.with_remedy("`hvsock run CONFIG` has one"));
        };
        json(200, &reload()?)
    }

    pub(super) fn stop(&self, grace: Duration) -> ApiResult {
        info!("stopping, as was asked for");
        self.handle.stop(grace);
        let live = self.handle.live();
        (self.actions.stopping)(live, grace);
        let body = serde_json::json!({"live": live, "grace_seconds": grace.as_secs_f64()});
        json(202, &body)
    }

    /// Returns how long live connections may take, as the query says.
    pub(super) fn grace(&self, query: &[(String, String)]) -> Result<Duration, ApiProblem> {
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

/// Returns the problem that a call takes no such key in its query.
pub(super) fn unknown_key(key: &str) -> ApiProblem {
    ApiProblem::new(400, format!("nothing is called {key:?} here"))
}
