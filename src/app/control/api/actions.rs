//! What the program supplies to the server: the changes that are its own.

use std::collections::HashSet;
use std::fmt;
use std::io::Read as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::time::Duration;

use crate::app::rule_options::RuleOptions;
use crate::proxy::ForwardId;

use super::super::model::ForwardInfo;
use super::super::problem::ApiProblem;

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
    pub(super) fn reasons(mut self) -> Vec<String> {
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
