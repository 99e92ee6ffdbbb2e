//! The two halves of a stream, each for a task of its own.

use std::error::Error;
use std::fmt;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ::tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::Stream;

/// The half of a [`Stream`] that reads; [`Stream::into_split`] makes it.
#[derive(Debug)]
pub struct OwnedReadHalf {
    stream: Arc<Stream>,
}

/// The half of a [`Stream`] that writes; [`Stream::into_split`] makes it.
///
/// Dropping it half-closes, unless it is [forgotten](OwnedWriteHalf::forget).
#[derive(Debug)]
pub struct OwnedWriteHalf {
    stream: Arc<Stream>,
    half_closes_on_drop: bool,
}

/// The error of [`OwnedReadHalf::reunite`]: the halves are of two streams. They are in it.
#[derive(Debug)]
pub struct ReuniteError(pub OwnedReadHalf, pub OwnedWriteHalf);

impl fmt::Display for ReuniteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the halves are of two streams")
    }
}

impl Error for ReuniteError {}

impl OwnedReadHalf {
    pub(super) fn new(stream: Arc<Stream>) -> OwnedReadHalf {
        OwnedReadHalf { stream }
    }

    /// Puts the two halves of a stream together again.
    ///
    /// # Errors
    /// They are of two streams.
    pub fn reunite(self, other: OwnedWriteHalf) -> Result<Stream, ReuniteError> {
        if !Arc::ptr_eq(&self.stream, &other.stream) {
            return Err(ReuniteError(self, other));
        }
        other.forget();
        // The other half was the only other handle.
        Arc::try_unwrap(self.stream).map_err(|stream| {
            let write = OwnedWriteHalf::new(Arc::clone(&stream));
            ReuniteError(OwnedReadHalf { stream }, write)
        })
    }
}

impl OwnedWriteHalf {
    pub(super) fn new(stream: Arc<Stream>) -> OwnedWriteHalf {
        OwnedWriteHalf {
            stream,
            half_closes_on_drop: true,
        }
    }

    /// Puts the two halves of a stream together again.
    ///
    /// # Errors
    /// They are of two streams.
    pub fn reunite(self, other: OwnedReadHalf) -> Result<Stream, ReuniteError> {
        other.reunite(self)
    }

    /// Drops it without a half-close: that comes when the other half is dropped.
    pub fn forget(mut self) {
        self.half_closes_on_drop = false;
    }
}

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        if self.half_closes_on_drop {
            // Of a broken connection nobody needs to be told.
            let _ = self.stream.half_close();
        }
    }
}

impl AsRef<Stream> for OwnedReadHalf {
    fn as_ref(&self) -> &Stream {
        &self.stream
    }
}

impl AsRef<Stream> for OwnedWriteHalf {
    fn as_ref(&self) -> &Stream {
        &self.stream
    }
}

impl AsyncRead for OwnedReadHalf {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.stream.poll_read_shared(context, buffer)
    }
}

impl AsyncWrite for OwnedWriteHalf {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.stream
            .poll_write_shared(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.stream.poll_write_shared(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let done = self.stream.half_close();
        self.half_closes_on_drop &= done.is_err();
        Poll::Ready(done)
    }
}
