//! The sockets of the control interface: which clients are accepted, and how long they may take.
//!
//! One thread runs them all, with a task for each socket and each client. If there are too many
//! clients for a new one, the client that has been idle longest is disconnected for it, so that
//! idle clients never lock out others. What may block (a call, a check of the socket's file) runs
//! on other threads, whose number is limited.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc::{Sender, channel};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use crate::address::Address;
use crate::engine::log_limiter::LogLimiter;
use crate::error::{Error, Operation, Result};
use crate::listener::lasting::FileWatch;
use crate::listener::nonblocking::{Listener, has_client_left, is_broken};
use crate::lock::{lock, recover};
use crate::name::SocketName;
use crate::proxy::{Source, may_come};
use crate::stream::{Stream, nonblocking};
use crate::sys;

use super::api::{Api, CALLS_AT_A_TIME};
use super::clients::{ServedClient, SocketClients};
use super::endpoint::{BoundEndpoint, Demand, ServedInterface, ServiceEndpoint};
use super::http::{self, HttpRequest};
use super::place;

/// Returns how many descriptors a server needs whose sockets have so many clients each, including
/// the sockets and the runtime.
pub(super) fn descriptors(clients: impl Iterator<Item = usize>) -> usize {
    /// tokio's poller, its waker, and the descriptors from which these were cloned.
    const RUNTIME: usize = 6;
    match clients.map(|clients| 1 + clients).sum() {
        0 => 0,
        sockets => RUNTIME + sockets,
    }
}

/// How long answers that are being sent may take when the server ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// How long the removal of the sockets' files may take when the server ends.
const REMOVAL: Duration = Duration::from_secs(1);

/// How long a socket pauses after an accept error or a shutdown.
const PAUSE: Duration = Duration::from_millis(50);

/// How often the socket's file is checked.
const WATCH: Duration = Duration::from_secs(1);

/// How often a socket that can't be bound is tried again.
const TRY_AGAIN: Duration = Duration::from_secs(2);

fn fail(cause: io::Error) -> Error {
    Error::new(Operation::Run, "the control socket", cause)
}

/// A server that runs until it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    stop: Option<oneshot::Sender<()>>,
    /// Disconnected when the thread ends; nothing is sent.
    ended: Mutex<mpsc::Receiver<()>>,
}

