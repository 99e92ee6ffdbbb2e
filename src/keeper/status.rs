//! The status of a keeper, which is asked for through its status socket, a Unix socket in the state
//! directory of each VM that it keeps connections or ports of.
//!
//! Each line that a client sends is answered by one line of JSON:
//!
//! | line | what the keeper does | answer |
//! |---|---|---|
//! | `status` | nothing | [`KeeperStatus`] |
//! | `take INODE` | reserves the served port whose socket has that inode for this client, until it releases the port or disconnects | `{"done": BOOL}` |
//! | `release INODE` | accepts and ends who waits at that socket, then closes it | `{"done": BOOL}` |
//! | `end` | ends at once, and closes everything | `{"done": true}` |
//!
//! A keeper of any version is asked in the same way: fields are only ever added.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::sys::{self, Identity, Place, Process};

/// The name of a status socket is this, and the keeper's process id.
const PREFIX: &str = "hvsock-keeper.";

/// How long a keeper may take to answer. It answers at once, unless it is stopped or hangs.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long a proxy that is ending may take until its keeper knows that it has ended.
const LAST_MOMENTS: Duration = Duration::from_secs(1);

/// How long a proxy that was killed may take until it shows that it is ending.
const LAST_SIGNAL: Duration = Duration::from_millis(200);

/// The pause before the keeper is asked again.
const PAUSE: Duration = Duration::from_millis(5);

/// The status of a keeper.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
pub(crate) struct KeeperStatus {
    /// The version of its program.
    pub(crate) version: String,
    /// The version of the protocol that its proxy speaks with it.
    pub(crate) protocol: u32,
    /// Its process.
    pub(crate) pid: u32,
    /// The process of its proxy.
    pub(crate) proxy: u32,
    /// Whether that proxy has ended, so that it is the keeper which ends the connections.
    pub(crate) proxy_ended: bool,
    /// How many connections it keeps, of all VMs.
    pub(crate) connections: usize,
    /// How many it has closed though their guests went on sending.
    pub(crate) given_up: u64,
    /// The ports that it keeps, of all VMs.
    pub(crate) ports: Vec<KeptPort>,
}

/// A port that guests dial, and of which a keeper has the listening socket.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
pub(crate) struct KeptPort {
    pub(crate) port: u32,
    /// The path of the socket.
    pub(crate) path: PathBuf,
    /// The inode of the socket's file.
    pub(crate) socket: u64,
    pub(crate) state: PortState,
}

/// Who accepts at a kept port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize))]
#[cfg_attr(feature = "cli", serde(rename_all = "lowercase"))]
pub(crate) enum PortState {
    /// The proxy does.
    Held,
    /// The keeper does, and ends each connection gracefully.
    Serving,
}

impl PortState {
    fn name(self) -> &'static str {
        match self {
            PortState::Held => "held",
            PortState::Serving => "serving",
        }
    }
}

impl KeeperStatus {
    /// Returns it as one line of JSON, without the end of the line.
    pub(crate) fn to_json(&self) -> String {
        let port = |port: &KeptPort| {
            json!({
                "port": port.port,
                "path": port.path.to_string_lossy(),
                "socket": port.socket,
                "state": port.state.name(),
            })
        };
        json!({
            "version": self.version,
            "protocol": self.protocol,
            "pid": self.pid,
            "proxy": self.proxy,
            "proxy_ended": self.proxy_ended,
            "connections": self.connections,
            "given_up": self.given_up,
            "ports": self.ports.iter().map(port).collect::<Vec<_>>(),
        })
        .to_string()
    }

    /// Returns what a line of JSON says; `None` if it is not a keeper's.
    pub(crate) fn from_json(line: &str) -> Option<KeeperStatus> {
        let value: Value = serde_json::from_str(line).ok()?;
        let number = |value: &Value| value.as_u64().and_then(|it| u32::try_from(it).ok());
        let port = |value: &Value| {
            Some(KeptPort {
                port: number(&value["port"])?,
                path: value["path"].as_str()?.into(),
                socket: value["socket"].as_u64()?,
                state: match value["state"].as_str()? {
                    "held" => PortState::Held,
                    "serving" => PortState::Serving,
                    // A state of a later version.
                    _ => return None,
                },
            })
        };
        Some(KeeperStatus {
            version: value["version"].as_str()?.to_owned(),
            protocol: number(&value["protocol"])?,
            pid: number(&value["pid"])?,
            proxy: number(&value["proxy"])?,
            proxy_ended: value["proxy_ended"].as_bool()?,
            connections: usize::try_from(value["connections"].as_u64()?).ok()?,
            // Keepers of earlier versions gave none up.
            given_up: value["given_up"].as_u64().unwrap_or(0),
            ports: value["ports"].as_array()?.iter().filter_map(port).collect(),
        })
    }
}

/// Returns the answer to a line that asks for something.
pub(super) fn answer(done: bool) -> String {
    json!({ "done": done }).to_string()
}

/// Returns the path of the status socket of the keeper `pid`.
pub(crate) fn socket_path(directory: &Path, pid: u32) -> PathBuf {
    directory.join(format!("{PREFIX}{pid}"))
}

/// Returns the status of each keeper that lives and has a status socket in `directory`, in the
/// order of their processes. It waits for a keeper that hangs, at most two seconds; keepers of
/// other users are left out.
#[cfg(feature = "cli")]
pub(crate) fn query(directory: &Path) -> Vec<KeeperStatus> {
    let asked = clients(directory).into_iter();
    asked.map(|(_, status)| status).collect()
}

/// Returns the processes of the keepers that have a status socket in `directory`, or had one when
/// they were killed.
fn pids(directory: &Path) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return Vec::new();
    };
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            name.to_str()?.strip_prefix(PREFIX)?.parse().ok()
        })
        .collect();
    pids.sort_unstable();
    pids
}

