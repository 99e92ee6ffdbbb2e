//! Checks of the binary in a guest, in the place of LinuxKit's vsudd: `hvsock forward vsock://:PORT
//! unix:///PATH`.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

use crate::command::Hvsock;
use crate::pattern::{expect_pattern, send_pattern};
use crate::report::{Outcome, ensure, eventually};
use crate::services::echo;
use crate::sockets::{Server, connect_vsock};

const SOON: Duration = Duration::from_secs(3);

/// Checks that it serves, and that SIGTERM ends it with exit code 0.
pub(crate) fn serves_and_ends() -> Outcome {
    Server::unix("/vsudd.sock")?.serve(echo);
    let (hvsock, listen) = Hvsock::forward("vsock://:7000 unix:///vsudd.sock")?;
    ensure!(listen == "vsock://:7000", "it listens on {listen}");
    let client = connect_vsock(7000)?;
    send_pattern(&client, 40, 256 * 1024)?;
    client.shutdown(Shutdown::Write)?;
    expect_pattern(&client, 40, 256 * 1024)?;
    drop(client);
    hvsock.terminate()?;
    let (status, said) = hvsock.end(SOON)?;
    ensure!(status.code() == Some(0), "it ended with {status}: {said}");
    match connect_vsock(7000) {
        Ok(_) => Err("somebody listens there still".into()),
        Err(_) => Ok(()),
    }
}

/// Checks that after SIGTERM it accepts no new clients, but lets its connections finish.
pub(crate) fn lets_finish() -> Outcome {
    Server::unix("/finish.sock")?.serve(echo);
    let (hvsock, _) = Hvsock::forward("vsock://:7003 unix:///finish.sock")?;
    let mut client = connect_vsock(7003)?;
    client.write_all(b"before")?;
    client.read_exact(&mut [0; 6])?;
    hvsock.terminate()?;
    ensure!(hvsock.says("stopping", SOON), "it said: {}", hvsock.said());
    let refused = eventually(SOON, || connect_vsock(7003).is_err());
    ensure!(refused, "it takes new clients still");
    client.write_all(b"after")?;
    client.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    client.read_to_end(&mut answer)?;
    ensure!(answer == b"after", "it answered {answer:?}");
    let (status, said) = hvsock.end(SOON)?;
    ensure!(status.code() == Some(0), "it ended with {status}: {said}");
    Ok(())
}
