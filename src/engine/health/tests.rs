#![allow(clippy::unwrap_used)]

use super::*;

const GONE: Option<News> = Some(News::Gone { was_there: true });

#[test]
fn what_repeats_is_no_news() {
    let mut health = Health::default();
    let start = Instant::now();
    let later = start + Duration::from_secs(3);
    assert_eq!(health.is_up(), None);
    let never = Some(News::Gone { was_there: false });
    assert_eq!(health.mark_down(start), never);
    let since = health.gone_since();
    assert!(since.is_some());
    assert_eq!(health.mark_down(later), None);
    assert_eq!(health.gone_since(), since);
    let back = Some(News::Back(Duration::from_secs(3)));
    assert_eq!(health.mark_up(later), back);
    assert_eq!(health.mark_up(later), None);
    // A dial that was begun before.
    assert_eq!(health.mark_down(later), None);
    assert_eq!(health.mark_down(later + SETTLES), GONE);
}

#[test]
fn who_was_never_there_is_told_of_when_somebody_misses_it() {
    let mut health = Health::default();
    let now = Instant::now();
    assert_eq!(health.note_absence(now), None);
    assert_eq!(health.is_up(), Some(false));
    assert!(health.mark_down(now).is_some());
    assert_eq!(health.note_absence(now), None);
}

#[test]
fn a_process_that_ended_is_gone_and_one_that_never_lived_says_nothing() {
    let mut health = Health::default();
    let now = Instant::now();
    health.mark_up(now);
    assert_eq!(health.note_process(None, now), None);
    assert_eq!(health.note_process(Some(7), now), None);
    assert_eq!(health.note_process(None, now), GONE);
    assert_eq!(health.note_process(None, now), None);
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
    let mut health = Health::default();
    assert_eq!(health.note_identity(one, now), (false, None));
    assert_eq!(health.is_up(), None);
    health.mark_up(now);
    health.mark_down(now);
    // A socket that was left behind.
    assert_eq!(health.note_identity(one, now), (false, None));
    let back = Some(News::Back(Duration::ZERO));
    assert_eq!(health.note_identity(two, now), (true, back));
    assert_eq!(health.note_identity(two, now), (false, None));
    // A worker that looked before.
    assert_eq!(health.note_identity(one, now), (false, None));
    let now = now + SETTLES;
    assert_eq!(
        health.note_identity(one, now),
        (true, Some(News::Restarted))
    );
    assert_eq!(health.note_absence(now), GONE);
    assert_eq!(health.note_identity(one, now), (false, back));
    assert_eq!(health.restarts(), 2);
    // A dial may find the new one before anybody has looked at its file.
    let now = now + SETTLES;
    assert_eq!(health.mark_down(now), GONE);
    assert_eq!(health.mark_up(now), back);
    let now = now + 2 * SETTLES;
    assert_eq!(health.note_identity(two, now), (true, None));
    let now = now + SETTLES;
    assert_eq!(
        health.note_identity(one, now),
        (true, Some(News::Restarted))
    );
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
    let mut health = Health::default();
    assert_eq!(health.note_identity(file(pid), now), (false, None));
    assert_eq!(health.note_identity(socket(one), now), (false, None));
    health.mark_up(now);
    now += SETTLES;
    assert_eq!(health.note_identity(file(pid), now), (false, GONE));
    let back = Some(News::Back(SETTLES));
    now += SETTLES;
    assert_eq!(health.note_identity(socket(two), now), (true, back));
    assert_eq!(health.restarts(), 1);
    // Where there is nothing else to know it by.
    let mut health = Health::default();
    assert_eq!(health.note_identity(file(pid), now), (false, None));
    assert!(health.note_identity(file(other), now).0);
    assert_eq!(health.restarts(), 1);
}
