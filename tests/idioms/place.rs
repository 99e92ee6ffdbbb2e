//! Where a program listens, and where its target does.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::common::{PATIENCE, eventually};

#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// A port of 127.0.0.1.
    Tcp(u16),
    Unix(&'static str),
    /// An abstract Unix socket.
    Abstract(&'static str),
    /// A port of the local CID, 1.
    Vsock(u32),
}

pub(crate) enum Listening {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub(crate) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
    Vsock(hvsock::Stream),
}

impl Place {
    pub(crate) fn connect(self) -> Stream {
        let stream = match self {
            Place::Tcp(port) => TcpStream::connect(("127.0.0.1", port)).map(Stream::Tcp),
            Place::Unix(path) => UnixStream::connect(path).map(Stream::Unix),
            Place::Abstract(name) => {
                let address = SocketAddr::from_abstract_name(name).unwrap();
                UnixStream::connect_addr(&address).map(Stream::Unix)
            }
            Place::Vsock(port) => {
                let address = format!("vsock://1:{port}").parse().unwrap();
                Ok(Stream::Vsock(hvsock::Stream::connect(&address).unwrap()))
            }
        };
        stream.unwrap_or_else(|e| panic!("{self:?}: {e}")).patient()
    }

    /// Takes the place of a target: that of one that there was before, too.
    pub(crate) fn listen(self) -> Listening {
        match self {
            Place::Tcp(port) => Listening::Tcp(TcpListener::bind(("127.0.0.1", port)).unwrap()),
            Place::Unix(path) => {
                let _ = fs::remove_file(path);
                Listening::Unix(UnixListener::bind(path).unwrap())
            }
            other => panic!("{other:?} is no target here"),
        }
    }

    /// Whether anybody listens there. That of vsock can't be seen.
    fn is_listening(self) -> bool {
        let is_listed = |table: &str, is_it: &dyn Fn(&[&str]) -> bool| {
            let text = fs::read_to_string(format!("/proc/self/net/{table}")).unwrap_or_default();
            let mut lines = text.lines();
            lines.any(|line| is_it(&line.split_whitespace().collect::<Vec<_>>()))
        };
        match self {
            Place::Tcp(port) => {
                let port = format!(":{port:04X}");
                let is_it = |words: &[&str]| words[1].ends_with(&port) && words[3] == "0A";
                is_listed("tcp", &is_it) || is_listed("tcp6", &is_it)
            }
            Place::Unix(name) | Place::Abstract(name) => {
                let is_it = |words: &[&str]| {
                    // __SO_ACCEPTCON
                    words[3] == "00010000"
                        && words
                            .last()
                            .is_some_and(|it| it.trim_start_matches('@') == name)
                };
                is_listed("unix", &is_it)
            }
            Place::Vsock(_) => true,
        }
    }

    pub(crate) fn wait_until_somebody_listens(self) {
        eventually(&format!("{self:?} is listened on"), || self.is_listening());
    }

    pub(crate) fn wait_until_nobody_listens(self) {
        if !matches!(self, Place::Vsock(_)) {
            eventually(&format!("{self:?} is free"), || !self.is_listening());
        }
    }
}

impl Listening {
    pub(crate) fn accept(&self) -> Stream {
        match self {
            Listening::Tcp(listener) => Stream::Tcp(listener.accept().unwrap().0),
            Listening::Unix(listener) => Stream::Unix(listener.accept().unwrap().0),
        }
        .patient()
    }

    /// Whether a client waits.
    pub(crate) fn has_client(&self) -> bool {
        let set = |nonblocking| match self {
            Listening::Tcp(listener) => listener.set_nonblocking(nonblocking).unwrap(),
            Listening::Unix(listener) => listener.set_nonblocking(nonblocking).unwrap(),
        };
        set(true);
        let accepted = match self {
            Listening::Tcp(listener) => listener.accept().is_ok(),
            Listening::Unix(listener) => listener.accept().is_ok(),
        };
        set(false);
        accepted
    }
}

impl Stream {
    /// Bounds its reads and writes, if it has not ended: a Mac takes no option then.
    pub(crate) fn patient(self) -> Stream {
        let _ = match &self {
            Stream::Tcp(stream) => stream
                .set_read_timeout(Some(PATIENCE))
                .and_then(|()| stream.set_write_timeout(Some(PATIENCE))),
            Stream::Unix(stream) => stream
                .set_read_timeout(Some(PATIENCE))
                .and_then(|()| stream.set_write_timeout(Some(PATIENCE))),
            Stream::Vsock(_) => Ok(()),
        };
        self
    }

    /// Has reads wait only that long.
    pub(crate) fn hurry(&self, timeout: std::time::Duration) {
        match self {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(timeout)).unwrap(),
            Stream::Unix(stream) => stream.set_read_timeout(Some(timeout)).unwrap(),
            Stream::Vsock(_) => panic!("no test wants that"),
        }
    }

    pub(crate) fn half_close(&self) {
        // The peer may have ended before.
        let _ = match self {
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
            Stream::Vsock(stream) => stream.shutdown(Shutdown::Write),
        };
    }

    /// What comes until the end; that it is a reset doesn't matter.
    pub(crate) fn read_to_end_or_reset(mut self) -> Vec<u8> {
        let mut all = Vec::new();
        match self.read_to_end(&mut all) {
            Err(e) if e.kind() != io::ErrorKind::ConnectionReset => panic!("no end: {e}"),
            _ => all,
        }
    }

    pub(crate) fn rest(mut self) -> String {
        let mut all = String::new();
        self.read_to_string(&mut all).unwrap();
        all
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).read(buffer),
            Stream::Unix(stream) => (&*stream).read(buffer),
            Stream::Vsock(stream) => (&*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&*stream).write(buffer),
            Stream::Unix(stream) => (&*stream).write(buffer),
            Stream::Vsock(stream) => (&*stream).write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
