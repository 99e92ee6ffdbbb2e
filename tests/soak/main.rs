//! The soak: the stand-in VM with all its frailties, the real binary in front of it, and a crowd
//! that is mostly rude.
//!
//! `HVSOCK_SOAK` is the number of clients (1,500 if not said), `HVSOCK_SEED` repeats a run. The
//! long run: `scripts/soak`. `HVSOCK_SOAK_RESTART` has hvsock restarted each time so many seconds
//! have gone by, and only that run. With `HVSOCK_SOAK_DISTURB` (Linux) a listener is shut down from
//! outside each time so many milliseconds have gone by, nobody reads the log, and the VM's files
//! are FIFOs and worse: `scripts/disturb`.
#![cfg(all(unix, feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod child;
mod client;
#[path = "../common/command.rs"]
mod command;
#[path = "../common/mod.rs"]
mod common;
mod crowd;
mod disturb;
mod guest;
mod host;
mod restarts;

use child::{Output, Places, Proxy, wait_until};
use client::{Conn, Place};
use command::{run, text};
use crowd::{Tally, World};
use guest::{CHARGEN, DOWNLOAD, ECHO, LONG, NEVER, STUBBORN};
use hvsock::simulate::Vm;
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::io::{self, ErrorKind, Read, Write};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const THREADS: usize = 8;
const GUESTS: u64 = 2;

/// `--grace` of the proxy that is ended in the middle.
const GRACE: Duration = Duration::from_secs(2);

/// `--drain-timeout`, in seconds: stubborn guests are given up then.
const DRAIN: &str = "2";

/// A keeper would go on reading what sends for ever, and serve what the guest dials: here the proxy
/// ends all by itself. With a keeper: `restarts`.
const NO_KEEPER: &str = "--no-keeper";

/// How long the proxy takes leave of guests after the grace.
const LAST_LEAVE: Duration = Duration::from_secs(2);

/// How long the first connection may take.
const UP: Duration = Duration::from_secs(10);

/// What a loaded machine may add to any time.
const SLACK: Duration = Duration::from_secs(4);

/// Clients at once while the guest is paused: were all dialled, it would be its end.
const FLOOD: usize = 600;

/// Downloads that nobody reads then.
const HOARDS: usize = 20;

/// Dials that the guest may be left with: 64, a probe, and those that it had answered when it was
/// paused. 512 are its end.
const MOST_UNANSWERED: u64 = 150;

/// Clients at once, for whom the VM has not slots enough; and how many of them the proxy lets in by
/// default.
const HOUSE: usize = 1_100;
const PLACES: u64 = 900;

/// The peak of the proxy's memory, in KiB: 900 connections with two buffers of 64 KiB each, and as
/// much again.
const MEMORY: u64 = 256 * 1024;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

fn assert_alive(vm: &Vm) {
    if let Some(fate) = vm.fate() {
        panic!("{fate}");
    }
    assert_eq!(vm.counters().all_offences(), 0);
}

fn assert_free(vm: &Vm) {
    let free = vm.wait_for(LONG, |counters| counters.live_slots == 0);
    assert_alive(vm);
    assert!(free, "slots stay taken: {:?}", vm.counters());
}

fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = hard.min(10_000);
    setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).unwrap();
}

fn directory() -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix("hvs")
        .tempdir_in("/tmp")
        .unwrap()
}

