#![allow(clippy::unwrap_used)]

use std::time::{Duration, Instant};

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Modifier;

use super::draw::{draw, sparkline};
use super::keys::{KeyAction, handle_key};
use super::model::{Model, Sample, Sort, short_name};
use crate::app::control::{ConnectionInfo, ForwardInfo, ProcessInfo, Status, VmInfo};
use crate::proxy::{ConnectionState, Counters, Rule, VmStatus};

fn forward(id: u64, sent: u64, received: u64) -> ForwardInfo {
    let listen = format!("tcp://127.0.0.1:80{id}");
    let connect = "hyperkit://:80/var/vm";
    ForwardInfo {
        id: Some(id),
        name: Some(format!("web{id}")),
        listen: listen.clone(),
        connect: connect.to_owned(),
        state: "listening".to_owned(),
        why: None,
        since: None,
        note: None,
        vm: Some(VmInfo {
            directory: "/var/vm".to_owned(),
            status: VmStatus {
                connections: 450,
                limit: Some(900),
                lost: 0,
                guests: 0,
                guest_limit: Some(800),
                turned_away: 0,
                predecessor: 0,
                probes: 0,
                reserved: 0,
                unanswered: 3,
                last_heard: None,
                silent_since: None,
                paused: false,
                up: Some(true),
                gone_since: None,
                restarts: 0,
            },
        }),
        last_error: None,
        counters: Counters {
            live: id,
            sent,
            received,
            ..Counters::default()
        },
        rule: (&Rule::new(listen.parse().unwrap(), connect.parse().unwrap())).into(),
    }
}

fn connection(id: u64, forward: u64, sent: u64) -> ConnectionInfo {
    ConnectionInfo {
        id,
        forward,
        peer: Some(format!("tcp://127.0.0.1:5000{id}")),
        process: None,
        state: ConnectionState::Open,
        waiting: None,
        // The first is idle for 0 s, the second for 5 s, and so on.
        idle_seconds: 5.0 * id as f64 - 5.0,
        sent,
        received: 0,
        age_seconds: 61.0,
    }
}

fn sample(at: Instant, forwards: Vec<ForwardInfo>, connections: Vec<ConnectionInfo>) -> Sample {
    Sample {
        status: Status {
            file: None,
            keeper: None,
            version: "1.2.3".to_owned(),
            pid: 7,
            uptime_seconds: 60.0,
            stopping: false,
            live: 9,
            predecessor: None,
            successor: None,
            log_dropped: 0,
            carried: Default::default(),
            forwards,
            unserved: Vec::new(),
        },
        connections,
        at,
    }
}

/// A model with two samples, 2 s apart: web1 sends 2 KiB a second, web2 receives 5 KiB, and the
/// second of three connections is the busiest.
fn model() -> Model {
    let start = Instant::now();
    let mut model = Model::default();
    let first = vec![forward(1, 1000, 0), forward(2, 0, 77)];
    let connections = vec![connection(1, 1, 10), connection(2, 1, 0)];
    model.take_sample(sample(start, first, connections));
    let next = vec![forward(1, 1000 + 4096, 0), forward(2, 0, 77 + 10_240)];
    let connections = vec![
        connection(1, 1, 10),
        connection(2, 1, 4096),
        connection(3, 9, 2048),
    ];
    model.take_sample(sample(start + Duration::from_secs(2), next, connections));
    model
}

fn screen(model: &Model, width: u16, height: u16) -> String {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    let buffer = terminal.backend().buffer();
    let row = |y| (0..width).map(move |x| buffer[(x, y)].symbol());
    let rows = (0..height).map(|y| row(y).collect::<String>());
    rows.map(|row| row.trim_end().to_owned() + "\n").collect()
}

/// The line of the chosen connection, if any.
fn chosen_line(model: &Model, width: u16, height: u16) -> Option<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, model)).unwrap();
    let buffer = terminal.backend().buffer();
    let is_chosen = |y: &u16| buffer[(0, *y)].modifier.contains(Modifier::REVERSED);
    let y = (0..height).find(is_chosen)?;
    Some((0..width).map(|x| buffer[(x, y)].symbol()).collect())
}

