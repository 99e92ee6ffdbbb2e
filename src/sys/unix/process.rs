//! Whether another process is ending: a process that crashes closes its sockets as one does that
//! has finished.

#[cfg(target_os = "linux")]
use std::fs;
#[cfg(target_vendor = "apple")]
use std::io;

/// Another process, to be asked again and again whether it is ending. A process counts as ending
/// while it closes its files: it does that after it has freed its memory.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) id: u32,
    /// Its `proc_pid_statm(5)`, of which each read is up to date. It may be hidden (`hidepid=`).
    #[cfg(target_os = "linux")]
    pages: Option<fs::File>,
}

/// All processes, for a caller that must not wait: what it asks touches nothing but what the kernel
/// has in memory. A path is not walked for it, which may lead through a file system that hangs.
///
/// A pidfd would tell too late: a process closes its files, which its peers see as an EOF, before
/// it counts as ended there.
#[derive(Debug)]
pub(crate) struct Processes {
    /// `/proc`, if it is there.
    #[cfg(target_os = "linux")]
    directory: Option<fs::File>,
}

impl Processes {
    /// Opens what is asked later. This may wait.
    pub(crate) fn open() -> Processes {
        Processes {
            #[cfg(target_os = "linux")]
            directory: fs::File::open("/proc").ok(),
        }
    }

    pub(crate) fn get(&self, id: u32) -> Process {
        #[cfg(target_os = "linux")]
        {
            use nix::fcntl::{OFlag, openat};
            use nix::sys::stat::Mode;
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let open = |directory| openat(directory, &*format!("{id}/statm"), flags, Mode::empty());
            let pages = self.directory.as_ref().and_then(|it| open(it).ok());
            Process {
                id,
                pages: pages.map(fs::File::from),
            }
        }
        #[cfg(not(target_os = "linux"))]
        Process { id }
    }
}

impl Process {
    /// Makes one that is asked once. This may wait.
    pub(crate) fn new(id: u32) -> Process {
        Processes::open().get(id)
    }

    /// Returns whether it is ending or has ended; false where that isn't known.
    pub(crate) fn is_ending(&self) -> bool {
        #[cfg(target_os = "linux")]
        {
            use std::os::unix::fs::FileExt;
            let mut start = [0; 2];
            if let Some(pages) = &self.pages {
                return match pages.read_at(&mut start, 0) {
                    // All are 0 when it has no memory any more.
                    Ok(_) => start == *b"0 ",
                    Err(e) => e.raw_os_error() == Some(nix::libc::ESRCH),
                };
            }
        }
        #[cfg(target_vendor = "apple")]
        {
            is_ending(self.id)
        }
        #[cfg(not(target_vendor = "apple"))]
        {
            i32::try_from(self.id).is_ok_and(|id| !crate::sys::process_is_alive(id))
        }
    }
}

/// `proc_pidinfo` with `PROC_PIDT_SHORTBSDINFO`, which tells of other users' processes, too
/// (`bsd/sys/proc_info.h`).
#[cfg(target_vendor = "apple")]
#[allow(unsafe_code)]
fn is_ending(process: u32) -> bool {
    const SHORT_INFO: nix::libc::c_int = 13;
    const IN_EXIT: u32 = 4;
    /// `struct proc_bsdshortinfo`: 64 bytes.
    #[repr(C)]
    #[derive(Default)]
    struct ShortInfo {
        ids: [u32; 3],
        status: u32,
        command: [u8; 16],
        flags: u32,
        users: [u32; 6],
        reserved: u32,
    }
    let mut info = ShortInfo::default();
    let size = size_of::<ShortInfo>() as nix::libc::c_int;
    let Ok(pid) = nix::libc::c_int::try_from(process) else {
        return false;
    };
    // SAFETY: the call writes at most `size` bytes to `info`, which has so many and may hold any.
    let written =
        unsafe { nix::libc::proc_pidinfo(pid, SHORT_INFO, 0, (&raw mut info).cast(), size) };
    match written {
        n if n == size => info.flags & IN_EXIT != 0,
        _ => io::Error::last_os_error().raw_os_error() == Some(nix::libc::ESRCH),
    }
}

/// `proc_name(3)` (`libproc.h`), which tells of other users' processes, too.
#[cfg(target_vendor = "apple")]
#[allow(unsafe_code)]
pub(super) fn program_name(process: u32) -> Option<String> {
    /// `2 * MAXCOMLEN`, the most that there is of it (`bsd/sys/proc_info.h`), and a zero.
    const LONGEST: usize = 33;
    let mut name = [0_u8; LONGEST];
    let pid = nix::libc::c_int::try_from(process).ok()?;
    // SAFETY: the call writes at most `LONGEST` bytes to `name`, which has so many.
    let written = unsafe { nix::libc::proc_name(pid, name.as_mut_ptr().cast(), LONGEST as u32) };
    let length = usize::try_from(written).ok().filter(|length| *length > 0)?;
    let name = name.get(..length)?;
    Some(String::from_utf8_lossy(name).into_owned())
}
