//! What a client sees of a program between it and its server.

use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use crate::common::{PATIENCE, pattern};
use crate::place::{Place, Stream};
use crate::program::{Program, is_installed};
use crate::table::Line;

/// Whether the answer to a half-close may take its time with the other program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Late {
    Answered,
    Dropped,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// The bytes that come where nobody serves, and then the end.
    refused: Vec<u8>,
    /// The bytes that come back of those that are sent to an echo, and nothing after its end.
    echoed: usize,
    /// What a server says that speaks first and ends.
    end: String,
    /// What one says that answers a second after all has come.
    late: Option<String>,
}

const LENGTH: usize = 300_000;

impl Seen {
    pub(crate) fn expected(late: Late) -> Seen {
        Seen {
            refused: Vec::new(),
            echoed: LENGTH,
            end: "bye\n".to_owned(),
            late: (late == Late::Answered).then(|| format!("{LENGTH} have come")),
        }
    }
}

/// Serves one client there.
pub(crate) fn serve<T: Send + 'static>(
    back: Place,
    serve: impl FnOnce(Stream) -> T + Send + 'static,
) -> Receiver<T> {
    let listener = back.listen();
    let (told, answer) = channel();
    thread::spawn(move || {
        let client = listener.accept();
        drop(listener);
        let _ = told.send(serve(client));
    });
    answer
}

pub(crate) fn echo(mut client: Stream) {
    let mut buffer = [0; 16 * 1024];
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        client.write_all(&buffer[..n]).unwrap();
    }
}

/// Serves one client as `hello` wants it, see [`hello`].
pub(crate) fn greet(mut client: Stream) {
    client.read_exact(&mut [0; 6]).unwrap();
    client.write_all(b"world\n").unwrap();
}

/// A short message, its answer and the end.
pub(crate) fn hello(mut client: Stream) -> String {
    client.write_all(b"hello\n").unwrap();
    client.rest()
}

/// Looks at a program that listens at `front` and leads to `back`.
pub(crate) fn look(front: Place, back: Place, late: Late) -> Seen {
    let refused = front.connect().read_to_end_or_reset();
    let served = serve(back, echo);
    let client = front.connect();
    let sent = pattern(LENGTH);
    let mut received = vec![0; LENGTH];
    thread::scope(|scope| {
        scope.spawn(|| (&client).write_all(&sent).unwrap());
        (&client).read_exact(&mut received).unwrap();
    });
    assert!(received == sent, "other bytes come back");
    client.half_close();
    let echoed = received.len() + client.read_to_end_or_reset().len();
    served.recv_timeout(PATIENCE).unwrap();
    let served = serve(back, |mut client| client.write_all(b"bye\n").unwrap());
    let end = front.connect().rest();
    served.recv_timeout(PATIENCE).unwrap();
    let late = (late == Late::Answered).then(|| {
        let served = serve(back, |mut client| {
            let count = io::copy(&mut client, &mut io::sink()).unwrap();
            thread::sleep(Duration::from_secs(1));
            client
                .write_all(format!("{count} have come").as_bytes())
                .unwrap();
        });
        let mut client = front.connect();
        client.write_all(&sent).unwrap();
        client.half_close();
        let answer = client.rest();
        served.recv_timeout(PATIENCE).unwrap();
        answer
    });
    Seen {
        refused,
        echoed,
        end,
        late,
    }
}

/// Asserts that a command of ours, which runs, is what it has to be.
pub(crate) fn is_sound(front: Place, back: Place) {
    assert_eq!(
        look(front, back, Late::Answered),
        Seen::expected(Late::Answered)
    );
}

/// Runs the other program, and ours, and calls `then` with each while it listens at `front`.
pub(crate) fn each<T>(
    line: &Line,
    front: Place,
    mut then: impl FnMut(&mut Program) -> T,
) -> Pair<T> {
    let mut run = |words: &str| {
        let mut program = Program::listening(words, front);
        let seen = then(&mut program);
        program.terminate();
        front.wait_until_nobody_listens();
        seen
    };
    let name = line.theirs.split(' ').next().unwrap();
    Pair {
        theirs: is_installed(name).then(|| run(&line.theirs)),
        ours: run(&line.ours[0]),
    }
}

/// What was seen of both.
pub(crate) struct Pair<T> {
    pub(crate) theirs: Option<T>,
    pub(crate) ours: T,
}

impl<T: PartialEq + std::fmt::Debug> Pair<T> {
    /// Asserts that the same is seen, and that.
    pub(crate) fn are(&self, expected: &T) {
        assert_eq!(&self.ours, expected, "ours");
        if let Some(theirs) = &self.theirs {
            assert_eq!(theirs, expected, "the other program");
        }
    }
}

/// Compares the two programs of a line in all that a client sees.
pub(crate) fn both(line: &Line, front: Place, back: Place, late: Late) {
    each(line, front, |_| look(front, back, late)).are(&Seen::expected(late));
    if late == Late::Dropped {
        let ours = Program::listening(&line.ours[0], front);
        is_sound(front, back);
        ours.terminate();
    }
}

/// Whether a second client waits until the first has ended, where one may be there at a time.
pub(crate) fn second_waits(front: Place, back: Place) -> bool {
    let listener = back.listen();
    let mut first = front.connect();
    first.write_all(b"1").unwrap();
    let mut of_first = listener.accept();
    of_first.read_exact(&mut [0]).unwrap();
    let mut second = front.connect();
    // One that is refused may have been reset before.
    let _ = second.write_all(b"2");
    second.hurry(Duration::from_millis(300));
    match second.read(&mut [0]) {
        Ok(0) => return false,
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return false,
        other => assert!(other.is_err(), "who says that?"),
    }
    if listener.has_client() {
        return false;
    }
    drop((first, of_first));
    let mut byte = [0];
    listener.accept().read_exact(&mut byte).unwrap();
    byte == *b"2"
}
