//! Checks of peers that close, break off or don't read. AF_VSOCK has no reset that a program could
//! send. From a peer that has closed one reads EOF, and writes to it fail with EPIPE; to one that
//! has only half-closed one can still write.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use hvsock::{Proxy, ProxyConfig, Rule};
use socket2::SockRef;

use crate::pattern::{expect_pattern, send_pattern};
use crate::report::{Outcome, ensure, eventually};
use crate::sockets::{Server, connect_unix, connect_vsock, live, proxy};

const SOON: Duration = Duration::from_secs(3);
/// Longer than the proxy lingers for a client that goes on sending.
const LATER: Duration = Duration::from_secs(8);
const MIB: usize = 1024 * 1024;
/// More than may lie anywhere between two ends of which one doesn't read.
const BOUND: u64 = 2 << 20;

fn sent(proxy: &Proxy) -> u64 {
    proxy.forwards()[0].counters.sent
}

fn received(proxy: &Proxy) -> u64 {
    proxy.forwards()[0].counters.received
}

fn is_idle(proxy: &Proxy, within: Duration) -> Outcome {
    let idle = eventually(within, || live(proxy) == 0);
    ensure!(idle, "still there: {:?}", proxy.forwards()[0].counters);
    Ok(())
}

/// Writes until a write fails, for `within` at most, and returns the error.
fn write_until_told(mut to: &UnixStream, within: Duration) -> Result<io::Error, String> {
    let end = Instant::now() + within;
    to.set_write_timeout(Some(within))
        .map_err(|e| e.to_string())?;
    while Instant::now() < end {
        match to.write(&[0; 4096]) {
            Ok(_) => thread::sleep(Duration::from_millis(1)),
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => return Ok(e),
        }
    }
    Err(format!("it can still write after {within:?}"))
}

/// Checks a server that answers and closes with the request unread: the whole answer arrives, and
/// its EOF.
pub(crate) fn server_closes_unread() -> Outcome {
    let server = Server::vsock(5100)?;
    let proxy = proxy("unix:///unread.sock", "vsock://local:5100")?;
    let client = connect_unix("/unread.sock")?;
    send_pattern(&client, 20, 64 * 1024)?;
    let accepted = server.accept()?;
    ensure!(
        eventually(SOON, || sent(&proxy) == 64 << 10),
        "not delivered"
    );
    send_pattern(&accepted, 21, 128 * 1024)?;
    drop(accepted);
    expect_pattern(&client, 21, 128 * 1024)?;
    drop(client);
    is_idle(&proxy, LATER)
}

/// Checks the same from the other end: a vsock client that closes with the answer unread. The
/// server gets an error.
pub(crate) fn client_closes_unread() -> Outcome {
    let server = Server::unix("/unread-server.sock")?;
    let proxy = proxy("vsock://:5101", "unix:///unread-server.sock")?;
    let client = connect_vsock(5101)?;
    send_pattern(&client, 22, 64 * 1024)?;
    let accepted = server.accept()?;
    send_pattern(&accepted, 23, 64 * 1024)?;
    ensure!(
        eventually(SOON, || received(&proxy) == 64 << 10),
        "not delivered"
    );
    drop(client);
    expect_pattern(&accepted, 22, 64 * 1024)?;
    let why = write_until_told(&accepted, SOON)?;
    ensure!(
        why.kind() == ErrorKind::BrokenPipe,
        "the server was told {why}"
    );
    drop(accepted);
    is_idle(&proxy, LATER)
}

/// Checks a server that closes in the middle of an upload: the client gets an error, and doesn't
/// send for ever.
pub(crate) fn server_gone_in_upload() -> Outcome {
    let server = Server::vsock(5102)?;
    let proxy = proxy("unix:///upload.sock", "vsock://local:5102")?;
    let client = connect_unix("/upload.sock")?;
    let accepted = server.accept()?;
    send_pattern(&client, 24, MIB / 8)?;
    (&accepted).read_exact(&mut [0; 1024])?;
    drop(accepted);
    let why = write_until_told(&client, LATER)?;
    let kind = why.kind();
    let told = matches!(kind, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset);
    ensure!(told, "the client was told {why}");
    is_idle(&proxy, SOON)
}

/// Checks a listener that closes before it has accepted the connection: the client's connection
/// ends.
pub(crate) fn listener_gone_unaccepted() -> Outcome {
    let server = Server::vsock(5103)?;
    let proxy = proxy("unix:///unaccepted.sock", "vsock://local:5103")?;
    let mut client = connect_unix("/unaccepted.sock")?;
    client.write_all(b"is anybody there?")?;
    ensure!(eventually(SOON, || sent(&proxy) > 0), "not delivered");
    drop(server);
    client.set_read_timeout(Some(SOON))?;
    match client.read(&mut [0; 16]) {
        Ok(0) => {}
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        other => return Err(format!("the client read {other:?}").into()),
    }
    drop(client);
    is_idle(&proxy, LATER)
}

