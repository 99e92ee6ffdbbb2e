//! The services that both ends of a VM offer for the checks, and their clients: for the guest and,
//! included by path, for the driver on the host. Sockets of every family are held as std's Unix
//! stream.

use std::collections::VecDeque;
use std::error::Error;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::pattern::{expect_pattern, receive_pattern, send_pattern};

type Failure = Box<dyn Error + Send + Sync>;
pub(crate) type Outcome = Result<(), Failure>;

/// Sends back what comes, and the EOF after it.
pub(crate) fn echo(mut client: UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        if client.write_all(&buffer[..n]).is_err() {
            return;
        }
    }
    let _ = client.shutdown(Shutdown::Write);
}

/// What a client asks of [`ask`] and [`tell`], sent first.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    /// Milliseconds to wait before anything else.
    pub(crate) wait: u64,
    /// Bytes to the server: the pattern of this seed.
    pub(crate) up: usize,
    /// Bytes to the client: the pattern of the next seed.
    pub(crate) down: usize,
    pub(crate) seed: u64,
}

impl Request {
    pub(crate) fn send(&self, mut to: &UnixStream) -> io::Result<()> {
        let fields = [self.wait, self.up as u64, self.down as u64, self.seed];
        let bytes: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        to.write_all(&bytes)
    }

    fn read(mut from: &UnixStream) -> io::Result<Request> {
        let mut field = || -> io::Result<u64> {
            let mut bytes = [0; 8];
            from.read_exact(&mut bytes)?;
            Ok(u64::from_le_bytes(bytes))
        };
        Ok(Request {
            wait: field()?,
            up: field()? as usize,
            down: field()? as usize,
            seed: field()?,
        })
    }
}

/// Answers after it has read to its client's EOF, and only if what came is right.
pub(crate) fn ask(client: UnixStream) {
    let answer = || -> Outcome {
        let request = Request::read(&client)?;
        thread::sleep(Duration::from_millis(request.wait));
        expect_pattern(&client, request.seed, request.up)?;
        send_pattern(&client, request.seed + 1, request.down)?;
        Ok(client.shutdown(Shutdown::Write)?)
    };
    let _ = answer();
}

/// The results of those clients of [`tell`] that sent something.
pub(crate) static VERDICTS: Mutex<VecDeque<Result<(), String>>> = Mutex::new(VecDeque::new());

/// Returns the next of [`VERDICTS`], or an error if none comes in time.
pub(crate) fn verdict() -> Result<(), String> {
    for _ in 0..6000 {
        let next = VERDICTS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop_front();
        if let Some(verdict) = next {
            return verdict;
        }
        thread::sleep(Duration::from_millis(10));
    }
    Err("the server has not come to an end".to_owned())
}

/// Sends and ends first. If its client is to send nothing, it closes; otherwise it half-closes, and
/// reads what the client sends after that, and its EOF.
pub(crate) fn tell(client: UnixStream) {
    let Ok(request) = Request::read(&client) else {
        return;
    };
    let tell = || -> Outcome {
        thread::sleep(Duration::from_millis(request.wait));
        send_pattern(&client, request.seed + 1, request.down)?;
        if request.up == 0 {
            // Closes, as a server does after its answer.
            return Ok(());
        }
        client.shutdown(Shutdown::Write)?;
        expect_pattern(&client, request.seed, request.up)
    };
    let verdict = tell().map_err(|e| e.to_string());
    if request.up > 0 {
        VERDICTS
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push_back(verdict);
    }
}

/// How a client of [`echo`] ends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It half-closes after its last byte and reads to EOF.
    HalfClose,
    /// It closes when it has all that it wants: for a peer that knows no half-close.
    Close,
}

/// Checks that every byte comes back, in order.
pub(crate) fn echo_client(client: &UnixStream, seed: u64, bytes: usize, end: End) -> Outcome {
    let sender = client.try_clone()?;
    let sending = thread::spawn(move || {
        send_pattern(&sender, seed, bytes)?;
        match end {
            End::HalfClose => sender.shutdown(Shutdown::Write),
            End::Close => Ok(()),
        }
    });
    let received = match end {
        End::HalfClose => expect_pattern(client, seed, bytes),
        End::Close => receive_pattern(client, seed, bytes),
    };
    if received.is_err() {
        // The sender may be blocked otherwise.
        let _ = client.shutdown(Shutdown::Both);
    }
    let sent = sending.join().map_err(|_| "the sender panicked")?;
    received?;
    Ok(sent?)
}

/// Checks that the whole answer of [`ask`] arrives after the client has ended.
pub(crate) fn ask_client(client: &UnixStream, request: Request) -> Outcome {
    request.send(client)?;
    send_pattern(client, request.seed, request.up)?;
    client.shutdown(Shutdown::Write)?;
    expect_pattern(client, request.seed + 1, request.down)
}

/// Checks that the whole answer of [`tell`] arrives, which ends first, and then sends. The server
/// checks what arrives of that.
pub(crate) fn tell_client(client: &UnixStream, request: Request) -> Outcome {
    request.send(client)?;
    expect_pattern(client, request.seed + 1, request.down)?;
    send_pattern(client, request.seed, request.up)?;
    Ok(client.shutdown(Shutdown::Write)?)
}

/// Checks clients of [`echo`] that are all connected before any ends.
pub(crate) fn crowd_client(
    clients: usize,
    end: End,
    connect: impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static,
) -> Outcome {
    const BYTES: usize = 32 * 1024;
    let connect = Arc::new(connect);
    let all_there = Arc::new(Barrier::new(clients));
    let (told, outcomes) = channel();
    for seed in 0..clients {
        let (told, all_there) = (told.clone(), Arc::clone(&all_there));
        let connect = Arc::clone(&connect);
        let client = move || -> Outcome {
            let connected = || -> io::Result<UnixStream> {
                let mut client = connect()?;
                client.write_all(b"here")?;
                client.read_exact(&mut [0; 4])?;
                Ok(client)
            };
            let connected = connected();
            all_there.wait();
            echo_client(&connected?, seed as u64 + 10, BYTES, end)
        };
        thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || told.send(client()))?;
    }
    drop(told);
    let failures: Vec<String> = outcomes
        .into_iter()
        .filter_map(|outcome| Some(outcome.err()?.to_string()))
        .collect();
    match failures.first() {
        None => Ok(()),
        Some(first) => Err(format!("{} of {clients} failed: {first}", failures.len()).into()),
    }
}