impl Server {
    /// Begins to serve.
    pub(super) fn start(sockets: Vec<BoundEndpoint>, api: Arc<Api>) -> Result<Server> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            // One more for the readers of events, and two for each socket: for binding it and for
            // checking its file.
            .max_blocking_threads(CALLS_AT_A_TIME + 1 + 2 * sockets.len())
            .thread_name("hvsock-client")
            .build()
            .map_err(fail)?;
        let (stop, stopped) = oneshot::channel();
        let (running, ended) = mpsc::channel();
        let run = move || {
            let _running: mpsc::Sender<()> = running;
            serve(runtime, sockets, api, stopped);
        };
        let thread = thread::Builder::new().name("hvsock-control".to_owned());
        thread.spawn(run).map_err(fail)?;
        Ok(Server {
            stop: Some(stop),
            ended: Mutex::new(ended),
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = recover(self.ended.get_mut());
        // Removing a file may hang on a disk: the process ends all the same.
        let _ = ended.recv_timeout(LAST_ANSWERS + REMOVAL);
    }
}

fn serve(
    runtime: Runtime,
    sockets: Vec<BoundEndpoint>,
    api: Arc<Api>,
    stopped: oneshot::Receiver<()>,
) {
    runtime.block_on(async {
        let mut open = JoinSet::new();
        let mut all = Vec::new();
        let (at_work, mut all_done) = channel(1);
        for bound in sockets {
            let clients = Arc::new(Mutex::new(SocketClients::new(bound.endpoint.demand)));
            all.push(Arc::clone(&clients));
            let at_work = AtWork(at_work.clone());
            open.spawn(ClientAcceptor::new(bound, Arc::clone(&api), clients, at_work).accept_all());
        }
        drop(at_work);
        let events = Arc::clone(&api.events);
        // The dropped sender ends the wait.
        let _ = stopped.await;
        // First close the listeners and remove their files: a process that sees no socket may take
        // its place.
        open.shutdown().await;
        // Otherwise the process could end before a file that is being checked or made is removed.
        let _ = timeout(REMOVAL, all_done.recv()).await;
        events.close();
        let all: Vec<SocketClients> = all
            .iter()
            .map(|clients| {
                std::mem::replace(&mut *lock(clients), SocketClients::new(Demand::Asked))
            })
            .collect();
        // Clients without a request are disconnected; the others have a moment for their answers.
        let last = async {
            for mut clients in all {
                clients.disconnect_silent();
                while clients.tasks.join_next().await.is_some() {}
            }
        };
        let _ = timeout(LAST_ANSWERS, last).await;
    });
    // A hanging call is not waited for.
    runtime.shutdown_background();
}

/// A guard that a call on another thread holds until all that it has made or used is dropped. The
/// server waits for the last guard. Nothing is sent.
#[derive(Clone)]
struct AtWork(#[expect(dead_code)] Sender<()>);

impl AtWork {
    /// Runs a call that may block on another thread.
    fn spawn_call<T: Send + 'static>(
        &self,
        call: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<(T, AtWork)> {
        let at_work = self.clone();
        spawn_blocking(move || (call(), at_work))
    }
}

/// The task that accepts a socket's clients, and checks the socket's file.
struct ClientAcceptor {
    endpoint: Arc<ServiceEndpoint>,
    listener: Option<Arc<Listener>>,
    api: Arc<Api>,
    clients: Arc<Mutex<SocketClients>>,
    /// The sources from which clients are accepted; if it is empty, all.
    from: Vec<Source>,
    /// The limiter of log lines about clients of other sources.
    refusals: LogLimiter,
    /// Whether an error, or a client of another user, was logged.
    complained: bool,
    look_at: Instant,
    watch: FileWatch,
    /// The running check of the socket's file, with the new listener if the file had been removed.
    look: Option<JoinHandle<(FileLook, AtWork)>>,
    at_work: AtWork,
}

type FileLook = (FileWatch, Option<Listener>);

impl ClientAcceptor {
    fn new(
        bound: BoundEndpoint,
        api: Arc<Api>,
        clients: Arc<Mutex<SocketClients>>,
        at_work: AtWork,
    ) -> ClientAcceptor {
        ClientAcceptor {
            endpoint: bound.endpoint,
            listener: bound.listener,
            api,
            clients,
            from: bound.from,
            refusals: LogLimiter::default(),
            complained: false,
            look_at: Instant::now(),
            watch: FileWatch::default(),
            look: None,
            at_work,
        }
    }

    async fn accept_all(mut self) {
        loop {
            let Some(listener) = &self.listener else {
                self.bind_again().await;
                continue;
            };
            // For a socket that the user has not asked for the process never wakes.
            let watch = match self.endpoint.demand {
                Demand::Asked => WATCH,
                Demand::OwnAccord => Duration::MAX,
            };
            let came = tokio::select! {
                came = timeout(watch, next_client(listener)) => came,
                () = self.endpoint.wait_until_given_away() => break,
            };
            match came {
                // No client came.
                Err(_) => {}
                Ok(Ok((stream, peer))) => self.admit(stream, &peer),
                Ok(Err(e)) => self.handle_accept_error(&e).await,
            }
            self.check_file().await;
        }
        self.listener = None;
        // First, since `mark_closed` lets the hand-over go on.
        let own = self.open_own_endpoint().await;
        self.endpoint.mark_closed();
        if let Some(bound) = own {
            let own = ClientAcceptor::new(bound, self.api, self.clients, self.at_work);
            Box::pin(own.accept_all()).await;
        }
    }

    /// Listens under the process id, since a successor has the control socket now, so that the
    /// connections that finish here can still be shown and closed. If that fails, they just finish.
    async fn open_own_endpoint(&self) -> Option<BoundEndpoint> {
        if self.endpoint.service != ServedInterface::Control {
            return None;
        }
        let open = || {
            let address = place::address(&place::own_path(std::process::id()));
            BoundEndpoint::open(ServedInterface::Control, &address, Demand::OwnAccord)
        };
        let (opened, _) = self.at_work.spawn_call(open).await.ok()?;
        opened.ok()
    }

    /// Logs a warning, the first time only.
    fn complain(&mut self, what: impl std::fmt::Display) {
        if !std::mem::replace(&mut self.complained, true) {
            warn!("{}: {what}", self.endpoint.address);
        }
    }

    async fn handle_accept_error(&mut self, error: &io::Error) {
        if error.kind() == io::ErrorKind::Interrupted || has_client_left(error) {
            return;
        }
        if is_broken(error) {
            let why = format!("the socket was shut down from outside ({error})");
            if self.endpoint.mark_unserved(why.clone()) {
                warn!("{}: {why}; it is bound again", self.endpoint.address);
            }
            // First close the old listener, which has the address.
            self.listener = None;
        } else {
            self.complain(format_args!("{error}; clients wait"));
            // Mostly descriptors have run out: this frees one.
            lock(&self.clients).disconnect_one();
        }
        sleep(PAUSE).await;
    }

    async fn bind_again(&mut self) {
        let endpoint = Arc::clone(&self.endpoint);
        let made = self.at_work.spawn_call(move || endpoint.bind()).await;
        let made = made.map_or_else(|e| Err(fail(io::Error::other(e))), |(made, _)| made);
        let address = &self.endpoint.address;
        match made {
            Ok(listener) => {
                info!("listening on {address} now");
                self.listen_on(listener);
                self.endpoint.mark_served();
            }
            Err(e) => {
                if self.endpoint.mark_unserved(e.to_string()) {
                    warn!("{e}");
                }
                sleep(TRY_AGAIN).await;
            }
        }
    }

    fn admit(&mut self, stream: nonblocking::Stream, peer: &SocketName) {
        if !may_come(&self.from, peer) {
            return self.log_refused_source(peer);
        }
        let stream = match to_tokio(stream, &self.endpoint.address) {
            Ok(stream) => stream,
            Err(e) => return self.complain(format_args!("a client can't be served: {e}")),
        };
        let service = self.endpoint.service;
        let asked_by = match service {
            ServedInterface::Control => match check_connector(&stream) {
                Ok(process) => process,
                Err(why) => return self.complain(format_args!("refused a client: {why}")),
            },
            ServedInterface::GuestControl | ServedInterface::Metrics => None,
        };
        let client = Arc::new(ServedClient::new());
        let (served, api) = (Arc::clone(&client), Arc::clone(&self.api));
        let task = async move {
            let answer = |request| {
                let request = HttpRequest {
                    asked_by,
                    ..request
                };
                Arc::clone(&api).answer(service, request)
            };
            http::serve(stream, &served, answer).await;
        };
        lock(&self.clients).admit(&client, task);
    }

    /// Logs that a client was refused because of its source.
    fn log_refused_source(&self, peer: &SocketName) {
        let client = peer.without_port();
        let Some(more) = self.refusals.admit(&client, Instant::now()) else {
            return;
        };
        let address = &self.endpoint.address;
        let more = match more {
            0 => String::new(),
            more => format!(" ({more} more since the last line)"),
        };
        warn!(
            "{address}: refused a client: {client} may not control this hvsock: it is not in guest-control-from{more}"
        );
    }

    /// Starts a check of the socket's file, which makes it again if it was removed.
    async fn check_file(&mut self) {
        if let Some(look) = self.look.take_if(|look| look.is_finished()) {
            // The check doesn't panic. If it did, it would start anew.
            let (watch, made) = look.await.map(|(look, _)| look).unwrap_or_default();
            self.watch = watch;
            if let Some(made) = made {
                self.replace(made);
            }
        }
        let now = Instant::now();
        if let (None, Some(listener)) = (&self.look, &self.listener)
            && self.endpoint.address.listen_path().is_some()
            && self.look_at <= now
        {
            self.look_at = now + WATCH;
            let (listener, endpoint) = (Arc::clone(listener), Arc::clone(&self.endpoint));
            let mut watch = std::mem::take(&mut self.watch);
            self.look = Some(self.at_work.spawn_call(move || {
                let state = || listener.file_state();
                let made = watch.look(&endpoint.address, state, || endpoint.bind());
                (watch, made)
            }));
        }
    }

    /// Listens on another socket. Returns the previous one.
    fn listen_on(&mut self, listener: Listener) -> Option<Arc<Listener>> {
        let listener = Arc::new(listener);
        self.endpoint.note_listener(&listener);
        self.listener.replace(listener)
    }

    /// Accepts the clients that wait at the old socket, and listens on the new one.
    fn replace(&mut self, made: Listener) {
        let old = self.listen_on(made);
        while let Some(Ok((stream, peer))) = old.as_ref().map(|old| old.accept()) {
            self.admit(stream, &peer);
        }
    }
}

/// Waits for a client. Returns it with its name.
async fn next_client(listener: &Listener) -> io::Result<(nonblocking::Stream, SocketName)> {
    let sockets = listener.sockets().into_iter();
    let watched: Vec<_> = sockets
        .map(sys::watch_borrowed)
        .collect::<io::Result<_>>()?;
    loop {
        let mut ready = sys::any_ready(&watched, Interest::READABLE).await?;
        if let Ok(accepted) = ready.try_io(|_| listener.accept()) {
            return accepted;
        }
    }
}

/// Converts to the runtime's stream. Its Unix stream carries any stream socket.
fn to_tokio(stream: nonblocking::Stream, address: &Address) -> io::Result<UnixStream> {
    let socket = Stream::from_nonblocking(stream, address)?.into_socket();
    socket.set_nonblocking(true)?;
    UnixStream::from_std(OwnedFd::from(socket).into())
}

/// Refuses clients that the file's permissions allow but that must not come: those of another user
/// (root), and connections that this process has made itself for a forward's client such as a
/// guest. Returns the client's process, if the system reports it.
fn check_connector(stream: &UnixStream) -> std::result::Result<Option<u32>, String> {
    let who = sys::connector(stream.as_fd())
        .map_err(|e| format!("the system doesn't say who it is: {e}"))?;
    if who.user != sys::user_id() {
        return Err(format!("it is user {}, and not ours", who.user));
    }
    if who.process == Some(std::process::id()) {
        return Err("it came through one of our own forwards".to_owned());
    }
    Ok(who.process)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::app::control::api::Actions;
    use crate::app::rule_options::RuleOptions;
    use crate::proxy::{Proxy, ProxyConfig};

    /// The longest wait of a test.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn actions(reload: impl Fn() + Send + Sync + 'static) -> Actions {
        Actions {
            options: Box::new(RuleOptions::default),
            pending: Box::new(Vec::new),
            stopping: |_, _| {},
            reload: Some(Box::new(move || {
                reload();
                Ok(serde_json::Value::Null)
            })),
            succession: None,
            grace: Box::new(|| Duration::ZERO),
            allows_exec: Box::new(|| false),
        }
    }

    #[cfg(target_os = "linux")]
    mod shut_down {
        use std::io::{Read, Write};
        use std::net::Shutdown;

        use super::*;

        /// Serves the metrics at an address, to which clients of this process may connect, too.
        fn start(
            address: &Address,
            actions: Actions,
        ) -> (Server, Proxy, Arc<Listener>, Arc<ServiceEndpoint>) {
            let proxy = Proxy::start(ProxyConfig::new(Vec::new())).unwrap();
            let bound =
                BoundEndpoint::open(ServedInterface::Metrics, address, Demand::Asked).unwrap();
            let (listener, endpoint) =
                (bound.listener.clone().unwrap(), Arc::clone(&bound.endpoint));
            let endpoints = vec![Arc::clone(&endpoint)];
            let api = Api::new(proxy.handle(), actions, endpoints, Arc::default());
            let server = Server::start(vec![bound], Arc::new(api)).unwrap();
            (server, proxy, listener, endpoint)
        }

        /// A client from another source is told nothing.
        #[test]
        fn clients_from_elsewhere_are_refused() {
            let source = |ip: &str| ip.parse::<Source>().unwrap();
            for (from, is_let_in) in [
                (vec![], true),
                (vec![source("127.0.0.1")], true),
                (vec![source("127.0.0.2"), Source::cid(1)], false),
            ] {
                let proxy = Proxy::start(ProxyConfig::new(Vec::new())).unwrap();
                let asked = "tcp://127.0.0.1:0".parse().unwrap();
                let bound =
                    BoundEndpoint::open(ServedInterface::Metrics, &asked, Demand::Asked).unwrap();
                let bound = bound.limited_to(&from);
                let endpoint = Arc::clone(&bound.endpoint);
                let api = Api::new(proxy.handle(), actions(|| ()), Vec::new(), Arc::default());
                let _server = Server::start(vec![bound], Arc::new(api)).unwrap();
                let answer = scrape(&endpoint.address).unwrap_or_default();
                assert_eq!(answer.contains("200 OK"), is_let_in, "{from:?}");
                assert_eq!(answer.is_empty(), !is_let_in, "{answer}");
            }
        }

        fn scrape(address: &Address) -> io::Result<String> {
            let fail = |e: Error| io::Error::from(e.kind());
            let mut stream = Stream::connect_timeout(address, PATIENCE).map_err(fail)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        }

        fn eventually(what: &str, mut done: impl FnMut() -> bool) {
            let end = Instant::now() + PATIENCE;
            while !done() {
                assert!(Instant::now() < end, "in vain: {what}");
                thread::sleep(Duration::from_millis(5));
            }
        }

        /// As by `ss -K`, or by another process that has the socket.
        #[test]
        fn a_socket_that_is_shut_down_from_outside_is_bound_again() {
            let dir = tempfile::tempdir().unwrap();
            let unix = format!("unix://{}", dir.path().join("s").display());
            for address in ["tcp://127.0.0.1:0", &unix] {
                let asked = address.parse().unwrap();
                let (server, _proxy, listener, endpoint) = start(&asked, actions(|| ()));
                assert!(scrape(&endpoint.address).unwrap().contains("200 OK"));
                let socket = listener.sockets()[0];
                let socket = socket2::SockRef::from(&socket);
                socket.shutdown(Shutdown::Both).unwrap();
                drop(listener);
                eventually("it is served again", || {
                    scrape(&endpoint.address).is_ok_and(|answer| answer.contains("200 OK"))
                });
                assert!(endpoint.trouble().is_none());
                drop(server);
                assert!(scrape(&endpoint.address).is_err(), "{address}");
            }
        }
    }

    #[test]
    fn guests_may_change_forwards_and_not_the_process() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let proxy = Proxy::start(ProxyConfig::new(Vec::new())).unwrap();
        let (handle, stopping) = (proxy.handle(), actions(|| ()));
        let api = Arc::new(Api::new(handle, stopping, Vec::new(), Arc::default()));
        for (method, path, status) in [
            ("GET", "/v1/status", 200),
            ("GET", "/v1/events", 200),
            ("GET", "/metrics", 200),
            ("POST", "/v1/reload", 200),
            ("DELETE", "/v1/forwards/none", 404),
            ("POST", "/v1/stop", 403),
            ("POST", "/v1/upgrade", 403),
            ("POST", "/v1/take-over", 403),
        ] {
            let request = HttpRequest {
                method: method.parse().unwrap(),
                path: path.to_owned(),
                ..HttpRequest::default()
            };
            let answer = Arc::clone(&api).answer(ServedInterface::GuestControl, request);
            let answer = runtime.block_on(async { timeout(PATIENCE, answer).await });
            assert_eq!(answer.unwrap().status(), status, "{path}");
        }
    }