/// Checks an upload that a reset breaks off: the server doesn't see a half-close, which would make
/// the upload look complete.
pub(crate) fn broken_upload() -> Outcome {
    let server = Server::vsock(5104)?;
    let proxy = proxy("tcp://127.0.0.1:0", "vsock://local:5104")?;
    let listen = proxy.forwards()[0].listen.to_string();
    let mut client = TcpStream::connect(listen.trim_start_matches("tcp://"))?;
    client.write_all(&[7; 4096])?;
    let mut accepted = server.accept()?;
    accepted.read_exact(&mut [0; 4096])?;
    SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    drop(client);
    accepted.set_read_timeout(Some(SOON))?;
    let ended = accepted.read(&mut [0; 16]);
    println!("# broken upload: the server reads {ended:?}");
    let is_end = |kind| matches!(kind, ErrorKind::ConnectionReset | ErrorKind::NotConnected);
    match ended {
        Ok(0) => {}
        Err(e) if is_end(e.kind()) => {}
        other => return Err(format!("the server read {other:?}").into()),
    }
    let why = write_until_told(&accepted, SOON)?;
    println!("# broken upload: the server writes into {why}");
    is_idle(&proxy, SOON)
}

/// Checks a server that reads late: the client has to wait, in bounded memory, and every byte
/// arrives.
pub(crate) fn server_does_not_read() -> Outcome {
    let server = Server::vsock(5105)?;
    let proxy = proxy("unix:///slow.sock", "vsock://local:5105")?;
    let client = connect_unix("/slow.sock")?;
    let accepted = server.accept()?;
    let sender = client.try_clone()?;
    let sending = thread::spawn(move || {
        send_pattern(&sender, 26, 8 * MIB).and_then(|()| sender.shutdown(Shutdown::Write))
    });
    thread::sleep(Duration::from_secs(1));
    println!(
        "# a server that doesn't read was sent {} bytes",
        sent(&proxy)
    );
    ensure!(sent(&proxy) < BOUND, "{} bytes went on", sent(&proxy));
    expect_pattern(&accepted, 26, 8 * MIB)?;
    sending.join().map_err(|_| "the sender panicked")??;
    drop((accepted, client));
    is_idle(&proxy, SOON)
}

/// Checks the same from the other end: a vsock client that reads its answer late.
pub(crate) fn client_does_not_read() -> Outcome {
    let server = Server::unix("/slow-server.sock")?;
    let proxy = proxy("vsock://:5106", "unix:///slow-server.sock")?;
    let client = connect_vsock(5106)?;
    let accepted = server.accept()?;
    let sending = thread::spawn(move || send_pattern(&accepted, 27, 8 * MIB));
    thread::sleep(Duration::from_secs(1));
    let came = received(&proxy);
    println!("# a client that doesn't read was sent {came} bytes");
    ensure!(came < BOUND, "{came} bytes went on");
    expect_pattern(&client, 27, 8 * MIB)?;
    sending.join().map_err(|_| "the server panicked")??;
    drop(client);
    is_idle(&proxy, SOON)
}

/// Checks a server that never reads. The upload of a client that has ended is kept until the server
/// ends too; that of a client that breaks off is dropped.
pub(crate) fn never_read() -> Outcome {
    let server = Server::vsock(5107)?;
    let rule = Rule::new("tcp://127.0.0.1:0".parse()?, "vsock://local:5107".parse()?);
    let mut config = ProxyConfig::new(vec![rule]);
    config.rules[0].timeouts.drain = Duration::from_secs(1);
    let proxy = Proxy::start(config)?;
    let listen = proxy.forwards()[0].listen.to_string();
    for break_off in [false, true] {
        let mut client = TcpStream::connect(listen.trim_start_matches("tcp://"))?;
        let accepted = server.accept()?;
        let before = sent(&proxy);
        client.write_all(&vec![0; MIB / 2])?;
        let full = || sent(&proxy) - before == 256 << 10;
        ensure!(
            eventually(SOON, full),
            "{} bytes went on",
            sent(&proxy) - before
        );
        if break_off {
            SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
        }
        drop(client);
        if break_off {
            is_idle(&proxy, SOON)?;
            let why = write_until_told(&accepted, SOON)?;
            ensure!(
                why.kind() == ErrorKind::BrokenPipe,
                "the server was told {why}"
            );
        } else {
            thread::sleep(Duration::from_secs(2));
            ensure!(live(&proxy) == 1, "it was given up");
            drop(accepted);
            is_idle(&proxy, SOON)?;
        }
    }
    Ok(())
}
