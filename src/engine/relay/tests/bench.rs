//! A pair on two fake sockets, and the part that the proxy plays around it.

use std::cell::{Ref, RefCell, RefMut};
use std::rc::Rc;
use std::sync::Arc;

use fastrand::Rng;

use super::kernel::{FakePipe, FakeSocket, Habits, PIPE, Script, Wire};
use crate::engine::relay::{
    Carried, Carrier, CloseMode, End, FlowState, Pair, PairTurn, Pool, Readiness, Side,
};

/// Calls of a turn that only discards: see `End::discard`.
const DISCARDS: u64 = 4;

/// The two buffers that a pair may borrow, one for each direction; and the pipes.
const BUFFERS: usize = 2;
const PIPES: usize = 2;

pub(super) type Wires = [Rc<RefCell<Wire>>; 2];

pub(super) struct Bench<const KERNEL_EDGES: bool> {
    pub(super) pair: Pair<FakeSocket<KERNEL_EDGES>>,
    pub(super) pool: Pool<FakePipe>,
    pub(super) carried: Arc<Carried>,
    pub(super) buffer: usize,
    pub(super) budget: usize,
    pub(super) wires: Wires,
    /// An event has come, or the last turn asked for another.
    pub(super) ready: bool,
    pub(super) last: PairTurn,
}

/// What became of a pair.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) close_modes: [CloseMode; 2],
    pub(super) refused: bool,
}

impl<const KERNEL_EDGES: bool> Bench<KERNEL_EDGES> {
    /// A calm pair with buffers of 16 bytes and much budget, moved by hand.
    pub(super) fn calm() -> Bench<KERNEL_EDGES> {
        Self::with([Habits::default(), Habits::default()])
    }

    pub(super) fn with(habits: [Habits; 2]) -> Bench<KERNEL_EDGES> {
        Self::new(habits, [None, None], 16, 1 << 20, &mut Rng::with_seed(0))
    }

    pub(super) fn new(
        habits: [Habits; 2],
        scripts: [Option<Script>; 2],
        buffer: usize,
        budget: usize,
        rng: &mut Rng,
    ) -> Bench<KERNEL_EDGES> {
        let [client_habits, server_habits] = habits;
        let [client_script, server_script] = scripts;
        let mut wire = |side, habits, script| {
            Rc::new(RefCell::new(Wire::new(side, habits, script, rng.fork())))
        };
        let wires = [
            wire(Side::Client, client_habits, client_script),
            wire(Side::Server, server_habits, server_script),
        ];
        let end = |side: Side| End::new(FakeSocket(Rc::clone(&wires[side])));
        let carried = Arc::<Carried>::default();
        let mut pool = Pool::new(buffer, usize::MAX, PIPES, Arc::clone(&carried));
        for _ in 0..BUFFERS {
            pool.give_buffer(vec![0; buffer].into_boxed_slice());
        }
        Bench {
            pair: Pair::new(end(Side::Client), end(Side::Server)),
            pool,
            carried,
            buffer,
            budget,
            wires,
            ready: true,
            last: PairTurn::Wait,
        }
    }

