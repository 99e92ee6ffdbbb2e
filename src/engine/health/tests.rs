#![allow(clippy::unwrap_used)]

use super::*;

const GONE: Option<News> = Some(News::Gone { was_there: true });

#[test]
fn what_repeats_is_no_news() {
    let mut presence = Health::default();
    let start = Instant::now();
    let later = start + Duration::from_secs(3);
    assert_eq!(presence.is_up(), None);
    let never = Some(News::Gone { was_there: false });
    assert_eq!(presence.failed(start), never);
    let since = presence.gone_since();
    assert!(since.is_some());
    assert_eq!(presence.failed(later), None);
    assert_eq!(presence.gone_since(), since);
    let back = Some(News::Back(Duration::from_secs(3)));
    assert_eq!(presence.connected(later), back);
    assert_eq!(presence.connected(later), None);
    // A dial that was begun before.
    assert_eq!(presence.failed(later), None);
    assert_eq!(presence.failed(later + SETTLES), GONE);
}

#[test]
fn who_was_never_there_is_told_of_when_somebody_misses_it() {
    let mut presence = Health::default();
    let now = Instant::now();
    assert_eq!(presence.not_seen(now), None);
    assert_eq!(presence.is_up(), Some(false));
    assert!(presence.failed(now).is_some());
    assert_eq!(presence.not_seen(now), None);
}

#[test]
fn a_process_that_ended_is_gone_and_one_that_never_lived_says_nothing() {
    let mut presence = Health::default();
    let now = Instant::now();
    presence.connected(now);
    assert_eq!(presence.process(None, now), None);
    assert_eq!(presence.process(Some(7), now), None);
    assert_eq!(presence.process(None, now), GONE);
    assert_eq!(presence.process(None, now), None);
}

// It takes the identities of two files, which only Unix has.
#[cfg(unix)]
#[test]
fn another_file_is_another_vm_and_the_same_one_no_sign_of_life() {
    let directory = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        VmIdentity::Socket(Identity::of(&path).unwrap())
    });
    let now = Instant::now();
    let mut presence = Health::default();
    assert_eq!(presence.seen(one, now), (false, None));
    assert_eq!(presence.is_up(), None);
    presence.connected(now);
    presence.failed(now);
    // A socket that was left behind.
    assert_eq!(presence.seen(one, now), (false, None));
    let back = Some(News::Back(Duration::ZERO));
    assert_eq!(presence.seen(two, now), (true, back));
    assert_eq!(presence.seen(two, now), (false, None));
    // A worker that looked before.
    assert_eq!(presence.seen(one, now), (false, None));
    let now = now + SETTLES;
    assert_eq!(presence.seen(one, now), (true, Some(News::Restarted)));
    assert_eq!(presence.not_seen(now), GONE);
    assert_eq!(presence.seen(one, now), (false, back));
    assert_eq!(presence.restarts(), 2);
    // A dial may find the new one before anybody has looked at its file.
    let now = now + SETTLES;
    assert_eq!(presence.failed(now), GONE);
    assert_eq!(presence.connected(now), back);
    let now = now + 2 * SETTLES;
    assert_eq!(presence.seen(two, now), (true, None));
    let now = now + SETTLES;
    assert_eq!(presence.seen(one, now), (true, Some(News::Restarted)));
}

/// One that begins has its other files before its socket: it began once all the same.
#[cfg(unix)]
#[test]
fn a_file_beside_the_socket_is_no_other_vm() {
    let directory = tempfile::tempdir().unwrap();
    let [one, pid, two, other] = ["one", "pid", "two", "other"].map(|name| {
        let path = directory.path().join(name);
        std::fs::write(&path, "").unwrap();
        Identity::of(&path).unwrap()
    });
    let (socket, file) = (VmIdentity::Socket, VmIdentity::PidFile);
    let mut now = Instant::now();
    let mut presence = Health::default();
    assert_eq!(presence.seen(file(pid), now), (false, None));
    assert_eq!(presence.seen(socket(one), now), (false, None));
    presence.connected(now);
    now += SETTLES;
    assert_eq!(presence.seen(file(pid), now), (false, GONE));
    let back = Some(News::Back(SETTLES));
    now += SETTLES;
    assert_eq!(presence.seen(socket(two), now), (true, back));
    assert_eq!(presence.restarts(), 1);
    // Where there is nothing else to know it by.
    let mut presence = Health::default();
    assert_eq!(presence.seen(file(pid), now), (false, None));
    assert!(presence.seen(file(other), now).0);
    assert_eq!(presence.restarts(), 1);
}
