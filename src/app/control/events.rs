//! Reports events of connections, forwards and VMs as lines of JSON.
//!
//! Events of connections come from the proxy's observer, on the workers' threads. An event is put
//! into the queue of each reader, or is dropped and counted if the queue is full. Nothing waits for
//! a reader, and without readers nothing is done. The states of forwards and VMs are compared every
//! [`LOOK`] for each reader, so a change that lasts for less may not be reported.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use hyper::body::Bytes;
use serde::Serialize;
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::spawn_blocking;
use tokio::time::{MissedTickBehavior, interval};

use crate::lock::lock;
use crate::name::PeerProcess;
use crate::proxy::{Event, ForwardStatus, Handle, Observer, What};
use crate::time::unix;

use super::model::{ForwardInfo, ProgramFailed, address_of, refusal_of};

/// The most events in a reader's queue; each has some 200 bytes.
const QUEUE: usize = 4096;

/// The most lines that were taken from the queue and are not sent yet.
const AHEAD: usize = 16;

/// How often the states of forwards and VMs are compared.
const LOOK: Duration = Duration::from_millis(250);

/// A line: an event, with its time.
#[derive(Clone, Debug, Serialize)]
struct EventLine {
    #[serde(with = "unix")]
    time: SystemTime,
    #[serde(flatten)]
    what: ReportedEvent,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum ReportedEvent {
    /// The first line.
    Watching {
        version: &'static str,
        pid: u32,
    },
    ForwardUp(EventForward),
    ForwardDown {
        #[serde(flatten)]
        place: EventForward,
        why: String,
    },
    VmUp {
        vm: String,
    },
    VmGone {
        vm: String,
    },
    VmRestarted {
        vm: String,
    },
    ConnectionAccepted(EventClient),
    ConnectionConnected(EventClient),
    ConnectionRefused {
        #[serde(flatten)]
        client: EventClient,
        error: String,
    },
    ConnectionClosed {
        #[serde(flatten)]
        client: EventClient,
        sent: u64,
        received: u64,
        seconds: f64,
        why: &'static str,
        /// Why it was refused, if it was.
        refusal: Option<String>,
        #[serde(flatten)]
        program: ProgramFailed,
    },
    /// The reader was too slow, so this many events of connections were dropped.
    Dropped {
        count: u64,
    },
}

/// A forward.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct EventForward {
    forward: u64,
    name: Option<String>,
    listen: String,
    connect: String,
}

/// A connection, and its client.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct EventClient {
    connection: u64,
    forward: u64,
    peer: Option<String>,
    process: Option<EventProcess>,
}

/// The client's process, as in the status, but without its program, which needs a file to be read.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct EventProcess {
    pid: Option<u32>,
    user: u32,
}

impl From<PeerProcess> for EventProcess {
    fn from(process: PeerProcess) -> EventProcess {
        EventProcess {
            pid: process.id,
            user: process.user,
        }
    }
}

impl ReportedEvent {
    fn of(event: &Event<'_>) -> Option<ReportedEvent> {
        let client = EventClient {
            connection: event.connection.into(),
            forward: event.forward.into(),
            peer: address_of(event.peer),
            process: event.process.map(EventProcess::from),
        };
        Some(match event.what {
            What::Accepted => ReportedEvent::ConnectionAccepted(client),
            What::Connected => ReportedEvent::ConnectionConnected(client),
            What::Refused(error) => ReportedEvent::ConnectionRefused {
                client,
                error: error.to_string(),
            },
            What::Closed {
                sent,
                received,
                age,
                why,
            } => ReportedEvent::ConnectionClosed {
                client,
                sent,
                received,
                seconds: age.as_secs_f64(),
                why: why.name(),
                refusal: refusal_of(why),
                program: ProgramFailed::of(why),
            },
        })
    }
}

/// A reader's queue, and the number of events that found it full.
#[derive(Debug)]
struct Reader {
    queue: Sender<EventLine>,
    dropped: Arc<AtomicU64>,
}

/// The readers of a proxy's events.
#[derive(Debug, Default)]
pub(super) struct Events {
    readers: Mutex<Vec<Reader>>,
    /// The number of readers, to be read without the lock.
    count: AtomicUsize,
}