    /// A change that hangs delays neither other requests nor the end.
    #[test]
    fn it_can_be_looked_at_and_stopped_while_a_change_hangs() {
        // The runtime waits for its threads, so what they wait for must be dropped first.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(CALLS_AT_A_TIME)
            .build()
            .unwrap();
        let (begins, begun) = channel();
        let (goes_on, hangs) = channel::<()>();
        let (begins, hangs) = (Mutex::new(begins), Mutex::new(hangs));
        let reload = move || {
            begins.lock().unwrap().send(()).unwrap();
            let _ = hangs.lock().unwrap().recv();
        };
        let proxy = Proxy::start(ProxyConfig::new(Vec::new())).unwrap();
        let api = Arc::new(Api::new(
            proxy.handle(),
            actions(reload),
            Vec::new(),
            Arc::default(),
        ));
        let call = |method: &str, path: &str| {
            let request = HttpRequest {
                method: method.parse().unwrap(),
                path: path.to_owned(),
                ..HttpRequest::default()
            };
            Arc::clone(&api).answer(ServedInterface::Control, request)
        };
        runtime.block_on(async {
            let first = tokio::spawn(call("POST", "/v1/reload"));
            tokio::task::yield_now().await;
            begun.recv_timeout(PATIENCE).unwrap();
            for (method, path, status) in [
                ("GET", "/v1/status", 200),
                ("GET", "/v1/connections", 200),
                ("GET", "/metrics", 200),
                ("POST", "/v1/stop", 202),
            ] {
                let answer = timeout(PATIENCE, call(method, path)).await;
                assert_eq!(answer.unwrap().status(), status, "{path}");
            }
            // Requests for another change are refused, however many there are.
            let others: Vec<_> = (0..50)
                .map(|_| tokio::spawn(call("POST", "/v1/reload")))
                .collect();
            for other in others {
                let answer = timeout(PATIENCE, other).await.unwrap().unwrap();
                assert_eq!(answer.status(), 503);
            }
            assert!(!first.is_finished());
        });
        // What was refused does not happen later.
        drop(goes_on);
        begun.recv_timeout(Duration::from_millis(100)).unwrap_err();
        runtime.shutdown_background();
        proxy.wait().unwrap();
    }
}