/// Presses keys one after the other. Returns the action of the last.
fn keys(model: &mut Model, codes: &[KeyCode]) -> KeyAction {
    let mut wish = KeyAction::GoOn;
    for code in codes {
        wish = handle_key(model, KeyEvent::new(*code, KeyModifiers::NONE));
    }
    wish
}

/// Presses the keys of a text.
fn write(model: &mut Model, text: &str) -> KeyAction {
    let codes: Vec<KeyCode> = text.chars().map(KeyCode::Char).collect();
    keys(model, &codes)
}

/// The line that contains `part`.
fn line<'a>(screen: &'a str, part: &str) -> &'a str {
    let found = screen.lines().find(|line| line.contains(part));
    found.unwrap_or_else(|| panic!("no {part:?} in\n{screen}"))
}

#[test]
fn rates_are_of_what_has_moved_in_between() {
    let model = model();
    let rates = model.lanes();
    let rates = rates.iter().map(|it| (it.rate().sent, it.rate().received));
    assert_eq!(rates.collect::<Vec<_>>(), [(2048, 0), (0, 5120)]);
    let busiest = model.shown().into_iter();
    let busiest = busiest.map(|it| (it.connection.id, it.rate.sent, it.forward.as_str()));
    assert_eq!(
        busiest.collect::<Vec<_>>(),
        [(2, 2048, "web1"), (3, 1024, "(removed)"), (1, 0, "web1")]
    );
}

#[test]
fn a_proxy_that_was_started_anew_has_no_rates_of_the_old_one() {
    let mut model = model();
    let mut again = sample(Instant::now(), vec![forward(1, 9_999_999, 0)], Vec::new());
    again.status.pid = 8;
    model.take_sample(again);
    assert_eq!(model.lanes()[0].rates.len(), 1);
    assert_eq!(model.lanes()[0].rate().sent, 0);
}

#[test]
fn a_wide_terminal_shows_all_of_it() {
    let screen = screen(&model(), 160, 30);
    assert!(line(&screen, "up ").contains("9 connections"), "{screen}");
    let words = "450 of 900 slots; up, not heard from yet, last 3 dials silent so far";
    assert!(line(&screen, "VM vm").contains(words));
    let web = line(&screen, "tcp://127.0.0.1:801");
    for part in [
        "web1",
        "hyperkit://:80/var/vm",
        "listening",
        "2.00 KiB/s",
        "█",
    ] {
        assert!(web.contains(part), "{part}: {screen}");
    }
    let busiest = line(&screen, "127.0.0.1:50002");
    for part in ["web1", "open", "5 s", "2.00 KiB/s", "4.00 KiB", "1 min"] {
        assert!(busiest.contains(part), "{part}: {screen}");
    }
    let place = |part: &str| screen.find(part).unwrap();
    assert!(place(":50002") < place(":50003") && place(":50003") < place(":50001"));
}

#[test]
fn a_small_terminal_shows_what_matters_most_and_none_is_too_small() {
    let model = model();
    let small = screen(&model, 60, 15);
    let web = line(&small, "web2");
    for part in ["listening", "5.00 KiB/s"] {
        assert!(web.contains(part), "{part}: {small}");
    }
    // The name of the forward is the last to be left out.
    for width in [58, 50, 44] {
        line(&screen(&model, width, 15), "web2");
    }
    line(&small, "450 of 900 slots");
    line(&small, "50002");
    for (width, height) in [(1, 1), (10, 2), (20, 5), (60, 3), (300, 100)] {
        screen(&model, width, height);
        screen(&Model::default(), width, height);
    }
}

#[test]
fn a_missing_answer_is_shown_and_what_was_known_stays() {
    let mut model = model();
    model.note_no_answer("connection refused".to_owned());
    let lost = screen(&model, 80, 20);
    line(&lost, "no answer any more: connection refused");
    line(&lost, "web1");
    model.take_sample(sample(Instant::now(), vec![forward(1, 0, 0)], Vec::new()));
    assert!(!screen(&model, 80, 20).contains("no answer"));
}

