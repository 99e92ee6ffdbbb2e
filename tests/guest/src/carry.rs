//! Checks of two proxies in a row over AF_VSOCK: Unix socket -> vsock -> Unix socket.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use crate::pattern::{expect_pattern, receive_pattern, send_pattern};
use crate::report::{Outcome, ensure, eventually};
use crate::services::echo;
use crate::sockets::{Bridge, Server, connect_unix};

const SOON: Duration = Duration::from_secs(5);
const MIB: usize = 1024 * 1024;

/// Checks that every byte of 64 MiB comes back, in order.
pub(crate) fn echo_64_mib() -> Outcome {
    Server::unix("/echo.sock")?.serve(echo);
    let bridge = Bridge::start("/echo-near.sock", 5000, "/echo.sock")?;
    let client = connect_unix("/echo-near.sock")?;
    let sender = client.try_clone()?;
    let sending = thread::spawn(move || {
        send_pattern(&sender, 1, 64 * MIB).and_then(|()| sender.shutdown(Shutdown::Write))
    });
    expect_pattern(&client, 1, 64 * MIB)?;
    sending.join().map_err(|_| "the sender panicked")??;
    drop(client);
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    for counters in bridge.counters() {
        let both = (counters.sent, counters.received);
        ensure!(both == (64 << 20, 64 << 20), "counted {counters:?}");
    }
    Ok(())
}

/// Checks a client that ends first: the server reads its EOF, and only then answers.
pub(crate) fn client_ends_first() -> Outcome {
    let server = Server::unix("/asked.sock")?;
    let bridge = Bridge::start("/asked-near.sock", 5001, "/asked.sock")?;
    let serving = thread::spawn(move || -> Outcome {
        let client = server.accept()?;
        expect_pattern(&client, 2, MIB)?;
        thread::sleep(Duration::from_millis(100));
        send_pattern(&client, 3, MIB)?;
        Ok(())
    });
    let client = connect_unix("/asked-near.sock")?;
    send_pattern(&client, 2, MIB)?;
    client.shutdown(Shutdown::Write)?;
    expect_pattern(&client, 3, MIB)?;
    serving.join().map_err(|_| "the server panicked")??;
    drop(client);
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    Ok(())
}

/// Checks a server that ends first and goes on reading: what the client sends after that EOF
/// arrives, and its own EOF.
pub(crate) fn server_ends_first() -> Outcome {
    let server = Server::unix("/told.sock")?;
    let bridge = Bridge::start("/told-near.sock", 5002, "/told.sock")?;
    let serving = thread::spawn(move || -> Outcome {
        let client = server.accept()?;
        send_pattern(&client, 4, MIB)?;
        client.shutdown(Shutdown::Write)?;
        expect_pattern(&client, 5, MIB)
    });
    let client = connect_unix("/told-near.sock")?;
    expect_pattern(&client, 4, MIB)?;
    thread::sleep(Duration::from_millis(100));
    send_pattern(&client, 5, MIB)?;
    client.shutdown(Shutdown::Write)?;
    serving.join().map_err(|_| "the server panicked")??;
    drop(client);
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    Ok(())
}

/// Checks 200 clients at a time, all connected before any ends.
pub(crate) fn parallel_200() -> Outcome {
    const CLIENTS: usize = 200;
    Server::unix("/crowd.sock")?.serve(echo);
    let bridge = Bridge::start("/crowd-near.sock", 5003, "/crowd.sock")?;
    let all_there = Arc::new(Barrier::new(CLIENTS));
    let (told, outcomes) = channel();
    for seed in 0..CLIENTS {
        let (told, all_there) = (told.clone(), Arc::clone(&all_there));
        thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || {
                let client = || -> Result<UnixStream, Box<dyn std::error::Error + Send + Sync>> {
                    let mut client = connect_unix("/crowd-near.sock")?;
                    client.write_all(b"here")?;
                    client.read_exact(&mut [0; 4])?;
                    Ok(client)
                };
                let client = client();
                all_there.wait();
                let ended = client.and_then(|client| {
                    let seed = seed as u64 + 10;
                    send_pattern(&client, seed, 32 * 1024)?;
                    client.shutdown(Shutdown::Write)?;
                    expect_pattern(&client, seed, 32 * 1024)
                });
                told.send(ended)
            })?;
    }
    drop(told);
    let mut count = 0;
    for outcome in outcomes {
        outcome?;
        count += 1;
    }
    ensure!(count == CLIENTS, "{count} told");
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    for counters in bridge.counters() {
        ensure!(
            counters.accepted == CLIENTS as u64 && counters.refused == 0,
            "{counters:?}"
        );
    }
    Ok(())
}

/// Checks 16 connections, each with 2 MiB in each direction at once: no lost wakeup stalls one.
pub(crate) fn parallel_streams() -> Outcome {
    const BYTES: usize = 2 * MIB;
    let server = Server::unix("/streams.sock")?;
    server.serve(|client| {
        let Ok(reader) = client.try_clone() else {
            return;
        };
        let reading = thread::spawn(move || expect_pattern(&reader, 6, BYTES));
        let sent = send_pattern(&client, 7, BYTES);
        // The client notices an EOF that comes before all bytes.
        if sent.is_ok() && matches!(reading.join(), Ok(Ok(()))) {
            let _ = (&client).write_all(b"all of it");
        }
    });
    let bridge = Bridge::start("/streams-near.sock", 5005, "/streams.sock")?;
    let mut clients = Vec::new();
    for _ in 0..16 {
        clients.push(thread::spawn(move || -> Outcome {
            let mut client = connect_unix("/streams-near.sock")?;
            let sender = client.try_clone()?;
            let sending = thread::spawn(move || {
                send_pattern(&sender, 6, BYTES).and_then(|()| sender.shutdown(Shutdown::Write))
            });
            receive_pattern(&client, 7, BYTES)?;
            sending.join().map_err(|_| "the sender panicked")??;
            let mut verdict = Vec::new();
            client.read_to_end(&mut verdict)?;
            ensure!(verdict == b"all of it", "the server missed something");
            Ok(())
        }));
    }
    for client in clients {
        client.join().map_err(|_| "a client panicked")??;
    }
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    Ok(())
}

/// Checks that 500 clients, one after the other, leave no open descriptor.
pub(crate) fn sequence_500() -> Outcome {
    Server::unix("/queue.sock")?.serve(echo);
    let bridge = Bridge::start("/queue-near.sock", 5004, "/queue.sock")?;
    let once = || -> Outcome {
        let mut client = connect_unix("/queue-near.sock")?;
        client.write_all(b"in a queue")?;
        client.shutdown(Shutdown::Write)?;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer)?;
        ensure!(answer == b"in a queue", "it answered {answer:?}");
        Ok(())
    };
    once()?;
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    let before = descriptors();
    for number in 0..500 {
        once().map_err(|e| format!("client {number}: {e}"))?;
    }
    ensure!(bridge.is_idle(SOON), "still there: {:?}", bridge.counters());
    let gone = eventually(SOON, || descriptors() <= before);
    ensure!(gone, "{before} descriptors before, {} after", descriptors());
    Ok(())
}

/// Returns how many descriptors this process has open, including the one that lists them.
fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}
