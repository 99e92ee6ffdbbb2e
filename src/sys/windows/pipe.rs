//! Named pipes: making, opening, and the end of what was written to one.
//!
//! A pipe of message type that is read as bytes has a half-close: a message of no bytes, which the
//! reader takes for EOF. That is go-winio's convention, and so Docker's. A pipe of byte type has
//! none.

use std::fs::OpenOptions;
use std::io;
use std::os::windows::fs::OpenOptionsExt;
use std::os::windows::io::{
    AsRawHandle, BorrowedHandle, FromRawHandle, IntoRawHandle, OwnedHandle,
};
use std::ptr;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use mio::windows::NamedPipe;
use windows_sys::Win32::Foundation::{
    ERROR_ACCESS_DENIED, ERROR_BROKEN_PIPE, ERROR_IO_PENDING, ERROR_PIPE_BUSY,
    INVALID_HANDLE_VALUE, LocalFree,
};
use windows_sys::Win32::Security::Authorization::{
    ConvertSidToStringSidW, ConvertStringSecurityDescriptorToSecurityDescriptorW, SDDL_REVISION_1,
};
use windows_sys::Win32::Security::{
    GetTokenInformation, SECURITY_ATTRIBUTES, TOKEN_QUERY, TOKEN_USER, TokenUser,
};
use windows_sys::Win32::Storage::FileSystem::{
    FILE_FLAG_FIRST_PIPE_INSTANCE, FILE_FLAG_OVERLAPPED, FlushFileBuffers, PIPE_ACCESS_DUPLEX,
    SECURITY_ANONYMOUS, WriteFile,
};
use windows_sys::Win32::System::IO::{CancelIoEx, GetOverlappedResult, OVERLAPPED};
use windows_sys::Win32::System::Pipes::{
    CreateNamedPipeW, DisconnectNamedPipe, GetNamedPipeInfo, PIPE_READMODE_BYTE,
    PIPE_REJECT_REMOTE_CLIENTS, PIPE_SERVER_END, PIPE_TYPE_MESSAGE, PIPE_UNLIMITED_INSTANCES,
    PIPE_WAIT,
};
use windows_sys::Win32::System::Threading::{GetCurrentProcess, OpenProcessToken};

use super::overlapped::{ManualResetEvent, has_code};

use crate::lock::{lock, recover};

/// What a pipe holds unread before its writer has to wait; Docker's engine has the same.
const BUFFER: u32 = 64 * 1024;