#[test]
fn the_vm_survives_a_rude_crowd() {
    raise_descriptor_limit();
    let total = variable("HVSOCK_SOAK")
        .map_or(1_500, |n| n as usize)
        .max(10);
    let seed = variable("HVSOCK_SEED").unwrap_or_else(|| fastrand::u64(..));
    println!("soak: {total} clients, HVSOCK_SEED={seed}");
    let start = Instant::now();

    let root = directory();
    let host = host::Host::start(root.path());
    let places = Places::new(root.path(), &host);
    let vm = guest::builder(&places.vm).start().unwrap();
    let disturb = variable("HVSOCK_SOAK_DISTURB").map(Duration::from_millis);
    let output = match disturb {
        Some(_) => Output::Unread,
        None => Output::Kept,
    };
    if disturb.is_some() {
        disturb::put_fifos(&places.vm).unwrap();
    }
    let mut first = Proxy::start(
        &places,
        &HashMap::new(),
        &["--grace", "2", "--drain-timeout", DRAIN, NO_KEEPER],
        output,
    )
    .unwrap();
    let world = World::new(&vm, &places, seed, total, first.tcp.clone());
    canary(&world);
    let mut peak = None;
    let mut second = None;
    let mut idle = None;
    let pid = AtomicU32::new(first.pid());
    let crowd_is_over = AtomicBool::new(false);
    let shut_down = thread::scope(|scope| {
        let disturber = disturb.map(|every| {
            let (world, pid, over) = (&world, &pid, &crowd_is_over);
            scope.spawn(move || disturb::shut_down_listeners(world, pid, every, over))
        });
        let crowd: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| world.clients()))
            .chain((0..GUESTS).map(|guest| {
                let world = &world;
                scope.spawn(move || world.guests(guest))
            }))
            .collect();
        let mut story = || -> Result<(), String> {
            for sixth in [1, 2] {
                reach(&world, total * sixth / 6)?;
                flood(&world)?;
            }
            reach(&world, total / 2)?;
            peak = first.peak_memory();
            end_in_the_middle(&world, &mut first)?;
            let options = ["--grace", "30", "--drain-timeout", DRAIN, NO_KEEPER];
            if disturb.is_some() {
                disturb::put_odd_files(&places.vm).map_err(|error| error.to_string())?;
            }
            let again = Proxy::start(&places, &world.tcp, &options, output)?;
            idle = again.descriptors_at_rest();
            pid.store(again.pid(), Ordering::SeqCst);
            second = Some(again);
            world.changes.fetch_add(1, Ordering::SeqCst);
            *world.may_dial.write().unwrap() = true;
            for sixth in [4, 5] {
                reach(&world, total * sixth / 6)?;
                flood(&world)?;
            }
            reach(&world, total)
        };
        if let Err(error) = story() {
            world.fail(error);
            vm.resume();
        }
        for thread in crowd {
            if thread.join().is_err() {
                world.fail("a thread panicked".into());
            }
        }
        crowd_is_over.store(true, Ordering::SeqCst);
        disturber.map(|thread| thread.join().unwrap())
    });
    let carried = start.elapsed();
    report(&world);
    if let Some(fate) = vm.fate() {
        panic!("{fate}");
    }
    let failures = world.failures.lock().unwrap().clone();
    let log = second.as_ref().map_or(String::new(), Proxy::log_tail);
    assert!(failures.is_empty(), "{failures:#?}\n{log}");
    let mut second = second.expect("a second proxy");

    assert_free(&vm);
    full_house(&world);
    assert_free(&vm);
    let released = wait_until(LONG, || second.descriptors() == idle);
    assert!(
        released,
        "{:?} descriptors, and {idle:?} before all began",
        second.descriptors()
    );
    if let Some(times) = shut_down {
        check_disturbed(&world, times);
    }
    peak = peak.max(second.peak_memory());
    assert!(peak.is_none_or(|peak| peak < MEMORY), "{peak:?} KiB");

    end_by_two_signals(&world, &mut second);
    assert_free(&vm);
    let counters = vm.counters();
    println!("{counters:?}");
    // The line comes whole, and is on its way before the device looks, but for bad luck.
    assert_eq!(counters.silent_closes, 0);
    assert!(counters.stalls < counters.dials / 2, "{counters:?}");
    assert_eq!(
        counters.turned_away, 0,
        "more connections than the device has slots"
    );
    println!(
        "soak: {total} clients in {carried:.1?} ({:.1?} in all), {} dials, {} guest dials, peak {} slots, proxy at most {:.1} MiB: the VM lives",
        start.elapsed(),
        counters.dials,
        counters.guest_dials,
        counters.peak_slots,
        peak.unwrap_or(0) as f64 / 1024.0,
    );
}

/// The proxy was disturbed, and has got over it.
fn check_disturbed(world: &World, shut_down: usize) {
    let control = world.places.control();
    let answer = run(&["status", "--json", "--control", text(&control)]);
    assert!(answer.status.success(), "{answer:?}");
    let status: serde_json::Value = serde_json::from_slice(&answer.stdout).unwrap();
    assert_eq!(status["live"], 0, "{status}");
    for forward in status["forwards"].as_array().unwrap() {
        assert_eq!(forward["state"], "listening", "{forward}");
    }
    let dropped = status["log_dropped"].as_u64().unwrap();
    assert!(dropped > 0 && shut_down > 0, "{dropped} {shut_down}");
    println!(
        "soak: {shut_down} listeners were shut down, {} clients came at such a moment, {dropped} lines of the log were dropped: no client noticed",
        world.came_again.load(Ordering::Relaxed)
    );
}

