//! Programs that are started: what they must not inherit, and the terminals that they may have.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::{Signal, killpg};
use nix::sys::termios::{SpecialCharacterIndices, tcgetattr};
use nix::unistd::Pid;

/// The most descriptors that are looked through one by one.
const MOST_DESCRIPTORS: u64 = 65_536;

/// The group of processes that a child leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leads {
    /// Its own group.
    Group,
    /// Its own session, whose terminal is its standard input.
    Session,
}

/// Has a command begin as a program of its own: it leads a group or a session, SIGHUP ends it
/// unless it asks otherwise, and it has no descriptor but its standard ones.
#[allow(unsafe_code)]
pub(crate) fn detach_command(command: &mut Command, leads: Leads) {
    if leads == Leads::Group {
        command.process_group(0);
    }
    let most = super::descriptor_limit().unwrap_or(MOST_DESCRIPTORS);
    let most = most.min(MOST_DESCRIPTORS) as libc::c_int;
    let prepare = move || {
        if leads == Leads::Session {
            take_terminal()?;
        }
        close_at_exec(most);
        // SAFETY: SIG_DFL is no function of ours. The call may be made between fork and exec
        // (`signal-safety(7)`).
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes nothing but calls that `signal-safety(7)`
    // allows there (or that are bare system calls), and allocates nothing: an error of a system
    // call holds its number alone.
    unsafe { command.pre_exec(prepare) };
}

/// Makes a session, whose terminal is the standard input.
#[allow(unsafe_code)]
fn take_terminal() -> io::Result<()> {
    // SAFETY: the call takes nothing.
    if unsafe { libc::setsid() } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the request takes a number, not a pointer (`ioctl_tty(2)`).
    match unsafe { libc::ioctl(0, libc::TIOCSCTTY as _, 0) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Has the exec close all descriptors but the standard ones. They stay open until then, since std
/// reports a failed exec by one.
#[allow(unsafe_code)]
fn close_at_exec(most: libc::c_int) {
    #[cfg(target_os = "linux")]
    {
        /// `linux/close_range.h`; the call came with Linux 5.9, and the flag with 5.11.
        const CLOEXEC: libc::c_uint = 1 << 2;
        // SAFETY: the call changes flags of descriptors that this process has for itself.
        let done = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, CLOEXEC) };
        if done == 0 {
            return;
        }
    }
    for descriptor in 3..most {
        // SAFETY: as above. One that isn't open gives an error, and there is nothing to do then.
        unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
}

/// Makes a terminal. Returns our side of it and the program's.
pub(crate) fn make_terminal() -> io::Result<(File, OwnedFd)> {
    // What a terminal of people has. A program that draws can't work with one of no size.
    let size = Winsize {
        ws_row: 24,
        ws_col: 80,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pair = openpty(Some(&size), None)?;
    for side in [&pair.master, &pair.slave] {
        use nix::fcntl::FdFlag;
        fcntl(side, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok((File::from(pair.master), pair.slave))
}

/// Has calls on it fail where they would wait.
pub(crate) fn set_nonblocking(descriptor: &File) -> io::Result<()> {
    set_flags(descriptor, |flags| flags | OFlag::O_NONBLOCK)
}

/// Has calls on it wait, whatever it was opened with.
#[cfg(feature = "cli")]
pub(crate) fn set_blocking(descriptor: &File) -> io::Result<()> {
    set_flags(descriptor, |flags| flags - OFlag::O_NONBLOCK)
}

fn set_flags(descriptor: &File, change: impl FnOnce(OFlag) -> OFlag) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(descriptor, FcntlArg::F_GETFL)?);
    fcntl(descriptor, FcntlArg::F_SETFL(change(flags)))?;
    Ok(())
}

/// Returns the character that stands for the end of input at a terminal, as it is set now.
pub(crate) fn end_of_input(terminal: &File) -> u8 {
    const CONTROL_D: u8 = 4;
    let set =
        tcgetattr(terminal).map(|it| it.control_chars[SpecialCharacterIndices::VEOF as usize]);
    set.unwrap_or(CONTROL_D)
}

/// Sends SIGHUP to the group that a child leads.
pub(crate) fn hang_up_group(leader: u32) {
    let _ = signal_group(leader, Some(Signal::SIGHUP));
}

/// Sends SIGKILL to the group that a child leads.
pub(crate) fn kill_group(leader: u32) {
    let _ = signal_group(leader, Some(Signal::SIGKILL));
}

/// Returns whether the group that a child leads, or has led, has processes.
pub(crate) fn has_group(leader: u32) -> bool {
    signal_group(leader, None).is_ok()
}

fn signal_group(leader: u32, signal: Option<Signal>) -> nix::Result<()> {
    match i32::try_from(leader) {
        // 0 and 1 are no group of a child.
        Ok(group @ 2..) => killpg(Pid::from_raw(group), signal),
        _ => Err(nix::errno::Errno::ESRCH),
    }
}

/// Returns whether the peer of a Unix socket has closed it: not if it has only half-closed.
pub(crate) fn is_closed_by_peer(socket: &std::os::unix::net::UnixStream) -> bool {
    match super::super::AS_ON_LINUX {
        true => super::is_hung_up(std::os::fd::AsFd::as_fd(socket)),
        // Elsewhere poll(2) says of a half-close, too, that it has hung up; the name of the other
        // end is gone with it (macOS).
        false => {
            socket.peer_addr().is_err()
                || cfg!(target_os = "linux") && super::is_hung_up(std::os::fd::AsFd::as_fd(socket))
        }
    }
}
