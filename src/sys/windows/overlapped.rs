//! Operations that go on while their caller does something else, and waiting for them.

use std::io;
use std::os::windows::io::{AsHandle, AsRawHandle, BorrowedHandle, FromRawHandle, OwnedHandle};
use std::ptr;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use windows_sys::Win32::Foundation::{
    ERROR_IO_INCOMPLETE, ERROR_IO_PENDING, ERROR_NO_DATA, ERROR_OPERATION_ABORTED,
    ERROR_PIPE_CONNECTED, HANDLE, WAIT_FAILED, WAIT_TIMEOUT,
};
use windows_sys::Win32::Storage::FileSystem::{ReadFile, WriteFile};
use windows_sys::Win32::System::IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED};
use windows_sys::Win32::System::Pipes::ConnectNamedPipe;
use windows_sys::Win32::System::Threading::{
    CreateEventW, INFINITE, SetEvent, WaitForMultipleObjects,
};

use crate::lock::lock;

/// Something to wait for; once set it stays so.
#[derive(Debug)]
pub(crate) struct ManualResetEvent(OwnedHandle);

impl ManualResetEvent {
    #[allow(unsafe_code)]
    pub(crate) fn new() -> io::Result<ManualResetEvent> {
        // SAFETY: no attributes and no name are what null pointers mean here.
        let event = unsafe { CreateEventW(ptr::null(), 1, 0, ptr::null()) };
        if event.is_null() {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it was just made, and has no other owner.
        Ok(ManualResetEvent(unsafe {
            OwnedHandle::from_raw_handle(event)
        }))
    }

    #[allow(unsafe_code)]
    pub(crate) fn set(&self) {
        // SAFETY: the handle is an event's, and open.
        unsafe { SetEvent(self.0.as_raw_handle()) };
    }
}

impl ManualResetEvent {
    /// Returns the event with its lowest bit set: no event loop hears of the operation then.
    pub(super) fn unheard(&self) -> HANDLE {
        self.0.as_raw_handle().map_addr(|address| address | 1)
    }
}

impl AsHandle for ManualResetEvent {
    fn as_handle(&self) -> BorrowedHandle<'_> {
        self.0.as_handle()
    }
}

