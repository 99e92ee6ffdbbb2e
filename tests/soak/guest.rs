//! The guest: its services, and how a client asks for them.

use hvsock::simulate::{Builder, Service, Vm};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

pub(crate) const ECHO: u32 = 7;
pub(crate) const DISCARD: u32 = 9;
pub(crate) const CHARGEN: u32 = 19;
pub(crate) const HTTP: u32 = 80;
/// Asked with a seed and a length, sends that pattern.
pub(crate) const DOWNLOAD: u32 = 1000;
/// Reads to EOF, then answers with length and checksum.
pub(crate) const COUNT: u32 = 1001;
/// Reads to EOF, ignores it, and answers a piece at a time: [`late_answer`].
pub(crate) const LATE: u32 = 1002;
/// Reads a little, answers [`early_answer`] and closes with the rest unread.
pub(crate) const EARLY: u32 = 1003;
/// Never reads and never writes; goes away after a while.
pub(crate) const NEVER: u32 = 1004;
/// Closes as soon as it was dialled.
pub(crate) const CLOSER: u32 = 1005;
/// Sends for ever, whatever it is told, until nobody is there.
pub(crate) const STUBBORN: u32 = 1006;
/// Nothing listens there.
pub(crate) const REFUSED: u32 = 4000;

pub(crate) const PORTS: [u32; 12] = [
    ECHO, DISCARD, CHARGEN, HTTP, DOWNLOAD, COUNT, LATE, EARLY, NEVER, CLOSER, STUBBORN, REFUSED,
];

/// What is longer has failed.
pub(crate) const LONG: Duration = Duration::from_secs(30);

pub(crate) fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

pub(crate) fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

pub(crate) fn request(seed: u64, length: usize) -> [u8; 16] {
    let mut request = [0; 16];
    request[..8].copy_from_slice(&seed.to_le_bytes());
    request[8..].copy_from_slice(&(length as u64).to_le_bytes());
    request
}

pub(crate) fn count_answer(bytes: &[u8]) -> [u8; 16] {
    request(bytes.len() as u64, checksum(bytes) as usize)
}

pub(crate) fn late_answer() -> Vec<u8> {
    pattern(1, 8_000)
}

pub(crate) fn early_answer() -> Vec<u8> {
    pattern(2, 1_000)
}

/// RFC 864's pattern, as the stand-in's `/bytes/N` sends it.
pub(crate) fn chargen(length: usize) -> Vec<u8> {
    let byte = |at: usize| match (at / 74, at % 74) {
        (_, 72) => b'\r',
        (_, 73) => b'\n',
        (line, column) => b' ' + ((line + column) % 95) as u8,
    };
    (0..length).map(byte).collect()
}

pub(crate) type Program = fn(UnixStream) -> io::Result<()>;

/// What the stand-in has not of its own.
pub(crate) const PROGRAMS: [(u32, Program); 7] = [
    (DOWNLOAD, download),
    (COUNT, count),
    (LATE, late),
    (EARLY, early),
    (NEVER, never),
    (STUBBORN, stubborn),
    (CLOSER, |_| Ok(())),
];

pub(crate) fn builder(directory: &Path) -> Builder {
    let vm = Vm::builder(directory)
        .guest(ECHO, Service::Echo)
        .guest(DISCARD, Service::Discard)
        .guest(CHARGEN, Service::Chargen)
        .guest(HTTP, Service::Http)
        .strict(true);
    PROGRAMS.into_iter().fold(vm, |vm, (port, program)| {
        // A program whose client has gone has nobody to tell.
        vm.guest(port, Service::custom(move |stream| drop(program(stream))))
    })
}

fn read_all(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn download(mut stream: UnixStream) -> io::Result<()> {
    let mut request = [0; 16];
    stream.read_exact(&mut request)?;
    let number = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
    stream.write_all(&pattern(number(0), number(8) as usize))?;
    stream.shutdown(Shutdown::Write)?;
    read_all(&mut stream).map(drop)
}

fn count(mut stream: UnixStream) -> io::Result<()> {
    let bytes = read_all(&mut stream)?;
    stream.write_all(&count_answer(&bytes))
}

fn late(mut stream: UnixStream) -> io::Result<()> {
    read_all(&mut stream)?;
    for piece in late_answer().chunks(1_000) {
        // Its own slowness, not a wait for anything.
        thread::sleep(Duration::from_millis(20));
        stream.write_all(piece)?;
    }
    Ok(())
}

fn early(mut stream: UnixStream) -> io::Result<()> {
    let _ = stream.read(&mut [0; 10])?;
    stream.write_all(&early_answer())
}

fn never(stream: UnixStream) -> io::Result<()> {
    thread::sleep(Duration::from_millis(400));
    drop(stream);
    Ok(())
}

fn stubborn(mut stream: UnixStream) -> io::Result<()> {
    let bytes = pattern(3, 16 * 1024);
    loop {
        stream.write_all(&bytes)?;
    }
}