/// One connection through and through: then the proxy is wholly up.
fn canary(world: &World) {
    for tcp in [true, false] {
        let mut conn = Conn::open(&world.place(ECHO, tcp)).unwrap();
        conn.set_timeout(UP);
        client::echo(&mut conn, b"alive", true)
            .unwrap_or_else(|error| panic!("the first client was not served: {error}"));
    }
}

fn reach(world: &World, number: usize) -> Result<(), String> {
    let mut seen = (0, Instant::now());
    loop {
        let issued = world.issued.load(Ordering::SeqCst);
        if world.is_over() || world.vm.fate().is_some() {
            return Err("given up".into());
        }
        if issued >= number {
            return Ok(());
        }
        if issued > seen.0 {
            seen = (issued, Instant::now());
        }
        // Nobody may take longer than a client's own patience.
        if seen.1.elapsed() > LONG * 2 {
            return Err(format!("nothing moves any more after {issued} clients"));
        }
        thread::sleep(child::LOOK);
    }
}

/// The guest is paused, and everybody comes.
fn flood(world: &World) -> Result<(), String> {
    let text = |error: io::Error| format!("flood: {error}");
    // Connections from before, on which the client goes on sending: that is no sign of life from
    // the guest.
    let mut talkers = Vec::new();
    for tcp in [true, false] {
        let talker = world.served(|| {
            let mut conn = world.open(ECHO, tcp)?;
            client::echo(&mut conn, b"before", false)?;
            Ok(conn)
        });
        talkers.push(talker.map_err(text)?);
    }
    // Downloads that nobody read: what the guest sent before it was paused still comes out of the
    // buffers. Nor is that one.
    let mut hoards = Vec::new();
    for _ in 0..HOARDS {
        let hoard = world.served(|| {
            let mut conn = world.open(CHARGEN, false)?;
            conn.read_exact(&mut [0])?;
            conn.set_timeout(child::LOOK);
            Ok(conn)
        });
        hoards.push(hoard.map_err(text)?);
    }
    world.vm.pause();
    let before = world.vm.counters().dials;
    let mut crowd = Vec::new();
    let mut hoard = vec![0; 128 * 1024];
    for number in 0..FLOOD {
        let tcp = number % 3 == 0;
        let ask = move || {
            let mut conn = world.open(ECHO, tcp)?;
            conn.write_all(b"anybody there?")?;
            Ok(conn)
        };
        let conn = world.served(ask).map_err(text)?;
        if number % 4 == 0 {
            conn.reset();
        } else {
            crowd.push((conn, ask));
        }
        if number % 10 == 0 {
            for talker in &mut talkers {
                talker.write_all(b".").map_err(text)?;
            }
            // Nothing may be left.
            let _ = hoards[number / 10 % HOARDS].read(&mut hoard);
        }
    }
    // Long enough for all to be dialled if nothing held them back.
    wait_until(Duration::from_millis(200), || {
        let _ = talkers
            .iter_mut()
            .map(|talker| talker.write_all(b"."))
            .count();
        world.vm.fate().is_some()
    });
    let dialled = world.vm.counters().dials - before;
    world.vm.resume();
    if let Some(fate) = world.vm.fate() {
        return Err(fate.to_string());
    }
    println!("soak: {dialled} dials to the paused guest");
    if dialled > MOST_UNANSWERED {
        return Err(format!("{dialled} dials to a guest that answers none"));
    }
    for (conn, ask) in crowd.drain(..).step_by(20) {
        let mut first = Some(conn);
        let answered = world.served(|| {
            let mut conn = first.take().map_or_else(ask, Ok)?;
            client::expect(&mut conn, b"anybody there?", 64, Duration::ZERO)
        });
        answered.map_err(text)?;
    }
    Ok(())
}

