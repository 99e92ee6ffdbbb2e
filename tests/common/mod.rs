//! What several test programs need: private directories, clients with a bound on waiting, a proxy
//! in front of a VM.

#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hvsock::address::{Address, HyperkitAddress, HyperkitVm, Port, UnixAddress};
use hvsock::{Proxy, ProxyConfig, Rule};

/// No wait in a test is longer than this.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A private directory with a short path, removed at the end. `HVSOCK_TEST_TMP` is used in the
/// place of `/tmp`: where that is a link, as on a Mac, paths have two spellings.
///
/// It raises the limit of descriptors as well, which tests side by side have in common: of a Mac's
/// 256 they would need more than there are.
pub(crate) fn private_dir() -> tempfile::TempDir {
    allow_descriptors(4096);
    let root = std::env::var_os("HVSOCK_TEST_TMP").unwrap_or_else(|| "/tmp".into());
    tempfile::Builder::new()
        .prefix("hvs-")
        .tempdir_in(root)
        .unwrap()
}

/// Whether a Unix socket tells that its peer closed with bytes unread, which is how a stand-in
/// knows of that. Linux' do; macOS' read an EOF.
pub(crate) fn tells_unread() -> bool {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (&ours).write_all(b"unread").unwrap();
    drop(theirs);
    let tells = is_reset((&ours).read(&mut [0]));
    if !tells {
        println!("skipped in part: this system doesn't tell of bytes left unread");
    }
    tells
}

/// Lets this process have so many descriptors, if it may.
pub(crate) fn allow_descriptors(count: u64) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = count.min(hard);
    if soft < wanted {
        setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
    }
}

/// A server of TCP, and its address.
pub(crate) fn tcp_server() -> (TcpListener, Address) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp://{}", server.local_addr().unwrap());
    (server, target.parse().unwrap())
}

pub(crate) fn accept(server: &TcpListener) -> TcpStream {
    let (accepted, _) = server.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    accepted
}

pub(crate) fn hyperkit(state: &Path, port: u32) -> Address {
    Address::Hyperkit(HyperkitAddress {
        vm: HyperkitVm::new(state),
        port: Port(port),
    })
}

pub(crate) fn unix(path: impl Into<PathBuf>) -> Address {
    Address::Unix(UnixAddress::Path(path.into()))
}

pub(crate) fn any_tcp() -> Address {
    "tcp://127.0.0.1:0".parse().unwrap()
}

/// A config of two workers, whatever the machine has.
pub(crate) fn config(rules: Vec<Rule>) -> ProxyConfig {
    let mut config = ProxyConfig::new(rules);
    config.workers = Some(2.try_into().unwrap());
    config
}

/// A proxy of one rule.
pub(crate) fn proxy(listen: Address, connect: Address) -> Proxy {
    Proxy::start(config(vec![Rule::new(listen, connect)])).unwrap()
}

/// The TCP port on which a forward of the proxy listens.
pub(crate) fn port_of(proxy: &Proxy, forward: usize) -> u16 {
    match &proxy.forwards()[forward].listen {
        Address::Tcp(tcp) => tcp.port,
        other => panic!("{other} is no TCP address"),
    }
}

/// A client's stream of either family.
pub(crate) trait Client: Read + Write + Send + 'static {
    fn half_close(&self);
}

impl Client for TcpStream {
    fn half_close(&self) {
        self.shutdown(Shutdown::Write).unwrap();
    }
}

impl Client for UnixStream {
    fn half_close(&self) {
        match self.shutdown(Shutdown::Write) {
            // macOS says so where the peer has closed, or this was said before.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => {}
            done => done.unwrap(),
        }
    }
}

pub(crate) fn tcp(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    // (macOS takes none for one that has ended already, where nothing waits.)
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = stream.set_write_timeout(Some(PATIENCE));
    stream
}

pub(crate) fn is_reset(result: io::Result<usize>) -> bool {
    matches!(result, Err(e) if e.kind() == io::ErrorKind::ConnectionReset)
}

/// Whether a client that connects is reset: while it reads, or so soon that its connect says so.
pub(crate) fn resets_clients(port: u16) -> bool {
    let client = TcpStream::connect(("127.0.0.1", port)).and_then(|mut client| {
        let _ = client.set_read_timeout(Some(PATIENCE));
        client.read(&mut [0])
    });
    is_reset(client)
}

/// Connects to a Unix socket on which somebody listens.
pub(crate) fn unix_client(path: &Path) -> UnixStream {
    let mut connected = None;
    // macOS refuses while its backlog is full.
    eventually("it accepts", || match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => false,
        other => {
            connected = Some(other.unwrap());
            true
        }
    });
    let stream = connected.unwrap();
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = stream.set_write_timeout(Some(PATIENCE));
    stream
}

/// Sends `bytes`, half-closes, reads to EOF.
pub(crate) fn ask(mut client: impl Client, bytes: &[u8]) -> io::Result<Vec<u8>> {
    client.write_all(bytes)?;
    client.half_close();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Polls until `done`, at most for [`PATIENCE`].
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(len: usize) -> Vec<u8> {
    let mut random = fastrand::Rng::with_seed(len as u64);
    std::iter::repeat_with(|| random.u8(..)).take(len).collect()
}
