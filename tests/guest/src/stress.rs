//! Checks of `hvsock stress` and `hvsock cat` over AF_VSOCK loopback, and of the library's own
//! sockets.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use hvsock::address::{CID_ANY, CID_LOCAL, PORT_ANY, Port, VsockAddress};
use hvsock::{Listener, Stream, vsock};

use crate::pattern::{expect_pattern, send_pattern};
use crate::promptly::within_a_second;
use crate::report::{Outcome, ensure, eventually};
use crate::sockets::{Server, connect_vsock};
use crate::tools::{Tool, cat_echo, cat_refused, stress};

const HVSOCK: &str = "/hvsock";
const MIB: usize = 1024 * 1024;

/// Checks a server for all loads: 200 clients at a time, 64 MiB in both directions, in one, and
/// echoed. It ends without SIGTERM.
pub(crate) fn all_loads() -> Outcome {
    let hvsock = Path::new(HVSOCK);
    let mut server = Tool::start(hvsock, "stress --server vsock://:8100")?;
    wait_for_line(&mut server)?;
    for words in [
        "-n 400 -p 200 vsock://local:8100",
        "-n 1 --size 64M vsock://local:8100",
        "--bench up --size 32M vsock://local:8100",
        "--bench down --size 32M vsock://local:8100",
        "--bench rtt --round-trips 200 vsock://local:8100",
    ] {
        stress(hvsock, words).map_err(|e| format!("{words}: {e}"))?;
    }
    cat_echo(hvsock, "vsock://local:8100", 64 * MIB)
}

/// Checks `cat -l` with a client that half-closes first, then with one that does so last.
pub(crate) fn cat_listens() -> Outcome {
    for client_first in [true, false] {
        let cat = Tool::start(Path::new(HVSOCK), "cat -l vsock://:8101")?;
        let mut client = None;
        eventually(Duration::from_secs(10), || {
            client = connect_vsock(8101).ok();
            client.is_some()
        });
        let client = client.ok_or("it doesn't listen")?;
        let side = thread::spawn(move || -> Outcome {
            if client_first {
                send_pattern(&client, 91, MIB)?;
                client.shutdown(Shutdown::Write)?;
                return expect_pattern(&client, 92, MIB);
            }
            expect_pattern(&client, 92, MIB)?;
            send_pattern(&client, 91, MIB)?;
            Ok(client.shutdown(Shutdown::Write)?)
        });
        cat.exchange((92, MIB), (91, MIB))
            .map_err(|e| format!("client first: {client_first}: {e}"))?;
        side.join().map_err(|_| "the client panicked")??;
    }
    Ok(())
}

pub(crate) fn cat_is_refused() -> Outcome {
    within_a_second(|| cat_refused(Path::new(HVSOCK), "vsock://local:8999").map(|()| None))
}

/// Checks that `--wait` finds a server that starts later.
pub(crate) fn cat_waits() -> Outcome {
    let mut cat = Tool::start(Path::new(HVSOCK), "cat --wait 20 vsock://local:8102")?;
    let stdin = cat.0.stdin.as_mut().ok_or("no pipe")?;
    stdin.write_all(b"at last")?;
    let server = Server::vsock(8102)?;
    let mut client = server.accept()?;
    let mut heard = [0; 7];
    client.read_exact(&mut heard)?;
    ensure!(&heard == b"at last", "it said {heard:?}");
    client.write_all(b"indeed")?;
    drop(client);
    let (code, said) = cat.end()?;
    ensure!(code == Some(0) && said == "indeed", "{code:?}, {said:?}");
    Ok(())
}

/// Checks the library's streams: half-close, the peer's CID, its port.
pub(crate) fn blocking_sockets() -> Outcome {
    let listener = vsock::Listener::bind(&VsockAddress::new(CID_ANY, PORT_ANY))?;
    let bound = listener.local_addr()?.port;
    ensure!(bound != PORT_ANY, "no port was chosen");
    let mut client = vsock::Stream::connect(&VsockAddress::new(CID_LOCAL, bound))?;
    let (mut server, peer) = listener.accept()?;
    ensure!(
        (peer.cid, peer.port > Port(1023)) == (1, true),
        "the peer is {peer}"
    );
    ensure!(
        client.peer_addr()?.port == bound,
        "it is connected elsewhere"
    );
    client.write_all(b"request")?;
    client.shutdown(Shutdown::Write)?;
    let mut request = String::new();
    server.read_to_string(&mut request)?;
    server.write_all(b"answer")?;
    drop(server);
    let mut answer = String::new();
    client.read_to_string(&mut answer)?;
    ensure!((&*request, &*answer) == ("request", "answer"), "{answer:?}");
    let none = listener.accept_timeout(Duration::from_millis(50))?;
    ensure!(none.is_none(), "a connection from nobody");
    let refused = Stream::connect(&"vsock://local:8999".parse()?);
    let kind = refused.map(drop).map_err(|e| e.kind());
    ensure!(
        kind == Err(ErrorKind::ConnectionReset),
        "refused by {kind:?}"
    );
    let cid = hvsock::vsock::local_cid()?;
    println!("# with loopback alone the local CID is {cid}");
    Ok(())
}

/// Checks that a client may send ahead as far as the addresses say. Newer kernels hold a sender to
/// its own buffer's size, too.
pub(crate) fn buffer_sizes() -> Outcome {
    for (size, query) in [(256 * 1024, ""), (MIB, "?buffer-size=1048576")] {
        let listener = Listener::bind(&format!("vsock://:8103{query}").parse()?)?;
        let mut client = Stream::connect(&format!("vsock://local:8103{query}").parse()?)?;
        let (_server, _) = listener.accept()?;
        client.set_nonblocking(true)?;
        let mut sent = 0;
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            match client.write(&[0; 4096]) {
                Ok(n) => sent += n,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => return Err(e.into()),
            }
        }
        ensure!(sent == size, "{sent} bytes went, {size} were to go");
    }
    Ok(())
}

/// Waits until it has written a line to standard output.
fn wait_for_line(tool: &mut Tool) -> Outcome {
    let mut byte = [0];
    let stdout = tool.0.stdout.as_mut().ok_or("no pipe")?;
    while byte != *b"\n" {
        stdout.read_exact(&mut byte)?;
    }
    Ok(())
}