/// Removes the status sockets of keepers that were killed when their proxies had ended, so that
/// nobody else has. One of another container, whose process is not known here, is asked by its
/// socket.
pub(super) fn remove_dead(directory: &Path) {
    for pid in pids(directory) {
        let path = socket_path(directory, pid);
        let Ok(place) = Place::of(&path) else {
            return;
        };
        let Ok(identity) = place.identity() else {
            continue;
        };
        // A keeper that has just begun may not listen yet, but its process is there.
        let has_ended = Process::new(pid).is_ending();
        if has_ended && matches!(sys::is_socket_alive(&path), Ok(false)) {
            let _ = place.remove(identity);
        }
    }
}

/// Connects to each of these keepers. Returns the status of each as well.
fn clients(directory: &Path) -> Vec<(Conversation, KeeperStatus)> {
    let ask = |pid| {
        let mut client = Conversation::connect(directory, pid).ok()?;
        let status = client.status().ok()?;
        Some((client, status))
    };
    pids(directory).into_iter().filter_map(ask).collect()
}

/// A port that a keeper serves and that this process has reserved, to bind its path anew.
#[derive(Debug)]
pub(crate) struct Taken {
    client: Conversation,
    inode: u64,
}

impl Taken {
    /// Takes the port whose socket is at `path`, if a keeper serves it. `None` if none does, such
    /// as when another proxy listens there. It waits for a proxy that may just be ending, at most a
    /// second, and for a keeper that hangs.
    pub(crate) fn take(path: &Path) -> Option<Taken> {
        let begun = Instant::now();
        let directory = path.parent()?;
        let inode = Identity::of(path).ok()?.inode();
        loop {
            let mut patience = Duration::ZERO;
            for (mut client, status) in clients(directory) {
                let Some(port) = status.ports.iter().find(|port| port.socket == inode) else {
                    continue;
                };
                match port.state {
                    PortState::Serving => {
                        let is_taken = client.ask(&format!("take {inode}"));
                        return is_taken
                            .is_ok_and(|is_taken| is_taken)
                            .then_some(Taken { client, inode });
                    }
                    // A process that was killed closes its files one after the other, some time
                    // after the signal.
                    PortState::Held => {
                        patience = match Process::new(status.proxy).is_ending() {
                            true => LAST_MOMENTS,
                            false => LAST_SIGNAL,
                        };
                    }
                }
            }
            if begun.elapsed() >= patience {
                return None;
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Has the keeper close the port, now that another socket has its path.
    pub(crate) fn release(mut self) {
        // If the keeper is gone, so is its socket; and it looks at the path by itself as well.
        let _ = self.client.ask(&format!("release {}", self.inode));
    }
}

/// Ends the keeper `pid`, which has a status socket in `directory`. It closes the connections that
/// it has, and its ports, so that a guest that dials one may hang its VM.
///
/// # Errors
/// Returns `NotFound` or `ConnectionRefused` if there is no such keeper; what the system says.
#[cfg(feature = "cli")]
pub(crate) fn end(directory: &Path, pid: u32) -> io::Result<()> {
    Conversation::connect(directory, pid)?.ask("end").map(drop)
}

/// A conversation with a keeper.
#[derive(Debug)]
pub(crate) struct Conversation(BufReader<UnixStream>);

impl Conversation {
    /// Connects to the keeper `pid`, which has a status socket in `directory`.
    ///
    /// # Errors
    /// Returns `NotFound` or `ConnectionRefused` if there is none; what the system says.
    pub(crate) fn connect(directory: &Path, pid: u32) -> io::Result<Conversation> {
        let path = socket_path(directory, pid);
        let stream = sys::with_short_path(&path, |short| UnixStream::connect(short))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Conversation(BufReader::new(stream)))
    }

    /// Asks the keeper for its status.
    ///
    /// # Errors
    /// Returns why there is no answer; `InvalidData` if it is not a keeper's.
    pub(crate) fn status(&mut self) -> io::Result<KeeperStatus> {
        let line = self.send("status")?;
        KeeperStatus::from_json(&line).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// Asks the keeper to do something. Returns whether it has.
    ///
    /// # Errors
    /// Returns why there is no answer.
    pub(crate) fn ask(&mut self, what: &str) -> io::Result<bool> {
        let line = self.send(what)?;
        let answer: Value = serde_json::from_str(&line).map_err(io::Error::from)?;
        Ok(answer["done"] == Value::Bool(true))
    }

    fn send(&mut self, line: &str) -> io::Result<String> {
        self.0.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        match self.0.read_line(&mut answer)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(answer),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn keepers_of_earlier_and_later_versions_are_understood() {
        let first = r#"{"version":"0.1.0","protocol":1,"pid":7,"proxy":6,"proxy_ended":true,
            "connections":2,"ports":[{"port":5000,"path":"/s/p","socket":9,"state":"serving"}]}"#;
        let status = KeeperStatus::from_json(first).unwrap();
        assert_eq!((status.pid, status.given_up), (7, 0));
        assert_eq!(status.ports[0].state, PortState::Serving);
        // One that says more, and has ports in a state that is not known here.
        let later = first.replace("\"pid\"", "\"more\":[1],\"pid\"").replace(
            "}]",
            "},{\"port\":1,\"path\":\"/s/q\",\"socket\":1,\"state\":\"resting\"}]",
        );
        assert_eq!(KeeperStatus::from_json(&later), Some(status.clone()));
        assert_eq!(KeeperStatus::from_json(&status.to_json()), Some(status));
        assert_eq!(KeeperStatus::from_json("{\"pid\":7}"), None);
    }
}
