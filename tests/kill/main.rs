//! Whatever ends hvsock, the VM lives: the stand-in VM with all its frailties, whose guest dials
//! all the time, the real binary in front of it, a crowd that is mostly rude, and blows at any
//! moment.
//!
//! `HVSOCK_KILLS` is how many there are of each, as `KILL,TERM,TAKE-OVER,KEEPER`; `HVSOCK_SEED`
//! repeats their order. The long run: `scripts/kill-test`. With `HVSOCK_KILLS_STRICT` the VM
//! punishes more than hyperkit's device was seen to.
#![cfg(all(target_os = "linux", feature = "simulate"))]
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../soak/child.rs"]
#[allow(dead_code)]
mod child;
#[path = "../soak/client.rs"]
#[allow(dead_code)]
mod client;
#[path = "../common/command.rs"]
mod command;
#[path = "../common/mod.rs"]
mod common;
#[path = "../soak/crowd.rs"]
#[allow(dead_code)]
mod crowd;
#[path = "../soak/guest.rs"]
#[allow(dead_code)]
mod guest;
#[path = "../soak/host.rs"]
mod host;
mod hvsock;

use ::hvsock::simulate::{Counters, Dial, Fate, FateKind, Service, Vm};
use child::{Places, wait_until};
use crowd::{HOST_ECHO_TCP, HOST_ECHO_UNIX, HOST_REFUSED, World};
use guest::{LONG, STUBBORN};
use hvsock::{Begin, Hvsock, Keeping, kill_keeper};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::num::NonZeroU32;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

/// Threads of the crowd, of which each has one client after the other, and of guests that dial.
const CROWD: usize = 6;
const GUESTS: u64 = 2;

/// What the guest dials all the time, and how often a second.
const PACES: [(u32, u32); 3] = [
    (HOST_ECHO_TCP, 100),
    (HOST_ECHO_UNIX, 20),
    (HOST_REFUSED, 20),
];

/// How long each of those guests is idle between two dials. A connection is at the proxy's mercy
/// between its accept and the message to the keeper, some microseconds: of as many dials as can be,
/// one in twenty kills meets one in there.
const BETWEEN_DIALS: Duration = Duration::from_millis(20);

/// The crowd has its way for so long at least, and at most, before a blow.
const CALM: std::ops::Range<u64> = 50..400;

/// A proxy that was asked to end is asked again after so long.
const ASKED_AGAIN: Duration = Duration::from_millis(300);

/// `grace` and what comes after it, and what a loaded machine may add.
const END: Duration = Duration::from_secs(20);

/// How long the slots are looked at until the VM's fate is.
const GLANCE: Duration = Duration::from_millis(200);

/// How many of each there are by default: in the order of [`Blow::ALL`].
const FEW: [usize; 4] = [6, 4, 3, 3];

/// What befalls hvsock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Blow {
    Kill,
    Terminate,
    /// Another hvsock takes over, and no client may notice.
    TakeOver,
    /// Its keeper is killed, and no client may notice; every other time it is killed itself once it
    /// has another.
    KillKeeper,
}

impl Blow {
    const ALL: [Blow; 4] = [
        Blow::Kill,
        Blow::Terminate,
        Blow::TakeOver,
        Blow::KillKeeper,
    ];
}

/// All that there is of one run.
struct Scene<'a> {
    world: &'a World<'a>,
    keeping: Keeping,
    hvsock: Hvsock,
    rng: fastrand::Rng,
}