/// Returns the path of the pipe that an address names.
fn path(name: &str) -> String {
    format!(r"\\.\pipe\{}", name.replace('/', r"\"))
}

fn wide(text: &str) -> Vec<u16> {
    text.encode_utf16().chain([0]).collect()
}

/// The users who may use a pipe, as a security descriptor.
#[derive(Debug)]
pub(crate) struct Access(Box<[u64]>);

impl Access {
    /// Parses a text in SDDL; without one it allows the user of this process alone.
    pub(crate) fn new(sddl: Option<&str>) -> io::Result<Access> {
        match sddl {
            Some(sddl) => Access::parse(sddl),
            // Protected from what it might inherit: all rights to this user.
            None => Access::parse(&format!("D:P(A;;GA;;;{})", user()?)),
        }
    }

    #[allow(unsafe_code)]
    fn parse(sddl: &str) -> io::Result<Access> {
        let (mut descriptor, mut len) = (ptr::null_mut(), 0);
        // SAFETY: the text ends with a NUL, and both pointers are valid for writes.
        let parsed = unsafe {
            ConvertStringSecurityDescriptorToSecurityDescriptorW(
                wide(sddl).as_ptr(),
                SDDL_REVISION_1,
                &mut descriptor,
                &mut len,
            )
        };
        if parsed == 0 {
            return Err(io::Error::last_os_error());
        }
        let len = len as usize;
        let mut copy = vec![0u64; len.div_ceil(size_of::<u64>())].into_boxed_slice();
        // SAFETY: the system gave `len` bytes in one piece (self-relative), and the copy has room
        // for them.
        unsafe { ptr::copy_nonoverlapping(descriptor.cast(), copy.as_mut_ptr().cast::<u8>(), len) };
        // SAFETY: it is the system's to free, once.
        unsafe { LocalFree(descriptor) };
        Ok(Access(copy))
    }
}

/// Returns the id of the user of this process, as text (`S-1-5-…`).
#[allow(unsafe_code)]
fn user() -> io::Result<String> {
    let mut token = ptr::null_mut();
    // SAFETY: the pointer is valid for a write, and the process' pseudo handle needs no closing.
    if unsafe { OpenProcessToken(GetCurrentProcess(), TOKEN_QUERY, &mut token) } == 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it was just made, and has no other owner.
    let token = unsafe { OwnedHandle::from_raw_handle(token) };
    // A TOKEN_USER with the id behind it, which has 68 bytes at most (SECURITY_MAX_SID_SIZE).
    let mut information = [0u64; 32];
    let size = u32::try_from(size_of_val(&information)).map_err(io::Error::other)?;
    // SAFETY: the memory is as large as said, and aligned for the structure.
    let got = unsafe {
        GetTokenInformation(
            token.as_raw_handle(),
            TokenUser,
            information.as_mut_ptr().cast(),
            size,
            &mut 0,
        )
    };
    if got == 0 {
        return Err(io::Error::last_os_error());
    }
    let mut text = ptr::null_mut();
    // SAFETY: the system has written that structure, whose pointer leads into the same memory.
    let sid = unsafe { (*information.as_ptr().cast::<TOKEN_USER>()).User.Sid };
    // SAFETY: as before; the other pointer is valid for a write.
    if unsafe { ConvertSidToStringSidW(sid, &mut text) } == 0 {
        return Err(io::Error::last_os_error());
    }
    let mut id = Vec::new();
    // SAFETY: the text ends with a NUL, and is read no further; then it is freed, once.
    unsafe {
        while *text.add(id.len()) != 0 {
            id.push(*text.add(id.len()));
        }
        LocalFree(text.cast());
    }
    String::from_utf16(&id).map_err(io::Error::other)
}

/// Makes an instance of a pipe, to which one client of this machine can connect. Only one program
/// can make the first.
///
/// # Errors
/// `AddrInUse` if another program has the name; what the system says otherwise.
#[allow(unsafe_code)]
pub(crate) fn create_pipe(name: &str, access: &Access, first: bool) -> io::Result<OwnedHandle> {
    let attributes = SECURITY_ATTRIBUTES {
        nLength: size_of::<SECURITY_ATTRIBUTES>() as u32,
        lpSecurityDescriptor: access.0.as_ptr().cast_mut().cast(),
        bInheritHandle: 0,
    };
    let only_first = match first {
        true => FILE_FLAG_FIRST_PIPE_INSTANCE,
        false => 0,
    };
    // SAFETY: the name ends with a NUL, and the attributes lead to a descriptor; both are only
    // read, and now.
    let pipe = unsafe {
        CreateNamedPipeW(
            wide(&path(name)).as_ptr(),
            PIPE_ACCESS_DUPLEX | FILE_FLAG_OVERLAPPED | only_first,
            PIPE_TYPE_MESSAGE | PIPE_READMODE_BYTE | PIPE_WAIT | PIPE_REJECT_REMOTE_CLIENTS,
            PIPE_UNLIMITED_INSTANCES,
            BUFFER,
            BUFFER,
            0,
            &raw const attributes,
        )
    };
    if pipe == INVALID_HANDLE_VALUE {
        let error = io::Error::last_os_error();
        // The server that has it may have limited its instances, too.
        let taken = has_code(&error, ERROR_ACCESS_DENIED) || has_code(&error, ERROR_PIPE_BUSY);
        return match first && taken {
            true => Err(io::ErrorKind::AddrInUse.into()),
            false => Err(error),
        };
    }
    // SAFETY: it was just made, and has no other owner.
    Ok(unsafe { OwnedHandle::from_raw_handle(pipe) })
}

/// Connects to a pipe. Its server learns nothing of us, and can't act in our name.
///
/// # Errors
/// `NotFound` if no server listens there; `WouldBlock` if all its instances are taken: try again
/// later.
pub(crate) fn open_pipe(name: &str) -> io::Result<OwnedHandle> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.custom_flags(FILE_FLAG_OVERLAPPED);
    options.security_qos_flags(SECURITY_ANONYMOUS);
    match options.open(path(name)) {
        Ok(pipe) => Ok(pipe.into()),
        Err(e) if has_code(&e, ERROR_PIPE_BUSY) => Err(io::ErrorKind::WouldBlock.into()),
        Err(e) => Err(e),
    }
}

/// What kind of pipe a handle is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PipeKind {
    /// This is the end that listened.
    pub(crate) is_server: bool,
    pub(crate) has_half_close: bool,
}

