use super::*;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::AtomicUsize;
use std::thread;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0;
    for stream in [&client, &server] {
        let patience = Some(std::time::Duration::from_secs(20));
        stream.set_read_timeout(patience).unwrap();
    }
    (client, server)
}

/// Takes and gives one byte at a time, and wants to be asked twice for each.
#[derive(Debug, Default)]
struct Slow {
    come: Mutex<Vec<u8>>,
    went: Mutex<Vec<u8>>,
    asked: AtomicUsize,
}

impl Slow {
    fn not_yet(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed).is_multiple_of(2)
    }
}

impl Read for &Slow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut come = lock(&self.come);
        match come.first() {
            _ if self.not_yet() => Err(io::ErrorKind::WouldBlock.into()),
            Some(_) => {
                buffer[0] = come.remove(0);
                Ok(1)
            }
            None => Ok(0),
        }
    }
}

impl Write for &Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.not_yet() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        lock(&self.went).push(bytes[0]);
        Ok(1)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Asks until it says something else than that it would block.
fn insist<T>(mut ask: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match ask() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

fn kind<T: std::fmt::Debug>(result: io::Result<T>) -> io::ErrorKind {
    result.unwrap_err().kind()
}

#[test]
fn the_answer_follows_the_half_close() {
    let (client, server) = pair();
    let (client, server) = (Framed::new(client), Framed::new(server));
    let request: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
    thread::scope(|scope| {
        let serving = scope.spawn(|| {
            let mut all = Vec::new();
            (&server).read_to_end(&mut all).unwrap();
            (&server).write_all(&all).unwrap();
            server.shutdown(Shutdown::Write).unwrap();
            all
        });
        (&client).write_all(&request).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(kind((&client).write(b"more")), io::ErrorKind::BrokenPipe);
        let mut answer = Vec::new();
        (&client).read_to_end(&mut answer).unwrap();
        assert!(answer == request && serving.join().unwrap() == request);
    });
    // Both may close at once.
    thread::scope(|scope| {
        scope.spawn(|| server.close().unwrap());
        client.close().unwrap();
    });
}

#[test]
fn the_wire_is_as_ocaml_hvsock_has_it() {
    let (client, mut server) = pair();
    let framed = Framed::new(client);
    (&framed).write_all(&[7; 4097]).unwrap();
    framed.shutdown(Shutdown::Both).unwrap();
    framed.shutdown(Shutdown::Both).unwrap();
    assert_eq!((&framed).read_to_end(&mut Vec::new()).unwrap(), 0);
    drop(framed);
    let mut wire = Vec::new();
    server.read_to_end(&mut wire).unwrap();
    let expected = [
        &[0, 0x10, 0, 0][..],
        &[7; 4096],
        &[1, 0, 0, 0, 7],
        &[0xad, 0xde, 0xef, 0xbe],
        &[0xef, 0xbe, 0xad, 0xde],
    ];
    assert!(wire == expected.concat());

    let (client, mut server) = pair();
    server.write_all(&[0xad, 0xde, 0xad, 0xde]).unwrap();
    let mut framed = Framed::new(client);
    assert_eq!(framed.read_to_end(&mut Vec::new()).unwrap(), 0);
    assert_eq!(kind(framed.write(b"late")), io::ErrorKind::BrokenPipe);
    framed.close().unwrap();
    assert_eq!(server.read(&mut wire).unwrap(), 4);
    assert_eq!(wire[..4], [0xad, 0xde, 0xad, 0xde]);
}

#[test]
fn pieces_of_any_size_will_do() {
    let slow = Slow::default();
    let frames = [
        &[3, 0, 0, 0, 1, 2, 3][..],
        &[0, 0, 0, 0],
        &[1, 0, 0, 0, 4],
        &[0xad, 0xde, 0xef, 0xbe],
    ];
    *lock(&slow.come) = frames.concat();
    let framed = Framed::new(slow);
    let mut read = Vec::new();
    loop {
        let mut buffer = [0; 2];
        match insist(|| (&framed).read(&mut buffer)).unwrap() {
            0 => break,
            n => read.extend_from_slice(&buffer[..n]),
        }
    }
    assert_eq!(read, [1, 2, 3, 4]);
    let mut rest = &b"abc"[..];
    while !rest.is_empty() {
        rest = &rest[insist(|| (&framed).write(rest)).unwrap()..];
    }
    insist(|| framed.shutdown(Shutdown::Write)).unwrap();
    let went = lock(&framed.get_ref().went).clone();
    assert_eq!(went, [3, 0, 0, 0, b'a', b'b', b'c', 0xad, 0xde, 0xef, 0xbe]);
}

#[test]
fn what_breaks_off_is_no_clean_end() {
    for wire in [&[][..], &[3, 0], &[3, 0, 0, 0, 1]] {
        let (client, mut server) = pair();
        server.write_all(wire).unwrap();
        drop(server);
        let read = Framed::new(client).read_to_end(&mut Vec::new());
        assert_eq!(kind(read), io::ErrorKind::UnexpectedEof, "{wire:?}");
    }
    let (client, mut server) = pair();
    server.write_all(b"HTTP").unwrap();
    let read = Framed::new(client).read(&mut [0]);
    assert_eq!(kind(read), io::ErrorKind::InvalidData);
}