/// More clients than the VM has slots: those who find one are served, the others when they have
/// gone.
fn full_house(world: &World) {
    // They come while the guest is paused, and are let loose all at once.
    world.vm.pause();
    let mut crowd: Vec<Conn> = (0..HOUSE)
        .map(|number| {
            let mut conn = Conn::open(&world.place(ECHO, number % 2 == 0)).unwrap();
            conn.write_all(b"is there a place?").unwrap();
            conn
        })
        .collect();
    world.vm.resume();
    let filled = world
        .vm
        .wait_for(LONG, |counters| counters.live_slots >= PLACES);
    assert_alive(world.vm);
    assert!(filled, "{:?}", world.vm.counters());
    // Time enough for the others to come in, too.
    let time = Duration::from_millis(100);
    let crowded = world
        .vm
        .wait_for(time, |counters| counters.live_slots > PLACES + 20);
    assert!(!crowded, "{:?}", world.vm.counters());
    for (number, conn) in crowd.iter_mut().enumerate() {
        // Whoever left before has made room.
        client::expect(conn, b"is there a place?", 64, Duration::ZERO)
            .unwrap_or_else(|error| panic!("client {number} of a full house: {error}"));
        conn.half_close().unwrap();
        client::expect_end(conn).unwrap();
    }
    assert_alive(world.vm);
}

/// What is under way when a proxy ends.
struct Transfers {
    /// Downloads that the grace suffices for, and their seeds.
    finishing: Vec<(Conn, u64)>,
    /// Downloads without end; whether over TCP, and whether they are read from before the proxy has
    /// gone.
    endless: Vec<(Conn, bool, bool)>,
    _silent: Vec<Conn>,
}

const FINISHING: usize = 100_000;

impl Transfers {
    fn begin(world: &World) -> io::Result<Transfers> {
        let (mut finishing, mut endless, mut silent) = (Vec::new(), Vec::new(), Vec::new());
        for number in 0..8 {
            let tcp = number % 2 == 0;
            let seed = world.seed ^ number;
            let conn = world.served(|| {
                let mut conn = world.open(DOWNLOAD, tcp)?;
                conn.write_all(&guest::request(seed, FINISHING))?;
                let start = &guest::pattern(seed, FINISHING)[..100];
                client::expect(&mut conn, start, 100, Duration::ZERO)?;
                Ok(conn)
            })?;
            finishing.push((conn, seed));

            let conn = world.served(|| {
                let mut conn = world.open(CHARGEN, tcp)?;
                conn.read_exact(&mut [0; 100])?;
                Ok(conn)
            })?;
            endless.push((conn, tcp, number < 4));

            let port = [NEVER, ECHO, STUBBORN][number as usize % 3];
            silent.push(world.served(|| world.open(port, tcp))?);
        }
        Ok(Transfers {
            finishing,
            endless,
            _silent: silent,
        })
    }
}

/// Every one of them must arrive whole.
fn finish(finishing: Vec<(Conn, u64)>) -> Result<(), String> {
    all(finishing, |(mut conn, seed)| {
        let rest = &guest::pattern(seed, FINISHING)[100..];
        client::expect(&mut conn, rest, 4096, Duration::from_millis(5))
            .and_then(|()| client::expect_end(&mut conn))
            .map_err(|error| format!("cut off in its grace: {error}"))
    })
}

/// Every one of them must break off, and over TCP be seen to.
fn break_off(endless: Vec<(Conn, bool, bool)>, gone: &AtomicBool) -> Result<(), String> {
    all(endless, |(mut conn, tcp, reads)| {
        if !reads {
            wait_until(LONG, || gone.load(Ordering::SeqCst));
        }
        let mut buffer = [0; 4096];
        let end = loop {
            match conn.read(&mut buffer) {
                Ok(0) => break ErrorKind::UnexpectedEof,
                Ok(_) => {}
                Err(error) => break error.kind(),
            }
        };
        match end {
            ErrorKind::UnexpectedEof if tcp => {
                Err("a download that was cut off ended like a whole one".to_owned())
            }
            ErrorKind::WouldBlock | ErrorKind::TimedOut => {
                Err("a client was not cut off".to_owned())
            }
            _ => Ok(()),
        }
    })
}

/// Runs one thread for each.
fn all<T: Send>(these: Vec<T>, run: impl Fn(T) -> Result<(), String> + Sync) -> Result<(), String> {
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> = these
            .into_iter()
            .map(|this| scope.spawn(move || run(this)))
            .collect();
        // All are waited for, whatever the first one says.
        let outcomes = threads
            .into_iter()
            .map(|thread| thread.join().expect("no panic"));
        outcomes.collect::<Vec<_>>().into_iter().collect()
    })
}

/// How a proxy must have ended.
fn check_end(world: &World, proxy: &Proxy, status: ExitStatus) -> Result<(), String> {
    if let Some(fate) = world.vm.fate() {
        return Err(fate.to_string());
    }
    if !status.success() {
        return Err(format!("{status}: {}", proxy.log_tail()));
    }
    let mut left = world.places.left_over();
    left.extend(world.places.dialled());
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("left over: {left:?}"))
    }
}

