//! Checks of AF_VSOCK in the frames of ocaml-hvsock's `flow_shutdown`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use crate::pattern::{expect_pattern, send_pattern};
use crate::report::{Outcome, ensure};
use crate::services::echo;
use crate::sockets::{Bridge, Server, connect_unix, connect_vsock, proxy};

const SOON: Duration = Duration::from_secs(5);
const MIB: usize = 1024 * 1024;

/// Checks two proxies that speak in frames between them: every byte arrives, and the half-close
/// before the answer.
pub(crate) fn through_two_proxies() -> Outcome {
    let server = Server::unix("/framed.sock")?;
    let bridge = Bridge::start_with("/framed-near.sock", 5120, "/framed.sock", "?framing=yes")?;
    let serving = thread::spawn(move || -> Outcome {
        let client = server.accept()?;
        expect_pattern(&client, 60, 8 * MIB)?;
        send_pattern(&client, 61, 8 * MIB)?;
        Ok(())
    });
    let client = connect_unix("/framed-near.sock")?;
    send_pattern(&client, 60, 8 * MIB)?;
    client.shutdown(Shutdown::Write)?;
    expect_pattern(&client, 61, 8 * MIB)?;
    serving.join().map_err(|_| "the server panicked")??;
    drop(client);
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    for counters in bridge.counters() {
        ensure!(counters.abandoned == 0, "abandoned: {counters:?}");
    }
    Ok(())
}

/// Checks what is on the wire, for a peer that knows the frames alone.
pub(crate) fn on_the_wire() -> Outcome {
    Server::unix("/wire.sock")?.serve(echo);
    let _proxy = proxy("vsock://:5121?framing=yes", "unix:///wire.sock")?;
    let mut peer = connect_vsock(5121)?;
    peer.write_all(&[2, 0, 0, 0, b'h', b'i'])?;
    let mut frame = [0; 6];
    peer.read_exact(&mut frame)?;
    ensure!(frame == [2, 0, 0, 0, b'h', b'i'], "{frame:?}");
    // This side has ended, so the echo server ends too, and then closes.
    peer.write_all(&0xbeef_dead_u32.to_le_bytes())?;
    let mut mark = [0; 4];
    peer.read_exact(&mut mark)?;
    ensure!(u32::from_le_bytes(mark) == 0xbeef_dead, "{mark:?}");
    peer.read_exact(&mut mark)?;
    ensure!(u32::from_le_bytes(mark) == 0xdead_dead, "{mark:?}");
    peer.write_all(&0xdead_dead_u32.to_le_bytes())?;
    ensure!(peer.read(&mut mark)? == 0, "it isn't closed");
    Ok(())
}
