//! Copies of the process' descriptors, as children have them that other threads fork, until they
//! execute their programs: a socket that is closed meanwhile has no end yet.

use std::thread;
use std::time::Duration;

use crate::{Manner, has};

/// How long a child lives, and how many of them at a time: there is always one.
const LIFE: Duration = Duration::from_millis(4);
const CHILDREN: usize = 4;

// The linker has the loader call it when the library is loaded.
#[used]
#[unsafe(link_section = ".init_array")]
static BEGIN: extern "C" fn() = begin;

extern "C" fn begin() {
    if has(Manner::Copies) {
        thread::spawn(fork_for_ever);
    }
}

fn fork_for_ever() {
    let mut living = 0;
    loop {
        if living < CHILDREN {
            living += usize::from(fork());
        }
        while living > 0 && reap() {
            living -= 1;
        }
        thread::sleep(LIFE / CHILDREN as u32);
    }
}

/// Waits for none of them; returns whether one has ended.
fn reap() -> bool {
    let options = libc::__WCLONE | libc::WNOHANG;
    // SAFETY: no status is asked for.
    unsafe { libc::waitpid(-1, std::ptr::null_mut(), options) > 0 }
}

/// Makes a child that only lives. It sends no signal at its end, and no other wait(2) sees it.
fn fork() -> bool {
    // SAFETY: without flags it has its own copy of the memory, and goes on below; it calls nothing
    // but the kernel, whatever locks other threads had.
    unsafe {
        match libc::syscall(libc::SYS_clone, 0, 0, 0, 0, 0) {
            0 => {
                let life = libc::timespec {
                    tv_sec: 0,
                    tv_nsec: LIFE.subsec_nanos().into(),
                };
                libc::syscall(libc::SYS_nanosleep, &raw const life, 0);
                libc::syscall(libc::SYS_exit_group, 0);
                false
            }
            child => child > 0,
        }
    }
}
