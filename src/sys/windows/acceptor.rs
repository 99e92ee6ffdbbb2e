//! Accepting where a listener can't be waited for by a poller: one `AcceptEx` at a time, and the
//! event that is set at its end. So does Microsoft's WSL with AF_HYPERV
//! (`src/windows/common/socket.cpp` of microsoft/WSL).

#![allow(unsafe_code)]

use std::io;
use std::os::windows::io::{AsRawHandle, AsRawSocket, FromRawHandle, OwnedHandle};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::{SockAddr, Socket};
use windows_sys::Win32::Networking::WinSock;
use windows_sys::Win32::System::IO::OVERLAPPED;

use crate::lock::{lock, recover};

/// `AcceptEx` wants room for two addresses of any family, and 16 bytes more for each.
const ADDRESS: usize = size_of::<WinSock::SOCKADDR_STORAGE>() + 16;

/// A listening socket. One client at most is taken before it is asked for.
pub(crate) struct Acceptor {
    /// Dropped first: it must be gone when `pending` is waited for.
    watcher: Option<Watcher>,
    pending: Mutex<Option<Pending>>,
    ended: Arc<WsaEvent>,
    listener: Socket,
    /// Makes the socket that the next client becomes.
    make: Box<dyn Fn() -> io::Result<Socket> + Send + Sync>,
}

impl Acceptor {
    /// Accepts from `listener`; `make` makes sockets of its family that are neither bound nor
    /// connected.
    pub(crate) fn new(
        listener: Socket,
        make: impl Fn() -> io::Result<Socket> + Send + Sync + 'static,
    ) -> io::Result<Acceptor> {
        Ok(Acceptor {
            watcher: None,
            pending: Mutex::new(None),
            ended: Arc::new(WsaEvent::new()?),
            listener,
            make: Box::new(make),
        })
    }

    pub(crate) fn local_addr(&self) -> io::Result<SockAddr> {
        self.listener.local_addr()
    }

    /// Accepts a client that has come.
    ///
    /// # Errors
    /// `WouldBlock` if none has: [`wait`](Acceptor::wait) and [`watch`](Acceptor::watch) tell of
    /// the next. `ConnectionAborted` if it has gone again; what the kernel says otherwise.
    pub(crate) fn accept(&self) -> io::Result<Socket> {
        let mut pending = lock(&self.pending);
        loop {
            let accept = match pending.take() {
                Some(accept) => accept,
                None => Pending::begin(&self.listener, (self.make)()?, &self.ended)?,
            };
            let Some(ended) = accept.ended(&self.listener, false) else {
                *pending = Some(accept);
                return Err(io::ErrorKind::WouldBlock.into());
            };
            // SAFETY: it has ended.
            let socket = unsafe { accept.into_socket() };
            match ended {
                Ok(()) => return inherit(&self.listener, socket),
                Err(e) => match e.raw_os_error() {
                    // A thread that ends takes along what it has begun.
                    Some(WinSock::WSA_OPERATION_ABORTED) => {}
                    Some(WinSock::WSAECONNRESET) => {
                        return Err(io::Error::new(io::ErrorKind::ConnectionAborted, e));
                    }
                    _ => return Err(e),
                },
            }
        }
    }

    /// Waits for the client that [`accept`](Acceptor::accept) found missing, at most `timeout`.
    pub(crate) fn wait(&self, timeout: Duration) -> io::Result<()> {
        self.ended.wait(Some(timeout))
    }

    /// Has `notify` called for each client that [`accept`](Acceptor::accept) found missing when it
    /// comes, and now and then for none.
    pub(crate) fn watch(&mut self, notify: impl Fn() + Send + 'static) -> io::Result<()> {
        self.watcher = Some(Watcher::start(Arc::clone(&self.ended), notify)?);
        Ok(())
    }
}

impl std::fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Acceptor")
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.watcher = None;
        let pending = recover(self.pending.get_mut());
        if let Some(accept) = pending.take() {
            accept.cancel(&self.listener, &self.ended);
        }
    }
}

/// An `AcceptEx` that was begun. It has to be ended before it goes: the kernel writes into its room
/// until then.
struct Pending {
    socket: Socket,
    room: NonNull<Room>,
}

struct Room {
    overlapped: OVERLAPPED,
    addresses: [u8; 2 * ADDRESS],
}

// SAFETY: the room is this value's alone but for the kernel, which doesn't care for threads.
unsafe impl Send for Pending {}

