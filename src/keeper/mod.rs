//! The keeper: a small process that keeps a hyperkit VM whole when its proxy is gone.
//!
//! A proxy that is killed, or that crashes, closes its connections unread, which can kill the VM;
//! and a port that the guest dials and on which nobody listens any more can hang it. So the proxy
//! gives a copy of each VM connection, and of each socket at which guests dial, to a keeper. While
//! the proxy lives, the keeper waits and does nothing. When the proxy has ended, by whatever means,
//! it half-closes each connection, reads it to its EOF and closes it; and it accepts what the guest
//! dials and ends that in the same way, until another proxy has bound the port anew, or the VM has
//! ended. Then it ends.
//!
//! ```no_run
//! use hvsock::ProxyConfig;
//! use hvsock::keeper::Keeper;
//!
//! // At the very beginning of the program's `main`:
//! if std::env::args_os().nth(1).is_some_and(|it| it == "keeper") {
//!     std::process::exit(hvsock::keeper::serve());
//! }
//! // And where it configures its proxy, have it start itself as `PROGRAM keeper VERSION`:
//! let mut config = ProxyConfig::new(Vec::new());
//! config.keeper = Some(Keeper::new(std::env::current_exe()?).arg("keeper"));
//! # Ok::<(), std::io::Error>(())
//! ```

mod copies;
mod ending;
mod link;
mod ports;
mod process;
mod protocol;
pub(crate) mod status;

use std::ffi::OsString;
use std::path::PathBuf;

pub(crate) use copies::When;
pub(crate) use link::{DESCRIPTORS, Kept, Link, View};
pub(crate) use protocol::GuestPort;
pub(crate) use status::Taken;

/// The program that a proxy starts as its keeper. It must call [`serve`] when it is started with
/// these arguments, and do nothing before that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keeper {
    program: PathBuf,
    arguments: Vec<OsString>,
    /// The name that process lists show, if it is not the program's.
    name: Option<OsString>,
}

impl Keeper {
    /// Makes a keeper of a program, which is started without arguments but the version of the
    /// protocol.
    pub fn new(program: impl Into<PathBuf>) -> Keeper {
        Keeper {
            program: program.into(),
            arguments: Vec::new(),
            name: None,
        }
    }

    /// Makes the keeper of the command: the program that runs now, whatever is at its path by then.
    ///
    /// # Errors
    /// Returns the system's error if that can't be found out.
    #[cfg(feature = "cli")]
    pub(crate) fn of_this_program() -> std::io::Result<Keeper> {
        let program = match cfg!(target_os = "linux") {
            true => PathBuf::from("/proc/self/exe"),
            false => std::env::current_exe()?,
        };
        let mut keeper = Keeper::new(program).arg("keeper");
        keeper.name = Some("hvsock".into());
        Ok(keeper)
    }

    /// Adds an argument before the version of the protocol, which is the last.
    pub fn arg(mut self, argument: impl Into<OsString>) -> Keeper {
        self.arguments.push(argument.into());
        self
    }
}

/// The state of a proxy's keeper, as the proxy knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Deserialize, serde::Serialize))]
#[non_exhaustive]
pub struct LinkStatus {
    /// The keeper's process, if it runs.
    pub pid: Option<u32>,
    /// How many connections the keeper has a copy of.
    pub connections: usize,
    /// How many ports that guests dial the keeper has a copy of.
    pub ports: usize,
    /// How many connections and ports it should have a copy of and has not: it runs no more, or
    /// has not taken them yet. They are given to it as soon as possible.
    pub unguarded: usize,
    /// How often a keeper has ended and was replaced by another.
    pub restarts: u64,
    /// Why there is no keeper, if there is none.
    pub trouble: Option<String>,
}

/// Runs as a keeper, with the last argument of the process as the version of the protocol. Returns
/// the exit code of the process, once there is nothing left to keep.
///
/// The process leaves its session and ignores SIGHUP, SIGINT, SIGQUIT, SIGTERM and SIGPIPE; all its
/// descriptors but the standard ones are closed.
pub fn serve() -> i32 {
    let last = std::env::args_os().next_back();
    process::run(last.and_then(|it| it.into_string().ok()).as_deref())
}