#[test]
fn forwards_are_sorted_and_scrolled() {
    let mut model = model();
    let first = |model: &Model| model.lanes()[0].forward.id.unwrap();
    assert_eq!((model.sort, first(&model)), (Sort::Given, 1));
    keys(&mut model, &[KeyCode::Tab, KeyCode::Char('s')]);
    assert_eq!((model.sort, first(&model)), (Sort::Rate, 2));
    keys(&mut model, &[KeyCode::PageDown]);
    assert_eq!((model.lanes().len(), first(&model)), (1, 1));
    assert!(screen(&model, 80, 20).contains("+1↑"));
    assert!(screen(&model, 80, 20).contains("by rate"));
    keys(&mut model, &[KeyCode::PageUp, KeyCode::Char('s')]);
    assert_eq!((model.sort, first(&model)), (Sort::Live, 2));
}

#[test]
fn a_forward_without_a_name_is_called_by_where_it_listens() {
    let of = |listen: &str| {
        let mut forward = forward(1, 0, 0);
        forward.name = None;
        forward.listen = listen.to_owned();
        short_name(&forward)
    };
    assert_eq!(of("tcp://127.0.0.1:8080"), "127.0.0.1:8080");
    assert_eq!(of("unix:///run/user/1000/docker.sock"), "…000/docker.sock");
    assert_eq!(of("unix:./é.sock"), "unix:./é.sock");
}

#[test]
fn sparklines_are_of_the_latest_and_as_high_as_the_highest() {
    assert_eq!(sparkline(&[0, 4, 8], 3), " ▄█");
    assert_eq!(sparkline(&[9, 1, 1_000_000], 2), "▁█");
    assert_eq!(sparkline(&[5], 3), "  █");
    assert_eq!(sparkline(&[], 2), "  ");
    assert_eq!(sparkline(&[0, u64::MAX], 2), " █");
}

#[test]
fn idle_time_and_state_are_there_on_80_columns() {
    let mut model = model();
    let mut half = connection(7, 1, 0);
    half.state = ConnectionState::HalfClosedByClient;
    half.idle_seconds = 3700.0;
    half.peer = None;
    half.process = Some(ProcessInfo {
        pid: Some(4711),
        program: Some("curl".to_owned()),
        user: 501,
    });
    let forwards = vec![forward(1, 0, 0)];
    model.take_sample(sample(Instant::now(), forwards, vec![half]));
    let narrow = screen(&model, 80, 24);
    let row = line(&narrow, "curl[4711]");
    for part in ["web1", "client ended", "1 h"] {
        assert!(row.contains(part), "{part}: {narrow}");
    }
    let wide = screen(&model, 120, 24);
    assert!(line(&wide, "curl[4711]").contains("half-closed by client"));
}

#[test]
fn connections_are_sorted_by_what_is_wanted() {
    let mut model = model();
    let ids = |model: &Model| {
        let shown = model.shown().into_iter();
        shown.map(|it| it.connection.id).collect::<Vec<_>>()
    };
    for (order, expected) in [
        ("BUSIEST", [2, 3, 1]),
        ("LONGEST IDLE", [3, 2, 1]),
        ("OLDEST", [1, 2, 3]),
        ("BUSIEST", [2, 3, 1]),
    ] {
        assert_eq!(ids(&model), expected, "{order}");
        line(&screen(&model, 80, 20), order);
        write(&mut model, "s");
    }
}

#[test]
fn the_chosen_connection_stays_chosen_and_in_sight() {
    let mut model = Model::default();
    let many = |ids: std::ops::Range<u64>| -> Vec<ConnectionInfo> {
        ids.map(|id| connection(id, 1, 0)).collect()
    };
    let forwards = vec![forward(1, 0, 0)];
    model.take_sample(sample(Instant::now(), forwards.clone(), many(0..50)));
    assert_eq!(chosen_line(&model, 80, 20), None);
    write(&mut model, "ss");
    keys(&mut model, &[KeyCode::Down; 31]);
    let chosen = |model: &Model| chosen_line(model, 80, 20).unwrap();
    assert!(chosen(&model).contains(":500030"), "{}", chosen(&model));
    line(&screen(&model, 80, 20), "OLDEST +");
    // Others end, and it is still chosen.
    model.take_sample(sample(Instant::now(), forwards.clone(), many(20..50)));
    assert!(chosen(&model).contains(":500030"), "{}", chosen(&model));
    // It ends, and the next one takes its row.
    let mut left = many(20..50);
    left.retain(|it| it.id != 30);
    model.take_sample(sample(Instant::now(), forwards, left));
    assert!(chosen(&model).contains(":500031"), "{}", chosen(&model));
    keys(&mut model, &[KeyCode::End]);
    assert!(chosen(&model).contains(":500049"), "{}", chosen(&model));
    keys(&mut model, &[KeyCode::Home, KeyCode::Up]);
    assert!(chosen(&model).contains(":500020"), "{}", chosen(&model));
}