impl Pending {
    fn begin(listener: &Socket, socket: Socket, ended: &WsaEvent) -> io::Result<Pending> {
        ended.reset()?;
        let room = Box::new(Room {
            overlapped: OVERLAPPED {
                hEvent: ended.0.as_raw_handle(),
                ..OVERLAPPED::default()
            },
            addresses: [0; 2 * ADDRESS],
        });
        let pending = Pending {
            socket,
            room: NonNull::from(Box::leak(room)),
        };
        let mut received = 0;
        // SAFETY: both sockets are open; the room is as large as is said, and stays where it is
        // until `into_socket`, which is called when the accept has ended.
        let done = unsafe {
            WinSock::AcceptEx(
                raw(listener)?,
                raw(&pending.socket)?,
                (&raw mut (*pending.room.as_ptr()).addresses).cast(),
                0,
                ADDRESS as u32,
                ADDRESS as u32,
                &raw mut received,
                &raw mut (*pending.room.as_ptr()).overlapped,
            )
        };
        let error = io::Error::last_os_error();
        if done != 0 || error.raw_os_error() == Some(WinSock::WSA_IO_PENDING) {
            return Ok(pending);
        }
        // SAFETY: nothing was begun.
        drop(unsafe { pending.into_socket() });
        match error.raw_os_error() {
            Some(WinSock::WSAECONNRESET) => Err(io::ErrorKind::ConnectionAborted.into()),
            _ => Err(error),
        }
    }

    /// Returns the result of the accept; `None` if it is under way.
    fn ended(&self, listener: &Socket, wait: bool) -> Option<io::Result<()>> {
        let (mut received, mut flags) = (0, 0);
        let listener = match raw(listener) {
            Ok(listener) => listener,
            Err(e) => return Some(Err(e)),
        };
        // SAFETY: the socket is open, and all pointers are valid.
        let done = unsafe {
            WinSock::WSAGetOverlappedResult(
                listener,
                &raw const (*self.room.as_ptr()).overlapped,
                &raw mut received,
                i32::from(wait),
                &raw mut flags,
            )
        };
        if done != 0 {
            return Some(Ok(()));
        }
        let error = io::Error::last_os_error();
        (error.raw_os_error() != Some(WinSock::WSA_IO_INCOMPLETE)).then_some(Err(error))
    }

    /// Returns the client's socket, or the one that was to become it.
    ///
    /// # Safety
    /// The accept has ended: the kernel doesn't write any more.
    unsafe fn into_socket(self) -> Socket {
        // SAFETY: the room was leaked by `begin`, and is given back once, for this takes `self`.
        drop(unsafe { Box::from_raw(self.room.as_ptr()) });
        self.socket
    }

    /// Ends it, and whom it may have accepted.
    fn cancel(self, listener: &Socket, ended: &WsaEvent) {
        // Else a signal from before would end the wait.
        let _ = ended.reset();
        // SAFETY: the socket is open, and the structure that of the accept.
        unsafe {
            windows_sys::Win32::System::IO::CancelIoEx(
                listener.as_raw_socket() as _,
                &raw const (*self.room.as_ptr()).overlapped,
            )
        };
        while self.ended(listener, true).is_none() {}
        // SAFETY: the accept has ended.
        drop(unsafe { self.into_socket() });
    }
}

/// Makes an accepted socket one: without it, it has no peer's name and can't be shut down.
fn inherit(listener: &Socket, socket: Socket) -> io::Result<Socket> {
    let listener = raw(listener)?;
    // SAFETY: the socket is open, and the pointer valid for the bytes that are said.
    let set = unsafe {
        WinSock::setsockopt(
            raw(&socket)?,
            WinSock::SOL_SOCKET,
            WinSock::SO_UPDATE_ACCEPT_CONTEXT,
            (&raw const listener).cast(),
            size_of::<WinSock::SOCKET>() as i32,
        )
    };
    match set {
        WinSock::SOCKET_ERROR => Err(io::Error::last_os_error()),
        _ => Ok(socket),
    }
}

fn raw(socket: &Socket) -> io::Result<WinSock::SOCKET> {
    usize::try_from(socket.as_raw_socket()).map_err(io::Error::other)
}

