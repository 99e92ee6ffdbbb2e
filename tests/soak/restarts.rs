//! The soak with restarts: hvsock is ended again and again, by SIGTERM and by SIGKILL in turn,
//! while the crowd goes on and the guest dials. Between an end and the next start all slots must
//! come back.

use crate::child::{Output, Places, Proxy, wait_until};
use crate::client::Conn;
use crate::crowd::{HOST_ECHO_TCP, World};
use crate::guest::{ECHO, LONG, STUBBORN};
use crate::{GUESTS, THREADS};
use crate::{assert_alive, assert_free, client, directory, guest, host};
use crate::{raise_descriptor_limit, report, variable};
use hvsock::simulate::{Dial, Service, Vm};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// How many clients there are, and how long hvsock lives, if nobody says otherwise.
const CLIENTS: usize = 800;
const LIFE: Duration = Duration::from_millis(500);

/// What the guest dials all the time, so often a second.
const PACE: u32 = 20;

/// How long the guest's other programs are idle between two dials: see `tests/kill`.
const BETWEEN_DIALS: Duration = Duration::from_millis(20);

/// `--grace`, what comes after it, and what a loaded machine may add.
const END: Duration = Duration::from_secs(20);

/// How long the slots are looked at until the VM's fate is.
const GLANCE: Duration = Duration::from_millis(200);

fn start_vm(places: &Places) -> Vm {
    let pace = NonZeroU32::new(PACE).expect("not 0");
    guest::builder(&places.vm)
        // As frail as the device, and no frailer: of what a guest has just dialled it bears a close
        // that comes after the first bytes, and a SIGKILL may come between the accept and the
        // message to the keeper.
        .strict(false)
        .failed_dials(1)
        // It heeds no EOF, and ends for all that: what sends for ever keeps its slot, whoever reads
        // it.
        .guest(STUBBORN, Service::Heedless(3_000_000))
        .dial(HOST_ECHO_TCP, Dial::Paced(pace))
        .start()
        .unwrap()
}

fn start(places: &Places, world: Option<&World>) -> Result<Proxy, String> {
    let none = HashMap::new();
    let tcp = world.map_or(&none, |world| &world.tcp);
    let options = ["--grace", "1", "--drain-timeout", "5"];
    Proxy::start(places, tcp, &options, Output::Kept)
}

/// Starts a proxy where there was one. Its TCP ports may be the local ports of other processes'
/// connections by now: those end.
fn start_again(world: &World) -> Result<Proxy, String> {
    let deadline = Instant::now() + LONG;
    loop {
        match start(world.places, Some(world)) {
            Err(e) if e.contains("Address already in use") && Instant::now() < deadline => {
                thread::sleep(GLANCE);
            }
            started => return started,
        }
    }
}

/// Ends a proxy and starts another, as soon as all slots are free.
fn restart(world: &World, proxy: &mut Proxy, signal: Signal) -> Result<(), String> {
    world.changes.fetch_add(1, Ordering::SeqCst);
    proxy.signal(signal);
    let (status, _) = proxy.wait(END)?;
    if signal == Signal::SIGTERM && !status.success() {
        return Err(format!("{status}: {}", proxy.log_tail()));
    }
    *world.may_dial.write().unwrap() = false;
    let mut free = false;
    // A VM that is dead has no more to count.
    wait_until(LONG, || {
        free = world
            .vm
            .wait_for(GLANCE, |counters| counters.live_slots == 0);
        free || world.vm.fate().is_some()
    });
    if let Some(fate) = world.vm.fate() {
        return Err(fate.to_string());
    }
    if !free {
        return Err(format!("slots stay taken: {:?}", world.vm.counters()));
    }
    *proxy = start_again(world)?;
    *world.may_dial.write().unwrap() = true;
    world.changes.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

#[test]
fn the_vm_survives_restarts() {
    raise_descriptor_limit();
    let life = variable("HVSOCK_SOAK_RESTART").map(Duration::from_secs);
    let total = life.and_then(|_| variable("HVSOCK_SOAK"));
    let total = total.map_or(CLIENTS, |total| total as usize);
    let life = life.unwrap_or(LIFE);
    let seed = variable("HVSOCK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("soak: {total} clients, a restart every {life:?}, HVSOCK_SEED={seed}");
    let begun = Instant::now();

    let root = directory();
    let host = host::Host::start(root.path());
    let places = Places::new(root.path(), &host);
    let vm = start_vm(&places);
    let mut proxy = start(&places, None).unwrap();
    let mut world = World::new(&vm, &places, seed, total, proxy.tcp.clone());
    // The kernel closes what a killed process had.
    world.ends_silently = true;
    world.between_dials = BETWEEN_DIALS;
    let world = &world;
    let mut restarts = 0;
    thread::scope(|scope| {
        let crowd: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| world.clients()))
            .chain((0..GUESTS).map(|guest| scope.spawn(move || world.guests(guest))))
            .collect();
        let is_done = || {
            let issued = world.issued.load(Ordering::SeqCst);
            issued >= total || world.is_over() || vm.fate().is_some()
        };
        while !wait_until(life, is_done) {
            let signal = [Signal::SIGTERM, Signal::SIGKILL][restarts % 2];
            if let Err(error) = restart(world, &mut proxy, signal) {
                world.fail(format!("restart {restarts}, {signal}: {error}"));
            }
            restarts += 1;
        }
        for thread in crowd {
            if thread.join().is_err() {
                world.fail("a thread panicked".into());
            }
        }
    });
    let carried = begun.elapsed();
    report(world);
    if let Some(fate) = vm.fate() {
        panic!("{fate}");
    }
    let failures = world.failures.lock().unwrap().clone();
    assert!(failures.is_empty(), "{failures:#?}\n{}", proxy.log_tail());
    vm.stop_dialling();
    assert_free(&vm);
    let mut last = Conn::open(&world.place(ECHO, true)).unwrap();
    client::echo(&mut last, b"still here", true).unwrap();
    assert_alive(&vm);
    let counters = vm.counters();
    assert_eq!(counters.guest_dials_failed, 0, "{counters:?}");
    assert!(counters.guest_echoes > 0 && restarts > 0, "{counters:?}");
    println!(
        "soak: {total} clients and {restarts} restarts in {carried:.1?}, {} dials, {} guest dials, peak {} slots: the VM lives",
        counters.dials, counters.guest_dials, counters.peak_slots,
    );
}