#[test]
fn a_filter_shows_those_with_a_text_and_is_taken_back() {
    let mut model = model();
    let shown = |model: &Model| model.shown().len();
    write(&mut model, "/REMO");
    line(&screen(&model, 80, 20), "find: REMO");
    assert_eq!(shown(&model), 1);
    // A typed character is no command.
    assert_eq!(write(&mut model, "q"), KeyAction::GoOn);
    assert_eq!(shown(&model), 0);
    keys(&mut model, &[KeyCode::Backspace, KeyCode::Enter]);
    line(&screen(&model, 80, 20), "BUSIEST: REMO");
    assert_eq!(shown(&model), 1);
    assert_eq!(keys(&mut model, &[KeyCode::Esc]), KeyAction::GoOn);
    assert_eq!(shown(&model), 3);
    assert_eq!(keys(&mut model, &[KeyCode::Esc]), KeyAction::End);
}

#[test]
fn one_is_closed_after_a_question_and_only_the_chosen_one() {
    let mut model = model();
    assert_eq!(write(&mut model, "k"), KeyAction::GoOn);
    line(&screen(&model, 80, 20), "choose a connection first");
    assert_eq!(write(&mut model, "y"), KeyAction::GoOn);
    // The busiest is the second.
    keys(&mut model, &[KeyCode::Down, KeyCode::Char('k')]);
    let question = screen(&model, 80, 20);
    line(&question, "close 2 of web1, from 127.0.0.1:50002? y/n");
    line(&screen(&model, 40, 12), "close 2, 127.0.0.1:50002? y/n");
    for no in ["n", "k", "q"] {
        assert_eq!(write(&mut model, no), KeyAction::GoOn);
        assert!(!screen(&model, 80, 20).contains("y/n"));
        write(&mut model, "k");
    }
    assert_eq!(write(&mut model, "y"), KeyAction::Close(2));
    model.note = Some("closed 2".to_owned());
    line(&screen(&model, 80, 20), "closed 2");
    write(&mut model, "s");
    assert!(!screen(&model, 80, 20).contains("closed 2"));
}

#[test]
fn help_tells_of_all_keys_and_any_key_leaves_it() {
    let mut model = model();
    for (width, height) in [(80, 24), (40, 12)] {
        write(&mut model, "?");
        let help = screen(&model, width, height);
        for part in [
            "choose a connection",
            "longest idle, oldest",
            "close the",
            "Tab",
            "q  ",
        ] {
            line(&help, part);
        }
        assert_eq!(write(&mut model, "q"), KeyAction::GoOn);
        line(&screen(&model, width, height), "50002");
    }
}

#[test]
fn all_that_matters_is_whole_on_40_by_12() {
    let model = model();
    let small = screen(&model, 40, 12);
    line(&small, "hvsock 9 live ↑2.00 KiB/s ↓5.00 KiB/s");
    line(&small, "450 of 900 slots");
    let web = line(&small, "web2");
    assert!(
        web.contains("listening") && web.contains("5.00 KiB/s"),
        "{small}"
    );
    let busy = line(&small, "127.0.0.1:50002");
    assert!(busy.contains("open") && busy.contains("5 s"), "{small}");
    line(&small, "q end  ? help  s sort  / find  k close");
}

/// It takes a slot, and is not among the connections that a user can list.
#[test]
fn a_probe_is_not_counted_as_a_connection() {
    let mut model = model();
    let mut probed = forward(1, 0, 0);
    let vm = probed.vm.as_mut().unwrap();
    (vm.status.connections, vm.status.probes) = (0, 1);
    let words = "0 of 900 slots, 1 probe (does the guest answer?)";
    assert_eq!(vm.slots(), words);
    vm.status.limit = Some(1);
    assert!(vm.is_full());
    vm.status.limit = Some(900);
    model.take_sample(sample(Instant::now(), vec![probed], Vec::new()));
    for width in [60, 160] {
        line(&screen(&model, width, 20), "0 of 900 slots, 1 probe");
    }
}