impl Events {
    fn lock(&self) -> MutexGuard<'_, Vec<Reader>> {
        lock(&self.readers)
    }

    /// Returns an observer that sends the events of a proxy's connections to the readers.
    pub(super) fn observer(self: &Arc<Events>) -> Observer {
        let events = Arc::clone(self);
        Observer::new(move |event| {
            if events.count.load(Ordering::Relaxed) > 0
                && let Some(told) = ReportedEvent::of(event)
            {
                events.send(told);
            }
        })
    }

    fn send(&self, what: ReportedEvent) {
        let line = EventLine {
            time: SystemTime::now(),
            what,
        };
        for reader in self.lock().iter() {
            if reader.queue.try_send(line.clone()).is_err() {
                reader.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Adds a reader. Returns its lines; it is removed when they are dropped.
    pub(super) fn read(self: &Arc<Events>, handle: &Handle) -> Receiver<Bytes> {
        let (queue, events) = channel(QUEUE);
        let (to, lines) = channel(AHEAD);
        let dropped = Arc::default();
        let reader = Reader {
            queue,
            dropped: Arc::clone(&dropped),
        };
        let mut readers = self.lock();
        readers.push(reader);
        self.count.store(readers.len(), Ordering::Relaxed);
        drop(readers);
        let (all, handle) = (Arc::clone(self), handle.clone());
        tokio::spawn(async move {
            write_lines(&handle, events, &dropped, &to).await;
            // Its queue is closed by now.
            all.forget_gone();
        });
        lines
    }

    fn forget_gone(&self) {
        let mut readers = self.lock();
        readers.retain(|it| !it.queue.is_closed());
        self.count.store(readers.len(), Ordering::Relaxed);
    }

    /// Ends the lines of all readers after the events that are queued.
    pub(super) fn close(&self) {
        self.count.store(0, Ordering::Relaxed);
        self.lock().clear();
    }
}

/// Writes a reader's lines until the reader has closed them or the events end.
async fn write_lines(
    handle: &Handle,
    mut events: Receiver<EventLine>,
    dropped: &AtomicU64,
    to: &Sender<Bytes>,
) {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut seen = Seen::default();
    let watching = ReportedEvent::Watching {
        version: env!("CARGO_PKG_VERSION"),
        pid: std::process::id(),
    };
    let now = |what| EventLine {
        time: SystemTime::now(),
        what,
    };
    let mut lines = vec![now(watching)];
    let mut is_over = false;
    loop {
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            lines.push(now(ReportedEvent::Dropped { count: lost }));
        }
        for line in lines.drain(..) {
            // Objects, strings and numbers can always be serialised.
            let mut text = serde_json::to_vec(&line).unwrap_or_default();
            text.push(b'\n');
            if to.send(text.into()).await.is_err() {
                return;
            }
        }
        if is_over {
            return;
        }
        tokio::select! {
            () = to.closed() => return,
            line = events.recv() => match line {
                Some(line) => {
                    lines.push(line);
                    continue;
                }
                None => is_over = true,
            },
            _ = looks.tick() => {}
        }
        // Getting the forwards may wait for a lock.
        let handle = handle.clone();
        let forwards = spawn_blocking(move || handle.forwards()).await;
        let news = seen.compare(&forwards.unwrap_or_default());
        lines.extend(news.into_iter().map(now));
    }
}

/// The states of forwards and VMs as last reported to a reader.
#[derive(Debug, Default)]
struct Seen {
    forwards: HashMap<u64, (EventForward, bool)>,
    vms: HashMap<String, (bool, u64)>,
}

impl Seen {
    /// Returns the events for the states that differ from the last ones.
    fn compare(&mut self, forwards: &[ForwardStatus]) -> Vec<ReportedEvent> {
        let mut news = Vec::new();
        let mut gone = std::mem::take(&mut self.forwards);
        for status in forwards {
            let forward = ForwardInfo::from(status);
            let place = EventForward {
                forward: status.id.into(),
                name: forward.name,
                listen: forward.listen,
                connect: forward.connect,
            };
            let is_up = !matches!(forward.state.as_str(), "lost" | "closed");
            let before = gone.remove(&place.forward);
            let now = (place.clone(), is_up);
            if before.as_ref() != Some(&now) {
                news.push(match is_up {
                    true => ReportedEvent::ForwardUp(place),
                    false => ReportedEvent::ForwardDown {
                        place,
                        why: forward
                            .why
                            .filter(|it| !it.is_empty())
                            .unwrap_or(forward.state),
                    },
                });
            }
            self.forwards.insert(status.id.into(), now);
            if let Some(vm) = forward.vm
                && let Some(is_up) = vm.status.up
            {
                let now = (is_up, vm.status.restarts);
                let before = self.vms.insert(vm.directory.clone(), now);
                let vm = vm.directory;
                news.extend(match before {
                    Some(before) if before == now => None,
                    Some((true, _)) if is_up => Some(ReportedEvent::VmRestarted { vm }),
                    _ if is_up => Some(ReportedEvent::VmUp { vm }),
                    Some((false, _)) => None,
                    _ => Some(ReportedEvent::VmGone { vm }),
                });
            }
        }
        let removed = gone.into_values().filter(|(_, was_up)| *was_up);
        news.extend(removed.map(|(place, _)| ReportedEvent::ForwardDown {
            place,
            why: "removed".to_owned(),
        }));
        news
    }
}