impl PipeKind {
    #[allow(unsafe_code)]
    pub(crate) fn of(pipe: &OwnedHandle) -> io::Result<PipeKind> {
        let mut flags = 0;
        let none = ptr::null_mut();
        // SAFETY: one pointer is valid for a write, and null pointers ask for nothing.
        match unsafe { GetNamedPipeInfo(pipe.as_raw_handle(), &mut flags, none, none, none) } {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(PipeKind {
                is_server: flags & PIPE_SERVER_END != 0,
                has_half_close: flags & PIPE_TYPE_MESSAGE != 0,
            }),
        }
    }
}

/// Makes a pipe for an event loop.
#[allow(unsafe_code)]
pub(crate) fn into_named_pipe(pipe: OwnedHandle) -> NamedPipe {
    // SAFETY: the handle is an overlapped pipe's, and is given away.
    unsafe { NamedPipe::from_raw_handle(pipe.into_raw_handle()) }
}

/// Returns another handle of an event loop's pipe.
#[allow(unsafe_code)]
pub(crate) fn clone_handle(pipe: &NamedPipe) -> io::Result<OwnedHandle> {
    // SAFETY: it is open as long as the pipe is borrowed.
    unsafe { BorrowedHandle::borrow_raw(pipe.as_raw_handle()) }.try_clone_to_owned()
}

/// Returns whether the peer has closed, and all that it sent was read.
#[cfg(feature = "cli")]
#[allow(unsafe_code)]
pub(crate) fn is_pipe_hung_up(pipe: &OwnedHandle) -> bool {
    let none = ptr::null_mut();
    // SAFETY: null pointers ask for nothing.
    let peeked = unsafe {
        windows_sys::Win32::System::Pipes::PeekNamedPipe(
            pipe.as_raw_handle(),
            ptr::null_mut(),
            0,
            none,
            none,
            none,
        )
    };
    peeked == 0
}

/// Returns whether a read failed because the peer has closed.
pub(crate) fn is_pipe_eof(error: &io::Error) -> bool {
    has_code(error, ERROR_BROKEN_PIPE)
}

/// Cuts a client off: its reads and writes fail, and what it hasn't read is lost.
#[allow(unsafe_code)]
pub(crate) fn disconnect_pipe(pipe: &OwnedHandle) {
    // SAFETY: the handle is open. Another one than a server's end is refused.
    unsafe { DisconnectNamedPipe(pipe.as_raw_handle()) };
}

/// Waits until the peer has read all that was written, or has closed.
#[allow(unsafe_code)]
fn flush(pipe: &OwnedHandle) {
    // SAFETY: the handle is open.
    unsafe { FlushFileBuffers(pipe.as_raw_handle()) };
}

/// Ends a [`flush`] by force. What was written and not taken may be lost.
#[allow(unsafe_code)]
fn cut(pipe: &OwnedHandle) {
    disconnect_pipe(pipe);
    // SAFETY: the handle is open, and no structure means all that is under way.
    unsafe { CancelIoEx(pipe.as_raw_handle(), ptr::null()) };
}

/// Writes the message of no bytes that is a half-close.
#[allow(unsafe_code)]
fn write_nothing(pipe: &OwnedHandle) -> io::Result<()> {
    let event = ManualResetEvent::new()?;
    let mut overlapped = OVERLAPPED {
        // The event loop would take the outcome for one of its own.
        hEvent: event.unheard(),
        ..OVERLAPPED::default()
    };
    let handle = pipe.as_raw_handle();
    // SAFETY: no byte is read, and the structure lives until the system has let go of it, below.
    unsafe {
        let none = ptr::null_mut();
        if WriteFile(handle, ptr::null(), 0, none, &raw mut overlapped) == 0 {
            let error = io::Error::last_os_error();
            if !has_code(&error, ERROR_IO_PENDING) {
                return Err(error);
            }
        }
        match GetOverlappedResult(handle, &raw const overlapped, &mut 0, 1) {
            0 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    }
}

/// What is to follow the last byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Last {
    HalfClose,
    /// The client is to see a failure, and no EOF.
    Disconnect,
}

/// How long a peer may take to read what is left after we have closed.
const LEFT: Duration = Duration::from_secs(60);

/// What follows the last byte of a pipe, kept back until the peer has read that: a message of no
/// bytes that a reader finds behind others can be swallowed together with them (go-winio flushes
/// first as well), and a disconnect takes what is unread away. Only a blocking call tells that all
/// was read: it has a thread.
///
/// Dropped when the connection is over: then the peer has [`LEFT`] to read the rest.
#[derive(Debug)]
pub(crate) struct LastWord(Arc<Word>);

#[derive(Debug)]
struct Word {
    pipe: OwnedHandle,
    said: Mutex<bool>,
    done: Condvar,
}