/// Waits until one of the events (64 at most) is set; false if `timeout` has passed. `None`: for
/// ever.
#[allow(unsafe_code)]
pub(crate) fn wait_for_any(
    events: &[BorrowedHandle<'_>],
    timeout: Option<Duration>,
) -> io::Result<bool> {
    let handles: Vec<HANDLE> = events.iter().map(AsRawHandle::as_raw_handle).collect();
    let count = u32::try_from(handles.len()).map_err(io::Error::other)?;
    // Rounded up: a wait of half a millisecond must not become a busy loop.
    let millis = timeout.map_or(INFINITE, |timeout| {
        let timeout = timeout.saturating_add(Duration::from_micros(999));
        u32::try_from(timeout.as_millis()).unwrap_or(INFINITE - 1)
    });
    // SAFETY: as many handles as said, open as long as they are borrowed.
    match unsafe { WaitForMultipleObjects(count, handles.as_ptr(), 0, millis) } {
        WAIT_FAILED => Err(io::Error::last_os_error()),
        WAIT_TIMEOUT => Ok(false),
        _ => Ok(true),
    }
}

/// Runs `work` on a thread that never ends: the end of a thread cancels what it has begun.
fn on_lasting_thread(work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    type Work = Box<dyn FnOnce() + Send>;
    static QUEUE: Mutex<Option<Sender<Work>>> = Mutex::new(None);
    let (tell, told) = channel();
    let work: Work = Box::new(move || drop(tell.send(work())));
    let mut queue = lock(&QUEUE);
    let sender = match &mut *queue {
        Some(sender) => sender,
        none => {
            let (sender, receiver) = channel::<Work>();
            let run = move || receiver.iter().for_each(|work| work());
            thread::Builder::new()
                .name("hvsock-pipes".into())
                .spawn(run)?;
            none.insert(sender)
        }
    };
    let ended = || io::Error::other("the thread for pipes has ended");
    sender.send(work).map_err(|_| ended())?;
    drop(queue);
    told.recv().map_err(|_| ended())?
}

/// The memory that the system uses while an operation is under way: it may not move.
struct Memory {
    overlapped: OVERLAPPED,
    buffer: Vec<u8>,
}

/// At most one operation on a handle that was opened for overlapped ones.
pub(crate) struct OverlappedOperation {
    handle: Arc<OwnedHandle>,
    event: ManualResetEvent,
    /// From a box; while `pending`, the system writes to it.
    memory: *mut Memory,
    pending: bool,
}

// SAFETY: the memory belongs to this value alone, and the system doesn't care which thread asks.
#[allow(unsafe_code)]
unsafe impl Send for OverlappedOperation {}

impl OverlappedOperation {
    pub(crate) fn new(handle: Arc<OwnedHandle>) -> io::Result<OverlappedOperation> {
        let event = ManualResetEvent::new()?;
        let memory = Box::new(Memory {
            overlapped: OVERLAPPED::default(),
            buffer: Vec::new(),
        });
        Ok(OverlappedOperation {
            handle,
            event,
            memory: Box::into_raw(memory),
            pending: false,
        })
    }

    /// Returns the event that is set when the operation that was begun is done.
    pub(crate) fn event(&self) -> BorrowedHandle<'_> {
        self.event.as_handle()
    }

    /// Begins to read `len` bytes at most. None may be under way.
    ///
    /// # Errors
    /// What the system says at once: then none is under way.
    #[allow(unsafe_code)]
    pub(crate) fn read(&mut self, len: u32) -> io::Result<()> {
        self.begin(|handle, memory| {
            memory.buffer.resize(len as usize, 0);
            let buffer = memory.buffer.as_mut_ptr();
            // SAFETY: buffer and structure stay where they are until the operation is done, which
            // `pending` tells.
            done(unsafe {
                ReadFile(
                    handle,
                    buffer,
                    len,
                    ptr::null_mut(),
                    &raw mut memory.overlapped,
                )
            })
        })
    }

    /// Begins to write, as [`read`](OverlappedOperation::read) does to read.
    #[allow(unsafe_code)]
    pub(crate) fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        self.begin(|handle, memory| {
            memory.buffer.clear();
            memory.buffer.extend(bytes);
            let buffer = memory.buffer.as_ptr();
            // SAFETY: as for `read`.
            done(unsafe {
                WriteFile(
                    handle,
                    buffer,
                    len,
                    ptr::null_mut(),
                    &raw mut memory.overlapped,
                )
            })
        })
    }

    /// Begins to wait for a pipe's client; true if there is one already.
    #[allow(unsafe_code)]
    pub(crate) fn connect(&mut self) -> io::Result<bool> {
        let begun = self.begin(|handle, memory| {
            // SAFETY: as for `read`.
            done(unsafe { ConnectNamedPipe(handle, &raw mut memory.overlapped) })
        });
        match begun {
            Ok(()) => Ok(false),
            // There is a client, or there was one, and what it wrote can be read.
            Err(e) if has_code(&e, ERROR_PIPE_CONNECTED) || has_code(&e, ERROR_NO_DATA) => Ok(true),
            Err(e) => Err(e),
        }
    }

    /// Writes as [`write`](OverlappedOperation::write) does, but the thread may end before it is
    /// done.
    #[allow(unsafe_code)]
    pub(crate) fn write_lastingly(&mut self, bytes: &[u8]) -> io::Result<()> {
        let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let pipe = Arc::clone(&self.handle);
        self.begin(|_, memory| {
            memory.buffer.clear();
            memory.buffer.extend(bytes);
            let buffer = memory.buffer.as_ptr().expose_provenance();
            let overlapped = (&raw mut memory.overlapped).expose_provenance();
            on_lasting_thread(move || {
                let buffer = ptr::with_exposed_provenance(buffer);
                let overlapped = ptr::with_exposed_provenance_mut(overlapped);
                let handle = pipe.as_raw_handle();
                // SAFETY: as for `read`; the caller waits until it has returned.
                done(unsafe { WriteFile(handle, buffer, len, ptr::null_mut(), overlapped) })
            })
        })
    }

    #[allow(unsafe_code)]
    fn begin(
        &mut self,
        start: impl FnOnce(HANDLE, &mut Memory) -> io::Result<()>,
    ) -> io::Result<()> {
        debug_assert!(!self.pending);
        // SAFETY: the system doesn't touch the memory now, and nothing else has it.
        let memory = unsafe { &mut *self.memory };
        memory.overlapped = OVERLAPPED {
            hEvent: self.event.0.as_raw_handle(),
            ..OVERLAPPED::default()
        };
        match start(self.handle.as_raw_handle(), memory) {
            Err(e) if !has_code(&e, ERROR_IO_PENDING) => Err(e),
            _ => {
                self.pending = true;
                Ok(())
            }
        }
    }

    /// Returns the result of the operation that was begun, once: how many bytes were moved; `None`
    /// while it is under way.
    pub(crate) fn outcome(&mut self) -> Option<io::Result<usize>> {
        match self.result(false) {
            Err(e) if has_code(&e, ERROR_IO_INCOMPLETE) => None,
            outcome => {
                self.pending = false;
                Some(outcome)
            }
        }
    }

    #[allow(unsafe_code)]
    fn result(&mut self, wait: bool) -> io::Result<usize> {
        let mut count = 0;
        let handle = self.handle.as_raw_handle();
        // SAFETY: the structure is the one that the operation was begun with.
        let done = unsafe {
            GetOverlappedResult(
                handle,
                &raw const (*self.memory).overlapped,
                &mut count,
                wait.into(),
            )
        };
        match done {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(count as usize),
        }
    }

    /// Returns the bytes that were read.
    #[allow(unsafe_code)]
    pub(crate) fn bytes(&self) -> &[u8] {
        if self.pending {
            return &[];
        }
        // SAFETY: the system doesn't touch the memory now, and only `&mut self` lets it.
        unsafe { &(*self.memory).buffer }
    }

    /// Returns the handle, if no other operation has it. No operation is under way on it then.
    pub(crate) fn into_handle(self) -> Option<OwnedHandle> {
        let handle = Arc::clone(&self.handle);
        drop(self);
        Arc::into_inner(handle)
    }
}

impl Drop for OverlappedOperation {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        if self.pending {
            let handle = self.handle.as_raw_handle();
            // SAFETY: handle and structure are those that the operation was begun with.
            unsafe { CancelIoEx(handle, &raw const (*self.memory).overlapped) };
            // Cancelled or done: the system lets go of the memory only then.
            let _ = self.result(true);
        }
        // SAFETY: it came from a box, and is used no more.
        drop(unsafe { Box::from_raw(self.memory) });
    }
}

impl std::fmt::Debug for OverlappedOperation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OverlappedOperation")
            .field("handle", &self.handle)
            .field("pending", &self.pending)
            .finish_non_exhaustive()
    }
}

/// Returns the result of a call of the system.
fn done(result: i32) -> io::Result<()> {
    match result {
        0 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Returns whether an operation was cancelled: by the end of the thread that began it, unless
/// something else did.
pub(crate) fn is_cancelled(error: &io::Error) -> bool {
    has_code(error, ERROR_OPERATION_ABORTED)
}

/// Returns whether an error of the system has this code.
pub(super) fn has_code(error: &io::Error, code: u32) -> bool {
    error.raw_os_error() == Some(code.cast_signed())
}
