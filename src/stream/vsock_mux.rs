//! The handshake of a dial at the Unix socket of Firecracker, Cloud Hypervisor and rust-vmm's
//! vhost-device-vsock: the line that asks for a port, and the VMM's answer. Nothing else of that
//! family is here.
//!
//! To the guest: connect, `CONNECT PORT\n`, and the VMM answers `OK NUMBER\n` when the guest has
//! accepted. From the guest: the VMM connects to the Unix socket PATH_PORT. Source: Firecracker's
//! `docs/vsock.md`.

use std::io;

use super::socket::Socket;
use crate::address::Port;

/// The longest answer that is waited for: `OK ` and a port of 32 bits, with room to spare.
const LONGEST_ANSWER: usize = 32;

/// The state of a dial's line and its answer. Nothing else is sent before the whole answer has
/// come: the VMMs lose what follows the line too closely.
#[derive(Debug)]
pub(crate) struct Handshake {
    line: Vec<u8>,
    sent: usize,
    answer: Vec<u8>,
}

impl Handshake {
    pub(crate) fn new(port: Port) -> Handshake {
        Handshake {
            line: format!("CONNECT {}\n", port.0).into_bytes(),
            sent: 0,
            answer: Vec::new(),
        }
    }

    /// Goes on as far as it can without waiting. Returns whether the guest has accepted.
    ///
    /// # Errors
    /// Returns `ConnectionRefused` if the VMM ends the connection without an answer: nothing
    /// listens on that port of the guest. `ConnectionReset` if it resets it: the guest isn't up.
    /// `InvalidData` for another answer.
    pub(crate) fn advance(&mut self, socket: &mut impl Socket) -> io::Result<bool> {
        loop {
            let done = if self.sent < self.line.len() {
                socket
                    .write(&self.line[self.sent..])
                    .map(|n| self.sent += n)
            } else {
                self.read_on(socket)
            };
            match done {
                Ok(()) if self.answer.ends_with(b"\n") => {
                    return self.check_answer().map(|()| true);
                }
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Reads one byte: what follows the answer is the guest's.
    fn read_on(&mut self, socket: &mut impl Socket) -> io::Result<()> {
        let mut byte = [0];
        if socket.read(&mut byte)? == 0 {
            let why = "the VMM ended it without an OK";
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, why));
        }
        self.answer.push(byte[0]);
        if self.answer.len() < LONGEST_ANSWER {
            Ok(())
        } else {
            self.check_answer()
        }
    }

    fn check_answer(&self) -> io::Result<()> {
        if self.answer.starts_with(b"OK ") && self.answer.ends_with(b"\n") {
            return Ok(());
        }
        let answer = String::from_utf8_lossy(&self.answer);
        let why = format!("the answer to CONNECT was {answer:?} and not OK");
        Err(io::Error::new(io::ErrorKind::InvalidData, why))
    }
}
