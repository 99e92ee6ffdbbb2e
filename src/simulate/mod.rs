//! A stand-in for a hyperkit VM: its state directory over real Unix sockets, its frailties
//! included.
//!
//! It lets anyone try and test a proxy without a Mac, and lets tests prove that the proxy never
//! kills a VM. What it imitates is hyperkit's vsock device (`pci_virtio_sock.c`) with a Linux guest
//! behind it: the `connect` socket and its line of 18 bytes, the `guest_forwards` sockets, the
//! guest's dials to `00000002.PORT`, half-close both ways, slots, backpressure, and all that kills
//! or hangs the device ([`Rule`]). [`Vm::behind_socket`] is one of another VMM, such as
//! Firecracker's. It shares no code with the proxy.
//!
//! ```
//! use hvsock::simulate::{Service, Vm};
//!
//! let dir = tempfile::tempdir()?;
//! let vm = Vm::builder(dir.path()).guest(80, Service::Http).start()?;
//! // … use it as a state directory, then see that the VM has survived:
//! assert!(vm.fate().is_none(), "{:?}", vm.fate());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod buffer;
mod chargen;
mod closed;
mod connection;
mod counters;
mod device;
mod dial;
mod directory;
mod guest;
mod handshake;
mod http;
pub(crate) mod judge;
mod mux;
mod plan;
pub(crate) mod rules;
mod slots;

pub use counters::Counters;
pub use dial::Dial;
pub use guest::{Endpoint, Program, Service};
pub use rules::{Fate, FateKind, Rule};

use crate::error::{Error, Operation, Result};
use crate::hyperkit;
use crate::lock::recover;
use crate::sys;
use crate::time::after;
use device::{Command, Device};
use dial::{DialListener, Paced};
use plan::{Mux, Plan, Shared};
use rules::{FAILED_DIALS, Strictness};
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The descriptors that the device itself uses: of 1,024 (`FD_SETSIZE`) it has 1,013 for
/// connections, of 256 only 245.
const OWN_DESCRIPTORS: usize = 11;

/// How long [`Vm::dial`] waits for a guest that is paused.
const PATIENCE: Duration = Duration::from_secs(35);

/// How often [`Vm::wait_for_listener`] looks.
const LOOK: Duration = Duration::from_millis(5);

/// hyperkit's `VTSOCK_MAXFWDS`.
const MAX_FORWARDS: usize = 4;

/// A VM to be started.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    plan: Plan,
    dials: Vec<(u32, Dial)>,
}

impl Builder {
    /// Sets the guest's CID; 3 by default.
    pub fn cid(mut self, cid: u32) -> Builder {
        self.plan.cid = cid;
        self
    }

    /// Sets the VM's name, which its web pages show; the directory's name by default.
    pub fn name(mut self, name: impl Into<String>) -> Builder {
        self.plan.name = name.into();
        self
    }

    /// Sets whether a VMM with a socket for all ports lets one direction go on when the other has
    /// ended. By default the host's half-close ends both, and the guest's is not passed on, as with
    /// Firecracker. hyperkit always does ([`Vm::behind_socket`]).
    pub fn half_close(mut self, half_close: bool) -> Builder {
        if let Some(mux) = &mut self.plan.mux {
            mux.half_close = half_close;
        }
        self
    }

    /// Sets what listens on `port` of the guest. A port without a service refuses.
    pub fn guest(mut self, port: u32, service: Service) -> Builder {
        self.plan.services.insert(port, service);
        self
    }

    /// Sets the guest ports that have a socket of their own (`guest_forwards=`), at most four.
    pub fn guest_forwards(mut self, ports: &[u32]) -> Builder {
        self.plan.forwards = ports.to_vec();
        self
    }

    /// Adds what makes the guest dial `port` of the host.
    pub fn dial(mut self, port: u32, dial: Dial) -> Builder {
        self.dials.push((port, dial));
        self
    }

    /// Sets how many connections the device takes; others are closed at once. 1,013 by default, as
    /// with hyperkit, and at most 1,024.
    pub fn slots(mut self, slots: usize) -> Builder {
        self.plan.slots = slots;
        self
    }

    /// Sets the process's limit of descriptors (256 is macOS' default): 11 fewer connections work.
    /// For the rest see [`loses_clients`](Builder::loses_clients).
    pub fn descriptor_limit(mut self, limit: usize) -> Builder {
        self.plan.descriptors = Some(limit.saturating_sub(OWN_DESCRIPTORS));
        self
    }

    /// Sets whether a client without a descriptor is lost, as with macOS' `accept`, which closes
    /// the connection, or waits, as with Linux'. By default what this system does.
    pub fn loses_clients(mut self, loses: bool) -> Builder {
        self.plan.loses_clients = loses;
        self
    }

    /// Sets whether the VM punishes more than hyperkit's device was seen to: any close with data
    /// unread, and one up to 20 ms after a dial ([`Rule`]). A proxy that pleases a strict VM is
    /// orderly at every end.
    pub fn strict(mut self, strict: bool) -> Builder {
        self.plan.strictness = match strict {
            true => Strictness::Strict,
            false => Strictness::Measured,
        };
        self
    }