fn end_in_the_middle(world: &World, proxy: &mut Proxy) -> Result<(), String> {
    let transfers = Transfers::begin(world).map_err(|error| format!("before the end: {error}"))?;
    let gone = AtomicBool::new(false);
    let (finishing, endless) = (transfers.finishing, transfers.endless);
    let ended: Result<ExitStatus, String> = thread::scope(|scope| {
        let finishing = scope.spawn(|| finish(finishing));
        let endless = scope.spawn(|| break_off(endless, &gone));
        world.changes.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        proxy.signal(Signal::SIGTERM);
        // The guest dials on for half of the grace, and endless transfers keep the proxy alive for
        // the rest.
        wait_until(GRACE / 2, || world.vm.fate().is_some());
        *world.may_dial.write().unwrap() = false;
        let in_time = start.elapsed() < GRACE;
        let ended = proxy.wait(GRACE + LAST_LEAVE + SLACK);
        gone.store(true, Ordering::SeqCst);
        println!("soak: SIGTERM, ended after {:.1?}", start.elapsed());
        finishing.join().expect("no panic")?;
        endless.join().expect("no panic")?;
        if !in_time {
            return Err("this machine is too slow for the grace".to_owned());
        }
        Ok(ended?.0)
    });
    check_end(world, proxy, ended?)
}

/// A long grace, and a second signal that ends it.
fn end_by_two_signals(world: &World, proxy: &mut Proxy) {
    let transfers = Transfers::begin(world).unwrap();
    let gone = AtomicBool::new(false);
    let (finishing, endless) = (transfers.finishing, transfers.endless);
    thread::scope(|scope| {
        let endless = scope.spawn(|| break_off(endless, &gone));
        proxy.signal(Signal::SIGINT);
        // The first one cuts nobody off.
        finish(finishing).unwrap();
        assert!(proxy.exited().is_none(), "it ended in its grace");
        let start = Instant::now();
        proxy.signal(Signal::SIGINT);
        let ended = proxy.wait(LAST_LEAVE + SLACK);
        gone.store(true, Ordering::SeqCst);
        println!("soak: SIGINT twice, ended after {:.1?}", start.elapsed());
        endless.join().unwrap().unwrap();
        check_end(world, proxy, ended.unwrap().0).unwrap();
    });
}

fn report(world: &World) {
    for (kind, Tally { done, cut, .. }) in &*world.tallies.lock().unwrap() {
        println!(
            "{done:6} {kind}{}",
            if *cut > 0 {
                format!(", {cut} cut")
            } else {
                String::new()
            }
        );
    }
    let [late, all] = &world.late_refusals;
    println!(
        "{} of {} refusals behind a half-close looked like an EOF",
        late.load(Ordering::Relaxed),
        all.load(Ordering::Relaxed)
    );
}

/// What belonged to a VM that has gone is not held against the next one.
#[test]
fn a_new_vm_starts_afresh() {
    raise_descriptor_limit();
    let root = directory();
    let places = Places {
        root: root.path().to_owned(),
        vm: root.path().join("vm"),
        remotes: Vec::new(),
    };
    let mut vm = guest::builder(&places.vm).start().unwrap();
    let options = ["--vm-connections", "4", "--dial-timeout", "5"];
    let proxy = Proxy::start(&places, &HashMap::new(), &options, Output::Kept).unwrap();
    let mut old = Vec::new();
    for _ in 0..5 {
        // They read nothing, so that the proxy doesn't learn of the old VM's end.
        for _ in 0..4 {
            let mut conn = Conn::open(&Place::Unix(places.unix(CHARGEN))).unwrap();
            conn.read_exact(&mut [0]).unwrap();
            old.push(conn);
        }
        let taken = vm.wait_for(LONG, |counters| counters.live_slots == 4);
        assert!(taken, "{:?}", vm.counters());
        assert_alive(&vm);
        vm.stop();
        vm = guest::builder(&places.vm).start().unwrap();
        for number in 0..20 {
            let mut conn = Conn::open(&Place::Tcp(proxy.tcp[&ECHO])).unwrap();
            client::echo(&mut conn, b"anew", true)
                .unwrap_or_else(|error| panic!("{number}: {error}\n{}", proxy.log_tail()));
        }
        assert_free(&vm);
    }
}