impl Scene<'_> {
    fn strike(&mut self, blow: Blow, number: usize) -> Result<(), String> {
        let calm = Duration::from_millis(self.rng.u64(CALM));
        wait_until(calm, || self.world.is_over());
        match blow {
            Blow::Kill | Blow::Terminate => self.replace(blow)?,
            Blow::TakeOver => self.take_over()?,
            Blow::KillKeeper => {
                let old = self.hvsock.keeper(self.world.places, None)?;
                kill_keeper(old)?;
                self.hvsock.keeper(self.world.places, Some(old))?;
                if number % 2 == 1 {
                    self.replace(Blow::Kill)?;
                }
            }
        }
        match self.world.vm.fate() {
            Some(fate) => Err(fate.to_string()),
            None if self.world.is_over() => Err("a client failed".to_owned()),
            None => Ok(()),
        }
    }

    /// Ends hvsock, and starts another, at once or when all slots are back. They must come back in
    /// any case.
    fn replace(&mut self, blow: Blow) -> Result<(), String> {
        let world = self.world;
        world.changes.fetch_add(1, Ordering::SeqCst);
        self.end(blow)?;
        if self.rng.bool() {
            self.wait_for_slots()?;
        }
        self.hvsock = self.start(Begin::Afresh)?;
        self.wait_for_slots()?;
        *world.may_dial.write().unwrap() = true;
        world.changes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn end(&mut self, blow: Blow) -> Result<(), String> {
        let proxy = &mut self.hvsock.proxy;
        if blow == Blow::Kill {
            proxy.signal(Signal::SIGKILL);
            return proxy.wait(END).map(drop);
        }
        proxy.signal(Signal::SIGTERM);
        if !wait_until(ASKED_AGAIN, || proxy.exited().is_some()) {
            proxy.signal(Signal::SIGTERM);
        }
        match proxy.wait(END)? {
            (status, _) if status.success() => Ok(()),
            (status, _) => Err(format!("{status}: {}", proxy.log_tail())),
        }
    }

    fn start(&self, begin: Begin) -> Result<Hvsock, String> {
        let tcp = &self.world.tcp;
        Hvsock::start(self.world.places, tcp, self.keeping, begin)
            .map_err(|error| format!("{begin:?}: {error}"))
    }

    fn take_over(&mut self) -> Result<(), String> {
        let next = self.start(Begin::TakeOver)?;
        let mut old = std::mem::replace(&mut self.hvsock, next);
        match old.proxy.wait(END)? {
            (status, _) if status.success() => Ok(()),
            (status, _) => Err(format!("the old one: {status}: {}", old.proxy.log_tail())),
        }
    }

    /// Nobody comes but those who dial at a pace: all slots must be free between two of them.
    fn wait_for_slots(&self) -> Result<(), String> {
        let vm = self.world.vm;
        *self.world.may_dial.write().unwrap() = false;
        // A VM that is dead has no more to count.
        let mut free = false;
        wait_until(LONG, || {
            free = vm.wait_for(GLANCE, |counters| counters.live_slots == 0);
            free || vm.fate().is_some()
        });
        match vm.fate() {
            Some(fate) => Err(fate.to_string()),
            None if free => Ok(()),
            None => Err(format!("slots stay taken: {:?}", vm.counters())),
        }
    }
}

fn start_vm(directory: &Path) -> Vm {
    let vm = guest::builder(directory)
        .strict(std::env::var_os("HVSOCK_KILLS_STRICT").is_some())
        .failed_dials(1)
        // One that heeds no EOF, and ends for all that: what sends for ever keeps its slot, whoever
        // reads it.
        .guest(STUBBORN, Service::Heedless(3_000_000));
    let dial = |vm: ::hvsock::simulate::Builder, (port, pace)| {
        let pace = NonZeroU32::new(pace).expect("not 0");
        vm.dial(port, Dial::Paced(pace))
    };
    PACES.into_iter().fold(vm, dial).start().unwrap()
}