    /// Sets how many dials of the guest that come to nothing hang the device, since the VM's start;
    /// 3 by default, and at least 1. hyperkit's was seen to hang after 1 to some thousand.
    pub fn failed_dials(mut self, limit: u64) -> Builder {
        self.plan.failed_dials = limit;
        self
    }

    /// Sets how many slots each reboot of the guest takes for good, of those taken then; 1 by
    /// default. hyperkit's device was seen to lose 1 or 2.
    pub fn lost_at_reboot(mut self, slots: usize) -> Builder {
        self.plan.lost_at_reboot = slots;
        self
    }

    /// Sets how many connections may queue before the device accepts them. 4,096 by default, Linux'
    /// `SOMAXCONN`; macOS has 128.
    pub fn backlog(mut self, backlog: u16) -> Builder {
        self.plan.backlog = backlog.into();
        self
    }

    /// Sets the name of the `connect` socket (hyperkit's `CONNECT_SOCKET_NAME`; `@connect` in old
    /// Dockers).
    pub fn connect_name(mut self, name: impl Into<String>) -> Builder {
        self.plan.connect_name = name.into();
        self
    }

    /// Sets what precedes `CID.PORT` in socket names (hyperkit's `PRI_ADDR_PREFIX`; `@` in old
    /// Dockers).
    pub fn prefix(mut self, prefix: impl Into<String>) -> Builder {
        self.plan.prefix = prefix.into();
        self
    }

    /// Sets whether broken rules are only counted, and the VM lives on. Otherwise the first one
    /// ends it.
    pub fn lenient(mut self, lenient: bool) -> Builder {
        self.plan.lenient = lenient;
        self
    }

