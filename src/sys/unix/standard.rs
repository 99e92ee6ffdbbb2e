//! Standard input, output and error, past std's buffers and locks.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::wait;
use crate::sys::Wanted;

/// Standard input or output, without std's buffer. It waits though it may have been made
/// non-blocking by another process.
#[derive(Debug)]
pub(crate) struct Standard(fs::File);

pub(crate) fn standard_input() -> io::Result<Standard> {
    let fd = io::stdin().as_fd().try_clone_to_owned()?;
    Ok(Standard(fd.into()))
}

pub(crate) fn standard_output() -> io::Result<Standard> {
    let fd = io::stdout().as_fd().try_clone_to_owned()?;
    Ok(Standard(fd.into()))
}

impl Standard {
    fn waiting<T>(
        &mut self,
        wanted: Wanted,
        mut call: impl FnMut(&mut fs::File) -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match call(&mut self.0) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    wait(self.0.as_fd(), wanted, Duration::from_secs(3600))?;
                }
                done => return done,
            }
        }
    }
}

impl io::Read for Standard {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.waiting(Wanted::Readable, |file| file.read(buffer))
    }
}

impl io::Write for Standard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.waiting(Wanted::Writable, |file| file.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Writes to standard output, past std's buffer and past its lock, on which other threads would
/// wait with this one. It waits for the reader, as [`Standard`] does.
pub(crate) fn write_output(bytes: &[u8]) -> io::Result<usize> {
    write_waiting(io::stdout().as_fd(), bytes)
}

/// Writes to standard error as [`write_output`] does to standard output.
pub(crate) fn write_error(bytes: &[u8]) -> io::Result<usize> {
    write_waiting(io::stderr().as_fd(), bytes)
}

fn write_waiting(stream: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match nix::unistd::write(stream, bytes) {
            Err(nix::errno::Errno::EAGAIN) => {
                wait(stream, Wanted::Writable, Duration::from_secs(3600))?;
            }
            done => return Ok(done?),
        }
    }
}
