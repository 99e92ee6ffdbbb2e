//! What it costs to carry: calls, buffers and pipes.

use std::cell::Cell;
use std::sync::Arc;

use super::bench::Bench;
use super::kernel::{FakePipe, Habits, PIPE};
use crate::engine::relay::carrier::Pool;
use crate::engine::relay::{Carrier, PairTurn, Side};
use crate::stream::socket::Pipe;

type Kernel = Bench<true>;

fn tcp() -> Habits {
    Habits {
        drains: true,
        splices: true,
        ..Habits::default()
    }
}

fn pair(habits: Habits) -> Kernel {
    let mut pair = Kernel::with([habits.clone(), habits]);
    // What registering says.
    pair.settle();
    pair.server().calls = 0;
    pair.client().calls = 0;
    pair
}

fn calls(pair: &Kernel) -> [u64; 2] {
    Side::BOTH.map(|side| pair.wire(side).calls)
}

#[test]
fn a_message_takes_one_read_and_one_write() {
    let mut pair = pair(tcp());
    pair.client().say(10);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(calls(&pair), [1, 1]);
    assert_eq!(pair.wire(Side::Server).written, 10);
}

#[test]
fn where_a_short_read_proves_nothing_there_is_one_more() {
    let mut pair = pair(Habits::default());
    pair.client().say(10);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(calls(&pair), [2, 1]);
}

#[test]
fn an_end_that_came_with_the_data_is_looked_for() {
    let mut pair = pair(tcp());
    pair.client().say(10);
    pair.client().fin();
    pair.settle();
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
}

#[test]
fn what_stands_behind_urgent_data_is_looked_for() {
    let mut pair = pair(tcp());
    pair.client().habits.mark = Some(3);
    pair.client().say(10);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(pair.wire(Side::Server).written, 10);
}

#[test]
fn a_flow_with_urgent_data_goes_through_memory() {
    let mut pair = pair(tcp());
    pair.client().say(32 + PIPE);
    pair.settle();
    pair.client().habits.mark = Some(3);
    pair.client().say(PIPE);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(pair.wire(Side::Server).written, 32 + 2 * PIPE as u64);
}

/// A splice that began before the event came says the same at urgent data as at an end.
#[test]
fn an_end_of_a_splice_is_believed_only_when_a_read_says_so() {
    let mut pair = pair(tcp());
    pair.client().say(32 + PIPE);
    pair.settle();
    pair.client().say(PIPE);
    assert!(pair.poll(Side::Client));
    pair.client().habits.mark = Some(PIPE);
    pair.client().say(PIPE);
    pair.turn();
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert_eq!(pair.wire(Side::Server).written, 32 + 3 * PIPE as u64);
    assert_eq!(pair.wire(Side::Server).half_closes, 0);
    pair.client().fin();
    pair.settle();
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
}

#[test]
fn what_comes_before_the_end_goes_on_through_a_pipe() {
    let mut pair = pair(tcp());
    pair.client().say(32 + PIPE);
    pair.settle();
    let before = calls(&pair)[Side::Client];
    pair.client().say(2 * PIPE);
    pair.client().fin();
    pair.settle();
    assert_eq!(
        calls(&pair)[Side::Client] - before,
        4,
        "two splices, one that finds the end, and a read that says so, too"
    );
    assert_eq!(pair.wire(Side::Server).written, 32 + 3 * PIPE as u64);
    assert_eq!(pair.wire(Side::Server).half_closes, 1);
}

#[test]
fn much_goes_through_a_pipe_and_little_through_memory() {
    let mut pair = pair(tcp());
    // A full buffer (of 16 bytes) comes first.
    pair.client().say(16 + PIPE);
    pair.settle();
    assert_eq!(
        calls(&pair),
        [3, 2],
        "a read, a splice, one that finds nothing"
    );
    // As much as an eighth of a buffer goes on to go through it; less, and the next goes through
    // memory, until one was at least half a buffer.
    let sizes = [(2, 2), (1, 2), (7, 1), (8, 1), (8, 2)];
    for (size, reads) in sizes {
        let before = calls(&pair)[Side::Client];
        pair.client().say(size);
        pair.settle();
        assert_eq!(calls(&pair)[Side::Client] - before, reads, "{size} bytes");
    }
    let sum: usize = sizes.iter().map(|(size, _)| size).sum();
    assert_eq!(pair.wire(Side::Server).written, (16 + PIPE + sum) as u64);
}