    /// Makes the state directory, or replaces what an earlier VM left there, and starts the VM.
    pub fn start(self) -> Result<Vm> {
        let Builder { plan, dials } = self;
        let failed = |cause| Error::new(Operation::Run, plan.directory.display(), cause);
        if plan.forwards.len() > MAX_FORWARDS {
            let why = format!("hyperkit takes at most {MAX_FORWARDS} guest_forwards");
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        if plan.cid <= hyperkit::HOST_CID || plan.cid == u32::MAX {
            let why = format!("{} is no guest's CID", plan.cid);
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let mut made = directory::Made::default();
        let (mut dial_listeners, mut paced) = (Vec::new(), Vec::new());
        for (port, dial) in dials {
            match dial {
                Dial::Listen(at) => {
                    dial_listeners.push(DialListener::open(port, &at, &mut made)?);
                }
                Dial::Paced(per_second) => paced.push(Paced::new(port, per_second)),
            }
        }
        let endpoints = dial_listeners
            .iter()
            .map(|listener| (listener.port, listener.endpoint.clone()))
            .collect();
        let listeners = directory::prepare(&plan, &mut made)?;
        let shared = Arc::new(Shared::default());
        let (commands, inbox) = mpsc::channel();
        let device = Device::new(
            plan.clone(),
            listeners,
            dial_listeners,
            paced,
            inbox,
            Arc::clone(&shared),
        );
        let (device, waker) = device.map_err(failed)?;
        let thread = std::thread::Builder::new()
            .name("hyperkit".into())
            .spawn(move || device.run())
            .map_err(failed)?;
        made.keep();
        Ok(Vm {
            plan,
            endpoints,
            shared,
            commands,
            waker,
            thread: Some(thread),
        })
    }
}

/// A running stand-in; it powers off when dropped. Its socket files stay, as hyperkit's do.
#[derive(Debug)]
pub struct Vm {
    plan: Plan,
    endpoints: HashMap<u32, Endpoint>,
    shared: Arc<Shared>,
    commands: Sender<Command>,
    waker: mio::Waker,
    thread: Option<JoinHandle<()>>,
}

impl Vm {
    /// Returns a builder of a VM with its state in `directory`: CID 3, no services.
    pub fn builder(directory: impl Into<PathBuf>) -> Builder {
        let directory = directory.into();
        let name = directory
            .file_name()
            .map_or_else(|| "vm".into(), |name| name.to_string_lossy().into_owned());
        Builder {
            plan: Plan {
                directory,
                mux: None,
                name,
                cid: hyperkit::GUEST_CID,
                connect_name: hyperkit::CONNECT_NAME.to_owned(),
                prefix: String::new(),
                forwards: Vec::new(),
                services: HashMap::new(),
                slots: 1024 - OWN_DESCRIPTORS,
                descriptors: None,
                loses_clients: cfg!(not(target_os = "linux")),
                backlog: 4096,
                lenient: false,
                strictness: Strictness::Measured,
                failed_dials: FAILED_DIALS,
                lost_at_reboot: 1,
            },
            dials: Vec::new(),
        }
    }

    /// Returns a builder of a VM behind a VMM's Unix socket at `path`, as with Firecracker and its
    /// kin (`vsock-mux://`): whoever says `CONNECT PORT\n` there dials the guest, which dials the
    /// host at `PATH_PORT`. No rule ([`Rule`]) can be broken there.
    pub fn behind_socket(path: impl Into<PathBuf>) -> Builder {
        let path = path.into();
        let mut builder = Vm::builder(path.clone());
        builder.plan.mux = Some(Mux {
            path,
            half_close: false,
        });
        builder
    }

    /// Returns the state directory, or the path of the VMM's socket.
    pub fn directory(&self) -> &Path {
        &self.plan.directory
    }

    /// Returns where the [`Dial::Listen`] of `port` listens.
    pub fn dial_addr(&self, port: u32) -> Option<&Endpoint> {
        self.endpoints.get(&port)
    }

    /// Pauses the guest: it answers no dial and moves no byte. The device goes on accepting.
    pub fn pause(&self) {
        self.command(Command::Pause);
    }

    /// Resumes the guest.
    pub fn resume(&self) {
        self.command(Command::Resume);
    }

    /// Reboots the guest, which forgets all its connections. Those of the host's programs stay
    /// open; one that sends or half-closes gets EOF. Requests that it had not answered are lost:
    /// nothing is heard of them any more. Slots are lost as well ([`Builder::lost_at_reboot`]).
    pub fn reboot_guest(&self) {
        self.command(Command::Reboot);
    }

    /// Waits until a program listens on `port` of the host, at most for `time`. Returns whether one
    /// does. The guest doesn't dial for that.
    pub fn wait_for_listener(&self, port: u32, time: Duration) -> bool {
        let path = directory::socket_path(&self.plan, hyperkit::HOST_CID, port);
        let deadline = after(Instant::now(), time);
        let mut seen = false;
        loop {
            // A socket is there when it is bound: it begins to listen just after.
            let there = sys::is_socket_alive(&path).unwrap_or(false);
            if seen && there {
                return true;
            }
            if !there && Instant::now() >= deadline {
                return false;
            }
            seen = there;
            std::thread::sleep(LOOK);
        }
    }

    /// Ends the programs in the guest that dial at a pace ([`Dial::Paced`]).
    pub fn stop_dialling(&self) {
        self.command(Command::StopDialling);
    }

    /// Has a program in the guest dial `port` of the host, once the guest isn't paused. Returns its
    /// end of the connection.
    ///
    /// It fails at once if nobody listens there, which the device bears a few times only
    /// ([`Rule::NoListener`]). The stream is a blocking one. Dropping it closes the program's
    /// socket.
    pub fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let (program, device) = UnixStream::pair()?;
        let (reply, answer) = mpsc::channel();
        let gone = || io::Error::new(io::ErrorKind::BrokenPipe, "the VM is down");
        let command = Command::Dial(port, device, reply);
        self.send(command).ok_or_else(gone)?;
        match answer.recv_timeout(PATIENCE) {
            Ok(outcome) => outcome.map(|()| program),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(gone()),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Returns how the VM ended; `None` while it is alive.
    pub fn fate(&self) -> Option<Fate> {
        self.shared.lock().1.clone()
    }

    /// Returns what it has counted so far.
    pub fn counters(&self) -> Counters {
        self.shared.lock().0
    }

    /// Waits until the VM has died or hangs, at most for `time`. Returns how it ended.
    pub fn wait_for_fate(&self, time: Duration) -> Option<Fate> {
        self.wait(time, |_, fate| fate.is_some());
        self.fate()
    }

    /// Waits until `reached` is true of the counters, at most for `time`. Returns whether it is.
    pub fn wait_for(&self, time: Duration, mut reached: impl FnMut(&Counters) -> bool) -> bool {
        self.wait(time, |counters, _| reached(counters))
    }

    /// Powers the VM off: all its sockets are closed, their files stay. Dropping it does the same.
    pub fn stop(self) {}

    fn wait(&self, time: Duration, mut done: impl FnMut(&Counters, &Option<Fate>) -> bool) -> bool {
        let deadline = after(Instant::now(), time);
        let mut state = self.shared.lock();
        while !done(&state.0, &state.1) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.changed.wait_timeout(state, left);
            state = recover(waited).0;
        }
        true
    }

    /// Sends a command; `None` if the device's thread has ended.
    fn send(&self, command: Command) -> Option<()> {
        self.commands.send(command).ok()?;
        self.waker.wake().ok()
    }

    /// Sends a command and waits until it has been carried out.
    fn command(&self, command: fn(Sender<()>) -> Command) {
        let (done, wait) = mpsc::channel();
        if self.send(command(done)).is_some() {
            // The device never blocks on anything but a stop, and its end drops the sender.
            let _ = wait.recv();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.command(Command::Stop);
        if let Some(thread) = self.thread.take() {
            // A panic of the device's was reported where it happened.
            let _ = thread.join();
        }
    }
}
