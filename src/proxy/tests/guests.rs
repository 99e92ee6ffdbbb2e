//! Windows: guests that are accepted as those of AF_HYPERV are, and named pipes that lead to them.

use std::sync::Arc;

use super::super::driver::Driver;
use super::super::gates::Gates;
use super::super::rules::Binder;
use super::super::{
    Controller, Descriptors, Handle, Housekeeper, Inbox, Limits, MioDriver, Shared, Worker,
};
use super::*;
use crate::engine::forward::{AccessLog, Forward, Reports};
use crate::engine::id::ForwardId;
use crate::listener::nonblocking::Listener;

/// Starts a worker in front of `target` whose guests are TCP clients, accepted as AF_HYPERV's are.
/// Returns the address that they connect to.
fn guests_of(
    target: &TcpListener,
    limits: Limits,
) -> (Handle, SocketAddr, thread::JoinHandle<io::Result<()>>) {
    use crate::listener::hyperv::HypervListener;
    use crate::sys::Acceptor;

    let make = || Socket::new(Domain::IPV4, Type::STREAM, None);
    let socket = make().unwrap();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket.bind(&any.into()).unwrap();
    socket.listen(16).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let listen: Address = "hvsock://children/80".parse().unwrap();
    let connect = format!("tcp://{}", target.local_addr().unwrap());
    let rule = Rule::new(listen.clone(), connect.parse().unwrap());
    let acceptor = Acceptor::new(socket, make).unwrap();
    let listener = Listener::Hyperv(HypervListener::new(acceptor, listen.clone()));
    let reports = Reports {
        observer: None,
        access_log: Arc::new(AccessLog::new(false)),
        ended: Arc::default(),
    };
    let forward = Arc::new(Forward::new(
        ForwardId(0),
        rule,
        listen,
        [None, None],
        None,
        Waiter::of,
        reports.clone(),
    ));
    let driver = MioDriver::new(Housekeeper::start().unwrap()).unwrap();
    let waker = driver.waker();
    let wake = move || waker.wake().unwrap();
    let gates = Arc::new(Gates::new(limits.clone()));
    let shared = Arc::new(Shared::new(
        limits,
        Arc::clone(&gates),
        Descriptors::new(1, 0, MioDriver::descriptor_limit),
        vec![Arc::clone(&forward)],
        vec![Inbox::new(Arc::new(wake))],
    ));
    let mut worker = Worker::new(driver, 0, Arc::clone(&shared), 1);
    worker.add_listener(listener, forward).unwrap();
    (
        Handle {
            controller: Controller {
                binder: Arc::new(Binder::new(
                    gates,
                    Waiter::of,
                    reports,
                    Vec::new(),
                    Vec::new(),
                )),
                shared,
            },
        },
        address,
        thread::spawn(move || worker.run()),
    )
}

#[test]
fn guests_are_accepted_one_by_one_and_not_beyond_the_slots() {
    let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let limits = Limits {
        connections: 2,
        ..Limits::default()
    };
    let (stopper, address, worker) = guests_of(&target, limits);
    let guest = || {
        let mut guest = patient(TcpStream::connect(address).unwrap());
        guest.write_all(b"x").unwrap();
        guest
    };
    let server = || {
        let mut server = patient(target.accept().unwrap().0);
        server.read_exact(&mut [0]).unwrap();
        server
    };
    for _ in 0..20 {
        let (mut guest, mut server) = (guest(), server());
        guest.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read_to_end(&mut Vec::new()).unwrap(), 0);
        server.write_all(b"answer").unwrap();
        drop(server);
        let mut answer = Vec::new();
        guest.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"answer");
    }
    let end = Instant::now() + PATIENCE;
    while stopper.live() > 0 {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
    let guests = [guest(), guest(), guest(), guest()];
    let first = [server(), server()];
    thread::sleep(Duration::from_millis(100));
    assert_eq!(stopper.live(), 2);
    drop((first, guests));
    let last = [server(), server()];
    stopper.stop(Duration::ZERO);
    worker.join().unwrap().unwrap();
    drop(last);
}

#[test]
fn a_proxy_that_waits_for_guests_ends_when_it_is_stopped() {
    let target = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let (stopper, address, worker) = guests_of(&target, Limits::default());
    stopper.stop(Duration::from_secs(3600));
    worker.join().unwrap().unwrap();
    assert!(TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err());
}

/// As Docker's pipe in front of a VM, with TCP in AF_HYPERV's place.
#[test]
fn a_pipe_leads_to_what_no_poller_can_wait_for() {
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let name = format!("hvsock-{:016x}", fastrand::u64(..));
    let rule = Rule::new(
        format!("npipe:////./pipe/{name}").parse().unwrap(),
        format!("tcp://{}", server.local_addr().unwrap())
            .parse()
            .unwrap(),
    );
    let waiter = |address: &Address| match address {
        Address::Tcp(_) => Waiter::Thread,
        other => Waiter::of(other),
    };
    let proxy = Proxy::start_with(ProxyConfig::new(vec![rule]), waiter).unwrap();
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        let path = format!(r"\\.\pipe\{name}");
        options.read(true).write(true).open(path).unwrap()
    };
    for n in 0..10_u8 {
        let mut client = open();
        client.write_all(&[n; 1000]).unwrap();
        let mut server = patient(server.accept().unwrap().0);
        let mut request = [0; 1000];
        server.read_exact(&mut request).unwrap();
        assert_eq!(request, [n; 1000]);
        server.write_all(&vec![n; 300_000]).unwrap();
        drop(server);
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert!(answer == vec![n; 300_000]);
    }
    let end = Instant::now() + PATIENCE;
    while proxy.forwards()[0].counters.live > 0 {
        assert!(Instant::now() < end);
        thread::sleep(Duration::from_millis(5));
    }
}
