//! Checks of what `hvsock` says when AF_VSOCK is unavailable.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::command::Hvsock;
use crate::report::{Outcome, ensure, eventually};
use crate::services::echo;
use crate::sockets::{Server, connect_unix, connect_vsock, proxy};

const SOON: Duration = Duration::from_secs(3);

/// Checks that without AF_VSOCK in the kernel it fails at once, and names the module.
pub(crate) fn no_vsock_module() -> Outcome {
    listening_fails(
        0,
        "vsock://:7000",
        "; the kernel has no AF_VSOCK: modprobe vsock",
    )
}

/// Checks that with AF_VSOCK but no transport connecting fails, and names the module.
pub(crate) fn no_loopback_module() -> Outcome {
    told_and_reset("vsock://1:7000", "vsock_loopback")
}

/// Checks a port without a listener: the client is reset within a second, and the log says why.
pub(crate) fn refused_port() -> Outcome {
    told_and_reset("vsock://1:7001", "does a program listen on that vsock port")
}

/// Checks a CID that no VM has.
pub(crate) fn no_such_cid() -> Outcome {
    told_and_reset("vsock://77:7000", "no VM has that CID")
}

/// Checks an address without a CID: one may listen on it, not connect to it.
pub(crate) fn no_cid() -> Outcome {
    let hvsock = Hvsock::start(0, "forward tcp://127.0.0.1:0 vsock://:7000")?;
    let (status, said) = hvsock.end(SOON)?;
    ensure!(status.code() == Some(2), "it ended with {status}");
    ensure!(said.contains("no CID to connect to"), "it said: {said}");
    Ok(())
}

pub(crate) fn privileged_port() -> Outcome {
    listening_fails(1000, "vsock://:80", "; ports below 1024 need rights")
}

pub(crate) fn foreign_cid() -> Outcome {
    listening_fails(
        0,
        "vsock://77:7000",
        "this system has CID 1: leave the CID out",
    )
}

/// Checks the highest port, which is VMADDR_PORT_ANY to the kernel: the port that the kernel then
/// chooses is printed.
pub(crate) fn any_port() -> Outcome {
    Server::unix("/any.sock")?.serve(echo);
    let (_hvsock, listen) = Hvsock::forward("vsock://:4294967295 unix:///any.sock")?;
    println!("# listening on {listen}");
    let port = listen.trim_start_matches("vsock://:").parse()?;
    ensure!(port != u32::MAX, "it says that it listens on {listen}");
    let mut client = connect_vsock(port)?;
    client.write_all(b"here")?;
    client.read_exact(&mut [0; 4])?;
    Ok(())
}

pub(crate) fn port_in_use() -> Outcome {
    let (_first, _) = Hvsock::forward("vsock://:7002 unix:///nobody")?;
    listening_fails(0, "vsock://:7002", " listens there (forward vsock://:7002)")
}

/// Checks a listener whose backlog is full. In AF_VSOCK that looks like a refusal: further clients
/// are reset, and none waits.
pub(crate) fn full_backlog() -> Outcome {
    let server = Server::vsock_with_backlog(7004, 1)?;
    let proxy = proxy("unix:///backlog.sock", "vsock://local:7004")?;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(connect_unix("/backlog.sock")?);
    }
    let counted = || proxy.forwards()[0].counters;
    let told = eventually(SOON, || {
        counted().live + counted().refused == 8 && counted().refused > 0
    });
    ensure!(told, "{:?}", counted());
    println!("# a backlog of 1 takes {} connections", counted().live);
    // Those that wait there look the same as those that are about to be refused.
    server.serve(echo);
    drop(clients);
    ensure!(eventually(SOON, || counted().live == 0), "{:?}", counted());
    Ok(())
}

/// Checks that `hvsock forward` can't listen there: exit code 1, and an error of one line with this
/// remedy.
fn listening_fails(user: u32, address: &str, remedy: &str) -> Outcome {
    let hvsock = Hvsock::start(user, &format!("forward {address} unix:///nobody"))?;
    let (status, said) = hvsock.end(SOON)?;
    print!("# {said}");
    ensure!(status.code() == Some(1), "it ended with {status}");
    let start = format!("hvsock: cannot listen on {address}: ");
    ensure!(said.starts_with(&start), "it said: {said}");
    ensure!(said.contains(remedy), "it said: {said}");
    ensure!(said.lines().count() == 1, "it said too much: {said}");
    Ok(())
}

/// Checks that a TCP client of a proxy to `address` is reset within a second, and that the log has
/// this remedy.
fn told_and_reset(address: &str, remedy: &str) -> Outcome {
    let pair = format!("--dial-timeout 5 tcp://127.0.0.1:0 {address}");
    let (hvsock, listen) = Hvsock::forward(&pair)?;
    let start = Instant::now();
    // The reset may come before connect(2) returns.
    let answer = TcpStream::connect(listen.trim_start_matches("tcp://")).and_then(|mut client| {
        client.set_read_timeout(Some(SOON))?;
        client.read(&mut [0; 16])
    });
    match answer {
        Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
        other => return Err(format!("the client read {other:?}; {}", hvsock.said()).into()),
    }
    let took = start.elapsed();
    ensure!(took < Duration::from_secs(1), "only after {took:?}");
    ensure!(hvsock.says(remedy, SOON), "it said: {}", hvsock.said());
    print!("# {}", hvsock.said());
    let subject = format!("cannot connect to {address}: ");
    ensure!(
        hvsock.said().contains(&subject),
        "it said: {}",
        hvsock.said()
    );
    Ok(())
}