/// A thread that sleeps until a client comes.
struct Watcher {
    stop: Arc<AtomicBool>,
    event: Arc<WsaEvent>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(event: Arc<WsaEvent>, notify: impl Fn() + Send + 'static) -> io::Result<Watcher> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, signalled) = (Arc::clone(&stop), Arc::clone(&event));
        let watch = move || {
            // First the reset: what is signalled after it is waited for again, what was before is
            // told of now.
            while signalled.wait(None).is_ok()
                && signalled.reset().is_ok()
                && !stopped.load(Ordering::Acquire)
            {
                notify();
            }
        };
        let thread = std::thread::Builder::new().name("hvsock-acceptor".into());
        Ok(Watcher {
            stop,
            event,
            thread: Some(thread.spawn(watch)?),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if self.event.set().is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

/// An event that stays signalled until it is reset.
struct WsaEvent(OwnedHandle);

impl WsaEvent {
    fn new() -> io::Result<WsaEvent> {
        // SAFETY: it takes nothing.
        let event = unsafe { WinSock::WSACreateEvent() };
        if event == WinSock::WSA_INVALID_EVENT {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, has no other owner, and is closed as any handle is.
        Ok(WsaEvent(unsafe {
            OwnedHandle::from_raw_handle(event as _)
        }))
    }

    fn set(&self) -> io::Result<()> {
        // SAFETY: the event is open.
        check(unsafe { WinSock::WSASetEvent(self.0.as_raw_handle() as _) })
    }

    fn reset(&self) -> io::Result<()> {
        // SAFETY: the event is open.
        check(unsafe { WinSock::WSAResetEvent(self.0.as_raw_handle() as _) })
    }

    /// Waits until it is signalled, at most `timeout`; for ever without one.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<()> {
        // The largest number means "for ever".
        let longest = WinSock::WSA_INFINITE - 1;
        let millis = timeout.map_or(WinSock::WSA_INFINITE, |timeout| {
            let timeout = timeout.saturating_add(Duration::from_micros(999));
            u32::try_from(timeout.as_millis()).map_or(longest, |millis| millis.min(longest))
        });
        let event = self.0.as_raw_handle();
        // SAFETY: the pointer is valid for the one event that the count says, which is open.
        match unsafe { WinSock::WSAWaitForMultipleEvents(1, &raw const event, 0, millis, 0) } {
            WinSock::WSA_WAIT_FAILED => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

fn check(done: i32) -> io::Result<()> {
    match done {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// TCP stands in for AF_HYPERV, which Wine hasn't.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::sync::mpsc;

    use socket2::{Domain, Type};

    const PATIENCE: Duration = Duration::from_secs(20);

    fn acceptor() -> (Acceptor, SocketAddr) {
        let make = || Socket::new(Domain::IPV4, Type::STREAM, None);
        let listener = make().unwrap();
        listener
            .bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())
            .unwrap();
        listener.listen(16).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        (Acceptor::new(listener, make).unwrap(), address)
    }

    fn is_nobody(accepted: io::Result<Socket>) -> bool {
        accepted.is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
    }

    #[test]
    fn clients_are_taken_one_after_the_other_and_named() {
        let (acceptor, address) = acceptor();
        assert!(is_nobody(acceptor.accept()));
        acceptor.wait(Duration::from_millis(1)).unwrap();
        assert!(is_nobody(acceptor.accept()));
        for _ in 0..3 {
            let mut client = TcpStream::connect(address).unwrap();
            let accepted = loop {
                match acceptor.accept() {
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    accepted => break accepted.unwrap(),
                }
                acceptor.wait(PATIENCE).unwrap();
            };
            let peer = accepted.peer_addr().unwrap().as_socket();
            assert_eq!(peer, Some(client.local_addr().unwrap()));
            client.write_all(b"hello").unwrap();
            let mut heard = [0; 5];
            (&accepted).read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"hello");
            accepted.shutdown(std::net::Shutdown::Write).unwrap();
            assert_eq!(client.read(&mut heard).unwrap(), 0);
        }
    }

    #[test]
    fn who_watches_is_told_of_each_client_and_of_none_after_the_end() {
        let (mut acceptor, address) = acceptor();
        let (notify, told) = mpsc::channel();
        acceptor.watch(move || notify.send(()).unwrap()).unwrap();
        for _ in 0..3 {
            assert!(is_nobody(acceptor.accept()));
            let _client = TcpStream::connect(address).unwrap();
            let accepted = loop {
                told.recv_timeout(PATIENCE).unwrap();
                if let Ok(accepted) = acceptor.accept() {
                    break accepted;
                }
            };
            drop(accepted);
        }
        drop(acceptor);
        while told.try_recv().is_ok() {}
        assert_eq!(told.recv(), Err(mpsc::RecvError));
    }

    #[test]
    fn one_that_waits_for_a_client_can_be_dropped() {
        let (acceptor, address) = acceptor();
        assert!(is_nobody(acceptor.accept()));
        drop(acceptor);
        assert!(TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err());
    }

    #[test]
    fn what_a_thread_has_begun_is_begun_again_without_it() {
        let (acceptor, address) = acceptor();
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(is_nobody(acceptor.accept())));
        });
        let _client = TcpStream::connect(address).unwrap();
        let accepted = std::iter::repeat_with(|| {
            acceptor.wait(Duration::from_millis(100)).unwrap();
            acceptor.accept()
        });
        assert!(accepted.take(100).any(|accepted| accepted.is_ok()));
    }
}