#[test]
fn what_is_in_a_pipe_waits_there_and_a_pipe_with_bytes_is_not_used_again() {
    let narrow = Habits {
        send_queue: 40,
        ..tcp()
    };
    let mut pair = Kernel::with([tcp(), narrow]);
    pair.client().say(16 + PIPE);
    assert_eq!(pair.settle(), PairTurn::Wait);
    assert!(matches!(
        pair.pair.flows[Side::Client].carrier,
        Carrier::Pipe { len: 24, .. }
    ));
    // The server takes no more: what it holds goes nowhere.
    pair.server().turn_deaf();
    pair.settle();
    assert!(pair.pair.flows[Side::Client].carrier.is_empty());
    // (The accounting of each turn says that its place was given back.)
    pair.server().say(2 * (32 + PIPE));
    pair.settle();
    assert_eq!(pair.wire(Side::Client).written, 2 * (32 + PIPE as u64));
}

#[test]
fn no_pipe_is_borrowed_where_one_side_has_none() {
    let mut pair = Kernel::with([tcp(), Habits::default()]);
    pair.client().say(200);
    pair.settle();
    assert_eq!(pair.wire(Side::Server).written, 200);
    assert_eq!(pair.pool.made_pipes(), 0);
}

#[test]
fn pipes_that_nobody_needs_are_closed() {
    let mut pair = pair(tcp());
    let carry = |pair: &mut Kernel| {
        pair.client().say(32 + PIPE);
        pair.settle();
    };
    carry(&mut pair);
    assert_eq!(pair.pool.made_pipes(), 1);
    pair.pool.trim();
    carry(&mut pair);
    pair.pool.trim();
    assert!(pair.pool.wants_trim(), "it was needed");
    pair.pool.trim();
    assert!(!pair.pool.wants_trim());
    // (The accounting of each turn says that others can be made.)
    carry(&mut pair);
    assert_eq!(pair.wire(Side::Server).written, 3 * (32 + PIPE as u64));
}

#[test]
fn buffers_are_kept_as_long_as_they_are_needed_and_a_few_for_ever() {
    let mut pool: Pool<FakePipe> = Pool::new(1, 2, 0, Arc::default());
    let burst = |pool: &mut Pool<FakePipe>, count| {
        let lent: Vec<_> = (0..count).map(|_| pool.take_buffer()).collect();
        lent.into_iter().for_each(|buffer| pool.give_buffer(buffer));
    };
    burst(&mut pool, 9);
    pool.trim();
    burst(&mut pool, 5);
    assert_eq!(pool.free_buffers(), 9);
    pool.trim();
    assert_eq!(pool.free_buffers(), 5);
    assert!(pool.wants_trim());
    pool.trim();
    assert_eq!(pool.free_buffers(), 2);
    assert!(!pool.wants_trim());
}

#[test]
fn pipes_that_the_system_would_not_give_are_asked_for_again() {
    thread_local! {
        static TO_BE_HAD: Cell<bool> = const { Cell::new(false) };
    }
    #[derive(Debug)]
    struct Rare;
    impl Pipe for Rare {
        fn new() -> Option<Rare> {
            TO_BE_HAD.get().then_some(Rare)
        }
    }
    let mut pool: Pool<Rare> = Pool::new(1, 0, 2, Arc::default());
    assert!(pool.take_pipe().is_none());
    TO_BE_HAD.set(true);
    assert!(pool.take_pipe().is_none(), "not again and again");
    assert!(pool.wants_trim());
    pool.trim();
    assert!(pool.take_pipe().is_some() && pool.take_pipe().is_some());
    assert!(pool.take_pipe().is_none());
    assert!(!pool.wants_trim());
}