/// Deals the blows under traffic; what the VM has counted, or what went wrong and what became of
/// the VM.
fn run(keeping: Keeping, blows: &[Blow], seed: u64) -> Result<Counters, (String, Option<Fate>)> {
    raise_descriptor_limit();
    let root = tempfile::Builder::new().prefix("hvk").tempdir_in("/tmp");
    let root = root.unwrap();
    let host = host::Host::start(root.path());
    let places = Places::new(root.path(), &host);
    let vm = start_vm(&places.vm);
    let hvsock = Hvsock::start(&places, &HashMap::new(), keeping, Begin::Afresh).unwrap();
    let mut world = World::new(&vm, &places, seed, usize::MAX, hvsock.tcp.clone());
    world.ends_silently = true;
    world.between_dials = BETWEEN_DIALS;
    let world = &world;
    let mut scene = Scene {
        world,
        keeping,
        hvsock,
        rng: fastrand::Rng::with_seed(seed),
    };
    thread::scope(|scope| {
        let crowd: Vec<_> = (0..CROWD)
            .map(|_| scope.spawn(|| world.clients()))
            .chain((0..GUESTS).map(|guest| scope.spawn(move || world.guests(guest))))
            .collect();
        let mut strike = || {
            for (number, blow) in blows.iter().enumerate() {
                scene
                    .strike(*blow, number)
                    .map_err(|error| format!("blow {number}, {blow:?}: {error}"))?;
            }
            Ok::<_, String>(())
        };
        if let Err(error) = strike() {
            world.fail(error);
        }
        world.over.store(true, Ordering::SeqCst);
        for thread in crowd {
            if thread.join().is_err() {
                world.fail("a thread panicked".into());
            }
        }
    });
    vm.stop_dialling();
    let mut failures = world.failures.lock().unwrap().clone();
    if failures.is_empty() && !vm.wait_for(LONG, |counters| counters.live_slots == 0) {
        failures.push(format!("slots stay taken: {:?}", vm.counters()));
    }
    let fate = vm.fate();
    let counters = vm.counters();
    if failures.is_empty() && fate.is_none() {
        assert_eq!(
            (counters.all_offences(), counters.guest_dials_failed),
            (0, 0)
        );
        assert!(counters.guest_echoes > 0, "{counters:?}");
        return Ok(counters);
    }
    let log = scene.hvsock.proxy.log_tail();
    Err((format!("{failures:#?}\n{log}"), fate))
}

fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(10_000), hard).unwrap();
}

/// How many there are of each.
fn numbers() -> [usize; 4] {
    let Ok(words) = std::env::var("HVSOCK_KILLS") else {
        return FEW;
    };
    let numbers: Result<Vec<usize>, _> = words.split(',').map(str::parse).collect();
    let numbers = numbers.ok().and_then(|numbers| numbers.try_into().ok());
    numbers.unwrap_or_else(|| panic!("HVSOCK_KILLS={words}"))
}

fn seed() -> u64 {
    match std::env::var("HVSOCK_SEED") {
        Ok(seed) => seed.parse().expect("HVSOCK_SEED is a number"),
        Err(_) => fastrand::u64(..),
    }
}

#[test]
fn whatever_ends_hvsock_the_vm_lives() {
    let (seed, numbers, start) = (seed(), numbers(), Instant::now());
    println!("kill: {numbers:?}, HVSOCK_SEED={seed}");
    let mut blows: Vec<Blow> = Blow::ALL
        .into_iter()
        .zip(numbers)
        .flat_map(|(blow, number)| std::iter::repeat_n(blow, number))
        .collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut blows);
    match run(Keeping::Keeper, &blows, seed) {
        Ok(counters) => {
            let [kills, terms, take_overs, keepers] = numbers;
            println!(
                "kill: {kills} SIGKILLs, {terms} SIGTERMs, {take_overs} take-overs and {keepers} keepers killed in {:.1?}, \
                 {} dials, {} guest dials, {} echoed: the VM lives",
                start.elapsed(),
                counters.dials,
                counters.guest_dials,
                counters.guest_echoes
            );
        }
        Err((failure, fate)) => panic!("{fate:?} {failure}"),
    }
}

/// So the other test can fail.
#[test]
fn without_a_keeper_it_does_not() {
    for blow in [Blow::Kill, Blow::Terminate] {
        match run(Keeping::NoKeeper, &[blow], seed()) {
            Ok(counters) => panic!("{blow:?} did no harm: {counters:?}"),
            Err((failure, None)) => panic!("{blow:?}: the VM lives: {failure}"),
            Err((_, Some(fate))) => {
                println!("kill: {blow:?} without a keeper: {fate}");
                assert!(matches!(fate.kind, FateKind::Died | FateKind::Hung));
            }
        }
    }
}
