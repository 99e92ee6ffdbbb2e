//! Random schedules: scripts, kernels, events and turns from a seed, and what must be true of each.
//!
//! `HVSOCK_SEED=n cargo test schedules` repeats one.

use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

use fastrand::Rng;

use super::bench::{Bench, Wires};
use super::kernel::{Ending, Habits, Script, Wire};
use crate::engine::relay::{CloseMode, FlowState, PairTurn, Readiness, Side};

const SEEDS: Range<u64> = 0..3000;

/// Steps after which a schedule that is not over goes round in circles.
const STEPS: usize = 200_000;

#[test]
fn orderly_pairs_over_kernel_edges() {
    each_seed(|seed| Schedule::<true>::new(seed, Manners::Orderly).run());
}

#[test]
fn orderly_pairs_over_emulated_edges() {
    each_seed(|seed| Schedule::<false>::new(seed, Manners::Orderly).run());
}

#[test]
fn rude_pairs_over_kernel_edges() {
    each_seed(|seed| Schedule::<true>::new(seed, Manners::Rude).run());
}

#[test]
fn rude_pairs_over_emulated_edges() {
    each_seed(|seed| Schedule::<false>::new(seed, Manners::Rude).run());
}

/// Runs `schedule` for every seed, or for the one that `HVSOCK_SEED` says, and names the one that
/// fails.
fn each_seed(schedule: impl Fn(u64)) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("to repeat: HVSOCK_SEED={}", self.0);
            }
        }
    }
    let seeds = match std::env::var("HVSOCK_SEED") {
        Ok(seed) => {
            let seed = seed.parse().unwrap();
            seed..seed + 1
        }
        Err(_) => SEEDS,
    };
    for seed in seeds {
        let _named = Named(seed);
        schedule(seed);
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manners {
    /// Both peers send all, half-close, and read to EOF.
    Orderly,
    /// They do what they like.
    Rude,
}

fn random_habits(rng: &mut Rng) -> Habits {
    Habits {
        receive_queue: rng.usize(1..=120),
        send_queue: rng.usize(1..=120),
        reset_purges: rng.bool(),
        write_takes_error: rng.bool(),
        terse: rng.bool(),
        nervous: rng.u8(..8) > 0,
        mark: (rng.u8(..4) == 0).then(|| rng.usize(1..=40)),
        urgent: rng.u8(..4) == 0,
        drains: rng.bool(),
        splices: rng.bool(),
        hides_resets: rng.u8(..4) == 0,
    }
}

fn random_script(rng: &mut Rng, manners: Manners) -> Script {
    let amount = |rng: &mut Rng| match rng.u8(..4) {
        0 => 0,
        1 => rng.u64(..20),
        _ => rng.u64(..500),
    };
    let mut script = Script {
        sends: amount(rng),
        ending: Ending::HalfClose,
        waits: rng.u8(..4) == 0,
        piece: rng.usize(1..=80),
        turns_deaf: None,
        stalls: None,
        vanishes: None,
    };
    if manners == Manners::Rude {
        let rarely = |rng: &mut Rng| (rng.u8(..8) == 0).then(|| amount(rng));
        script.turns_deaf = rarely(rng);
        script.stalls = rarely(rng);
        script.vanishes = rarely(rng);
        script.ending = match rng.u8(..10) {
            0 | 1 => Ending::Reset,
            2 | 3 => Ending::Close,
            4 => Ending::Never,
            _ => Ending::HalfClose,
        };
    }
    script
}

struct Schedule<const KERNEL_EDGES: bool> {
    rng: Rng,
    bench: Bench<KERNEL_EDGES>,
    scripts: [Script; 2],
    manners: Manners,
    unread: Option<u64>,
    /// The step from which the client's half-close is held back no more.
    hold: Option<usize>,
}

impl<const KERNEL_EDGES: bool> Schedule<KERNEL_EDGES> {
    fn new(seed: u64, manners: Manners) -> Schedule<KERNEL_EDGES> {
        let mut rng = Rng::with_seed(seed);
        let habits = [random_habits(&mut rng), random_habits(&mut rng)];
        let mut scripts = [
            random_script(&mut rng, manners),
            random_script(&mut rng, manners),
        ];
        // Who both wait for each other's EOF wait for ever.
        scripts[Side::Client].waits &= !scripts[Side::Server].waits;
        let (buffer, budget) = (rng.usize(1..=64), rng.usize(1..=300));
        let each = scripts.clone().map(Some);
        let mut bench = Bench::new(habits, each, buffer, budget, &mut rng);
        let hold = (rng.u8(..3) == 0).then(|| rng.usize(..400));
        if hold.is_some() {
            bench.pair.withhold_half_close(Side::Client);
        }
        // A orderly server that answers nothing and doesn't wait for the request would be taken for
        // a refusal.
        let unread = (manners == Manners::Rude && rng.u8(..3) == 0).then(|| rng.u64(..200));
        if let Some(unread) = unread {
            bench.pair.expect_refusal_by_eof(unread);
        }
        Schedule {
            rng,
            bench,
            scripts,
            manners,
            unread,
            hold,
        }
    }

    fn run(mut self) {
        let done = self.relay();
        if self.manners == Manners::Orderly {
            assert!(done);
            assert_eq!(self.bench.close_modes(), [CloseMode::Close; 2]);
        }
        for side in Side::BOTH {
            self.check_direction(side);
            self.check_close_mode(side);
        }
        let answered = self.is_whole(Side::Server) && self.is_healthy(Side::Client);
        let Schedule {
            bench,
            manners,
            mut rng,
            ..
        } = self;
        let wires = bench.wires.clone();
        let mut go_on = |wires: &Wires| {
            wires[Side::Client].borrow_mut().tick();
            wires[Side::Server].borrow_mut().tick();
            wires.iter().any(|wire| wire.borrow().is_busy()) || rng.u8(..8) > 0
        };
        let ended = bench.leave(&mut go_on);
        while wires.iter().any(|wire| wire.borrow().is_busy()) {
            go_on(&wires);
        }
        for side in Side::BOTH {
            let (source, sink) = (wires[side.other()].borrow(), wires[side].borrow());
            // A server that refused is closed: whoever said no hears no more, and no lie.
            let refused = ended.refused && side == Side::Server;
            if sink.saw_eof && !refused {
                assert!(source.fin, "{side:?} read an EOF that was never sent");
                assert_eq!(sink.heard, source.sent);
            }
            let stays = !sink.gone && !sink.deaf;
            if manners == Manners::Orderly || (side == Side::Client && answered && stays) {
                assert!(sink.saw_eof, "{side:?} never read EOF");
            }
            if side == Side::Server && ended.refused {
                assert!(
                    !wires[Side::Client].borrow().saw_eof,
                    "a refusal is no answer"
                );
            }
        }
    }

    /// Lets everything happen in a random order until the pair is done, or nothing happens any
    /// more.
    fn relay(&mut self) -> bool {
        for step in 0..STEPS {
            match self.rng.u8(..8) {
                0 | 1 => self.bench.client().tick(),
                2 | 3 => self.bench.server().tick(),
                4 => _ = self.bench.poll(Side::Client),
                5 => _ = self.bench.poll(Side::Server),
                6 if self.rng.u8(..16) == 0 => self.latch_at_random(),
                _ if self.bench.ready => self.turn(step),
                _ => {}
            }
            if self.bench.last == PairTurn::Done {
                return true;
            }
            if self.is_idle() {
                if self.bench.pair.is_withholding_half_close(Side::Client) {
                    self.release();
                    continue;
                }
                self.check_stuck();
                return false;
            }
        }
        panic!("no end after {STEPS} steps");
    }

    /// A poller may say more than is so.
    fn latch_at_random(&mut self) {
        let event = Readiness {
            readable: self.rng.bool(),
            writable: self.rng.bool(),
            failed: false,
            hidden: self.rng.bool(),
            urgent: self.rng.bool(),
        };
        let side = Side::BOTH[self.rng.usize(..2)];
        self.bench.latch(side, event);
    }

    fn is_idle(&mut self) -> bool {
        let busy = |wire: &Rc<RefCell<Wire>>| wire.borrow().is_busy();
        !self.bench.wires.iter().any(busy)
            && !self.bench.ready
            && !self.bench.poll(Side::Client)
            && !self.bench.poll(Side::Server)
    }

    /// A turn as the proxy gives it, with the refusal and the half-close that it holds back.
    fn turn(&mut self, step: usize) {
        self.bare_turn();
        if self.bench.pair.is_withholding_half_close(Side::Client) {
            let heard = self.bench.pair.ends[Side::Server].received() > 0;
            if heard || self.hold.is_some_and(|until| step >= until) {
                self.release();
                self.bare_turn();
            }
        }
    }

    fn release(&mut self) {
        self.hold = None;
        self.bench.pair.release_half_close(Side::Client);
        self.bench.ready = true;
    }

    fn bare_turn(&mut self) {
        let bench = &mut self.bench;
        let open = bench.pair.flows[Side::Server].state == FlowState::Open;
        let request = bench.pair.delivered(Side::Client);
        let asked = bench.server().half_closes > 0;
        let ended = bench.server().read_ended;
        bench.turn();
        for side in Side::BOTH {
            assert_eq!(bench.pair.ends[side].received(), bench.wire(side).read);
            assert_eq!(bench.pair.delivered(side), bench.wire(side.other()).written);
        }
        if !ended && bench.server().read_ended {
            let silent = open && bench.server().read == 0 && !asked;
            let refused = silent && self.unread.is_some_and(|unread| request <= unread);
            assert_eq!(bench.pair.was_refused(), refused);
        }
        if self.hold.is_some() && bench.pair.flows[Side::Server].state == FlowState::Open {
            assert_eq!(
                bench.server().half_closes,
                0,
                "the half-close was held back"
            );
        }
        // Waiting means that nothing can be done without an event.
        if bench.last == PairTurn::Wait && !self.is_one_dead() {
            let calls = |bench: &Bench<_>| bench.client().calls + bench.server().calls;
            let before = calls(&self.bench);
            self.bench.turn();
            assert_eq!(calls(&self.bench), before, "waited with work to do");
        }
    }

    fn is_one_dead(&self) -> bool {
        self.bench.pair.ends.iter().any(|end| end.is_dead())
    }

    /// Nothing happens any more, and the pair isn't done: so a peer has said no end, or reads no
    /// more.
    fn check_stuck(&self) {
        let stays = |side: Side| {
            let script = &self.scripts[side];
            script.ending == Ending::Never || script.stalls.is_some()
        };
        assert!(stays(Side::Client) || stays(Side::Server), "it hangs");
        let gone = self.bench.pair.ends.iter().any(|end| end.is_gone());
        assert_eq!(self.bench.pair.is_ending(), gone);
    }

    /// Takes all that is sent, as far as the relay can know.
    fn is_healthy(&self, side: Side) -> bool {
        let wire = self.bench.wire(side);
        !wire.gone
            && !wire.deaf
            && wire.write_error.is_none()
            && self.scripts[side].stalls.is_none()
    }

    /// Has sent all, and its EOF.
    fn is_whole(&self, side: Side) -> bool {
        let wire = self.bench.wire(side);
        wire.fin && !wire.gone && !(side == Side::Server && self.bench.pair.was_refused())
    }

    /// What `side` sent went to a sink that took it, with the end that it had.
    fn check_direction(&self, side: Side) {
        let (source, sink) = (self.bench.wire(side), self.bench.wire(side.other()));
        let refused = self.bench.pair.was_refused();
        if self.is_whole(side) && self.is_healthy(side.other()) && !refused {
            assert_eq!(sink.written, source.sent, "whole");
            assert_eq!(sink.half_closes, 1);
        }
        if source.read_error.is_some() && self.is_healthy(side.other()) && !refused {
            assert_eq!(
                sink.written, source.read,
                "all that was read of a source that broke"
            );
        }
        if sink.half_closes > 0 {
            assert!(source.fin, "EOF from {side:?}, which never sent it");
            assert_eq!(sink.written, source.sent);
        }
    }

    fn check_close_mode(&self, side: Side) {
        let pair = &self.bench.pair;
        let (end, wire, source) = (
            &pair.ends[side],
            self.bench.wire(side),
            self.bench.wire(side.other()),
        );
        let expected = match wire.half_closes > 0 {
            // It has all, and has said all or is gone.
            true if wire.read_ended => CloseMode::Close,
            true if side == Side::Client => CloseMode::Linger,
            _ if end.is_dead() => CloseMode::Close,
            _ => CloseMode::Reset,
        };
        assert_eq!(pair.close_mode(side), expected);
        if pair.was_refused() || source.read_error.is_some() {
            assert!(side == Side::Server || wire.half_closes == 0);
        }
    }
}