    pub(super) fn client(&self) -> RefMut<'_, Wire> {
        self.wires[Side::Client].borrow_mut()
    }

    pub(super) fn server(&self) -> RefMut<'_, Wire> {
        self.wires[Side::Server].borrow_mut()
    }

    pub(super) fn wire(&self, side: Side) -> Ref<'_, Wire> {
        self.wires[side].borrow()
    }

    /// Latches the event that is due for `side`.
    pub(super) fn poll(&mut self, side: Side) -> bool {
        let event = self.wires[side].borrow_mut().poll(KERNEL_EDGES);
        if let Some(event) = event {
            self.latch(side, event);
        }
        event.is_some()
    }

    pub(super) fn latch(&mut self, side: Side, event: Readiness) {
        self.pair.ends[side].latch(event);
        self.ready = true;
    }

    /// One turn, and what is true of every turn: bounded work, no buffer that carries nothing.
    pub(super) fn turn(&mut self) -> PairTurn {
        let read_before = [self.client().read, self.server().read];
        let turn = self.pair.turn(&mut self.pool, self.budget);
        for (side, before) in Side::BOTH.into_iter().zip(read_before) {
            let read = self.wire(side).read - before;
            let mut bound = self.budget + self.buffer.max(PIPE) - 1;
            if self.pair.flows[side].state == FlowState::Broken {
                bound += DISCARDS as usize * self.buffer;
            }
            assert!(
                read <= bound as u64,
                "{read} bytes read of {side:?} in a turn"
            );
        }
        self.assert_no_idle_buffer();
        let open = self
            .pair
            .flows
            .iter()
            .any(|flow| flow.state == FlowState::Open);
        assert_eq!(turn == PairTurn::Done, !open);
        self.ready = turn == PairTurn::Again;
        self.last = turn;
        turn
    }

    /// Every buffer and pipe is home that carries nothing, and no direction has borrowed a second
    /// one.
    fn assert_no_idle_buffer(&self) {
        let carriers = self.pair.flows.iter().map(|flow| &flow.carrier);
        let (mut buffers, mut pipes) = (0, 0);
        for carrier in carriers {
            match carrier {
                Carrier::Empty => continue,
                Carrier::Memory { .. } => buffers += 1,
                Carrier::Pipe { pipe, .. } => {
                    assert_eq!(pipe.len(), carrier.bytes_left());
                    pipes += 1;
                }
            }
            assert!(carrier.bytes_left() > 0, "it carries nothing");
        }
        assert_eq!(self.pool.free_buffers() + buffers, BUFFERS);
        assert_eq!(self.pool.resting_pipes() + pipes, PIPES);
    }

    /// Takes events and turns until nothing is left to do, and says how it ended.
    pub(super) fn settle(&mut self) -> PairTurn {
        for _ in 0..10_000 {
            let events = [self.poll(Side::Client), self.poll(Side::Server)];
            if self.last == PairTurn::Done || (events == [false; 2] && !self.ready) {
                return self.last;
            }
            self.turn();
        }
        panic!("the relay never comes to rest");
    }

    /// What is carried of what `side` sent.
    pub(super) fn carried(&self, side: Side) -> u64 {
        self.pair.flows[side].carrier.bytes_left() as u64
    }

    pub(super) fn close_modes(&self) -> [CloseMode; 2] {
        [
            self.pair.close_mode(Side::Client),
            self.pair.close_mode(Side::Server),
        ]
    }

    /// Takes the pair apart as the proxy does. A client that is owed a linger is read from until it
    /// ends, as long as `go_on` says so after each of its turns.
    pub(super) fn leave(self, mut go_on: impl FnMut(&Wires) -> bool) -> Ended {
        let Bench {
            pair,
            mut pool,
            wires,
            ..
        } = self;
        let ended = Ended {
            close_modes: [pair.close_mode(Side::Client), pair.close_mode(Side::Server)],
            refused: pair.was_refused(),
        };
        let ends = pair.into_ends(&mut pool);
        assert_eq!(pool.free_buffers(), BUFFERS);
        let mut lingering = None;
        for (side, end) in Side::BOTH.into_iter().zip(ends) {
            let mut wire = wires[side].borrow_mut();
            match ended.close_modes[side] {
                CloseMode::Close => wire.close_here(),
                CloseMode::Reset => wire.reset_here(),
                CloseMode::Linger => lingering = Some((side, end)),
            }
        }
        let Some((side, mut end)) = lingering else {
            return ended;
        };
        end.shutdown_write();
        loop {
            let event = wires[side].borrow_mut().poll(KERNEL_EDGES);
            end.latch(event.unwrap_or_default());
            let again = end.discard(&mut pool);
            assert_eq!(pool.free_buffers(), BUFFERS);
            if end.input_ended() || !(go_on(&wires) || again) {
                break;
            }
        }
        wires[side].borrow_mut().close_here();
        ended
    }
}
