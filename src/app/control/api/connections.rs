//! The calls about connections.

use std::io;

use tracing::info;

use crate::proxy::ConnectionId;

use super::super::model::{ConnectionInfo, EndedInfo};
use super::super::problem::ApiProblem;
use super::state::{Api, ApiResult, json};

impl Api {
    pub(super) fn ended(&self) -> Vec<EndedInfo> {
        let own = self.handle.ended().iter().map(EndedInfo::from).collect();
        self.inherited.merge_with(own)
    }

    /// Returns whether a connection is among the last that have ended in this process.
    fn has_ended(&self, number: u64) -> bool {
        let ended = self.handle.ended();
        ended.iter().map(EndedInfo::from).any(|it| it.id == number)
    }

    pub(super) fn close(&self, id: &str, asked_by: Option<u32>) -> ApiResult {
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
}
