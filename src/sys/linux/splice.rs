//! Bytes from one socket to another through a pipe: the kernel passes pages on, and copies nothing.

use std::io::{self, PipeReader, PipeWriter};
use std::os::fd::BorrowedFd;

use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, splice};

/// Bytes a pipe holds at most. Less and each call moves less; more than the sender's and the
/// receiver's buffers hold brings nothing.
const SIZE: i32 = 256 * 1024;

/// A pipe that holds less costs more than to copy.
const LEAST: i32 = 64 * 1024;

/// A pipe between two sockets.
#[derive(Debug)]
pub(crate) struct Pipe {
    reader: PipeReader,
    writer: PipeWriter,
}

impl Pipe {
    /// Makes an empty pipe, if the system gives one that is large enough.
    pub(crate) fn new() -> Option<Pipe> {
        // Where SIGPIPE isn't ignored, a splice to a socket whose peer has gone would end the
        // process: there is no MSG_NOSIGNAL for it.
        if !crate::sys::is_ignored(nix::libc::SIGPIPE) {
            return None;
        }
        let (reader, writer) = io::pipe().ok()?;
        // A user's pipes may have so many pages in all (/proc/sys/fs/pipe-user-pages-soft): beyond
        // them they stay as they are, and at last are small from the start.
        let enlarged = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(SIZE));
        let size = enlarged.or_else(|_| fcntl(&writer, FcntlArg::F_GETPIPE_SZ));
        let big_enough = size.is_ok_and(|size| size >= LEAST);
        big_enough.then_some(Pipe { reader, writer })
    }

    /// Takes what `socket` has. Of an empty pipe `WouldBlock` says that it has nothing.
    pub(crate) fn fill(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        Ok(splice(
            socket,
            None,
            &self.writer,
            None,
            SIZE as usize,
            flags,
        )?)
    }

    /// Gives `socket` the `len` bytes that it holds. (Never with SPLICE_F_MORE, which holds bytes
    /// back for 200 ms.)
    pub(crate) fn empty(&mut self, socket: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        Ok(splice(&self.reader, None, socket, None, len, flags)?)
    }
}