impl LastWord {
    /// Begins to say it, on another handle of the pipe.
    pub(crate) fn begin(pipe: OwnedHandle, last: Last) -> LastWord {
        let word = Arc::new(Word {
            pipe,
            said: Mutex::new(false),
            done: Condvar::new(),
        });
        *lock(&UNSAID) += 1;
        let saying = Arc::clone(&word);
        let say = move || {
            flush(&saying.pipe);
            saying.say(last);
        };
        if thread::Builder::new()
            .name("hvsock-pipe".into())
            .spawn(say)
            .is_err()
        {
            word.say(last);
        }
        LastWord(word)
    }
}

impl Word {
    fn say(&self, last: Last) {
        say_at_once(&self.pipe, last);
        *lock(&self.said) = true;
        self.done.notify_all();
        *lock(&UNSAID) -= 1;
        SAID.notify_all();
    }
}

impl Drop for LastWord {
    fn drop(&mut self) {
        if *lock(&self.0.said) {
            return;
        }
        let word = Arc::clone(&self.0);
        let watch = move || {
            let said = lock(&word.said);
            let wait = word.done.wait_timeout_while(said, LEFT, |said| !*said);
            let (said, _) = recover(wait);
            if !*said {
                cut(&word.pipe);
            }
        };
        // Without a thread, the peer's close ends it.
        let _ = thread::Builder::new()
            .name("hvsock-pipe".into())
            .spawn(watch);
    }
}

/// Says a last word at once, where the peer can have nothing unread.
pub(crate) fn say_at_once(pipe: &OwnedHandle, last: Last) {
    match last {
        // It fails when the peer has closed.
        Last::HalfClose => drop(write_nothing(pipe)),
        Last::Disconnect => disconnect_pipe(pipe),
    }
}

/// How many last words are not said yet.
static UNSAID: Mutex<usize> = Mutex::new(0);
static SAID: Condvar = Condvar::new();

/// Waits until all last words are said, at most `timeout`: the end of the process would cut them
/// short.
pub(crate) fn wait_for_delivery(timeout: Duration) {
    drop(SAID.wait_timeout_while(lock(&UNSAID), timeout, |unsaid| *unsaid > 0));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use windows_sys::Win32::Security::Authorization::ConvertSecurityDescriptorToStringSecurityDescriptorW;
    use windows_sys::Win32::Security::{DACL_SECURITY_INFORMATION, GetKernelObjectSecurity};

    /// Who may use a pipe, in SDDL, as the system keeps it.
    #[allow(unsafe_code)]
    fn access_of(pipe: &OwnedHandle) -> String {
        let (mut descriptor, mut text, mut len) = ([0u64; 128], ptr::null_mut(), 0);
        let what = DACL_SECURITY_INFORMATION;
        // SAFETY: the memory is as large as said, and the pointers are valid for writes; the text
        // has `len` units.
        unsafe {
            let memory = descriptor.as_mut_ptr().cast();
            let got = GetKernelObjectSecurity(pipe.as_raw_handle(), what, memory, 1024, &mut len);
            assert_ne!(got, 0, "{}", io::Error::last_os_error());
            let told = ConvertSecurityDescriptorToStringSecurityDescriptorW(
                memory,
                SDDL_REVISION_1,
                what,
                &mut text,
                &mut len,
            );
            assert_ne!(told, 0, "{}", io::Error::last_os_error());
            let units = std::slice::from_raw_parts(text, len as usize);
            let sddl = String::from_utf16(units).unwrap();
            LocalFree(text.cast());
            sddl.trim_end_matches('\0').to_owned()
        }
    }

    #[test]
    fn a_pipe_is_its_users_unless_others_are_named() {
        let me = user().unwrap();
        assert!(me.starts_with("S-1-5-"), "{me}");
        let name = format!("hvsock-access-{}", std::process::id());
        let pipe = create_pipe(&name, &Access::new(None).unwrap(), true).unwrap();
        let sddl = access_of(&pipe);
        assert_eq!(sddl.matches("(A;").count(), 1, "{sddl}");
        assert!(sddl.contains(&format!(";;;{me})")), "{sddl}");
        let two = format!("D:P(A;;GA;;;{me})(A;;GRGW;;;BA)");
        let pipe = create_pipe(
            &format!("{name}-2"),
            &Access::new(Some(&two)).unwrap(),
            true,
        );
        let sddl = access_of(&pipe.unwrap());
        assert_eq!(sddl.matches("(A;").count(), 2, "{sddl}");
        assert!(sddl.contains(";;;BA)"), "{sddl}");
        assert!(Access::new(Some("nonsense")).is_err());
    }
}
