//! A live view of a running hvsock: queries its control socket once a second, keeps the answers in
//! a [`Model`], and draws that.

mod draw;
mod keys;
mod model;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyEventKind};
use signal_hook::consts::{SIGHUP, SIGTERM};

use crate::app::control::{self, Unanswered};
use crate::sys::{self, Wanted};
use crate::thread::start_thread;
use keys::{KeyAction, handle_key};
use model::{Model, Sample};

/// How often the hvsock is queried.
const EVERY: Duration = Duration::from_secs(1);

/// How often answers and signals are checked for while no key is pressed.
const LOOK: Duration = Duration::from_millis(100);

/// Shows the hvsock with the control socket at `path`, until the user ends the view.
///
/// # Errors
/// Returns why the first query failed, or the terminal's error.
pub(crate) fn run(path: &Path) -> io::Result<()> {
    let mut model = Model::default();
    model.take_sample(ask(path).map_err(io::Error::other)?);
    let end = Arc::new(AtomicBool::new(false));
    for signal in [SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&end))?;
    }
    // A bound of one: samples must not pile up while the terminal is stopped.
    let (tell, told) = sync_channel(1);
    let place: PathBuf = path.to_owned();
    start_thread("hvsock-ask", "to ask for the status", move || {
        keep_asking(&place, &tell);
    })?;
    let (answer, answers) = channel();
    let _screen = Screen;
    let mut terminal = ratatui::try_init()?;
    while !end.load(Ordering::Relaxed) {
        terminal.draw(|frame| draw::draw(frame, &model))?;
        // crossterm's own wait would read the EOF of a closed terminal for ever.
        let keys = io::stdin();
        sys::wait(keys.as_fd(), Wanted::Readable, LOOK)?;
        if sys::is_hung_up(keys.as_fd()) {
            break;
        }
        while event::poll(Duration::ZERO)? {
            if let Event::Key(key) = event::read()?
                && key.kind == KeyEventKind::Press
            {
                match handle_key(&mut model, key) {
                    KeyAction::GoOn => {}
                    KeyAction::End => return Ok(()),
                    KeyAction::Close(id) => close(path, id, answer.clone()),
                }
            }
        }
        take(&mut model, &told);
        if let Some(note) = answers.try_iter().last() {
            model.note = Some(note);
        }
    }
    Ok(())
}

/// Restores the terminal when dropped. After a panic ratatui's hook does, before the message.
struct Screen;

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Closes a connection, and sends a message about the result. Runs on its own thread, since the
/// answer may take long.
fn close(path: &Path, id: u64, answer: Sender<String>) {
    let path = path.to_owned();
    let failing = answer.clone();
    let close = move || {
        let call = format!("/v1/connections/{id}");
        let closed = control::ask(&path, "DELETE", &call, "");
        // The view may have ended.
        let _ = answer.send(match closed {
            Ok(_) => format!("closed {id}"),
            Err(why) => why.to_string(),
        });
    };
    if let Err(e) = start_thread("hvsock-close", "to close a connection", close) {
        let _ = failing.send(e.to_string());
    }
}

fn take(model: &mut Model, told: &Receiver<Result<Sample, String>>) {
    for answer in told.try_iter() {
        match answer {
            Ok(sample) => model.take_sample(sample),
            Err(why) => model.note_no_answer(why),
        }
    }
}

fn ask(path: &Path) -> Result<Sample, Unanswered> {
    Ok(Sample {
        status: control::get(path, "/v1/status")?,
        connections: control::get(path, "/v1/connections")?,
        at: Instant::now(),
    })
}

/// Queries once a second, until the view has ended.
fn keep_asking(path: &Path, tell: &SyncSender<Result<Sample, String>>) {
    loop {
        thread::sleep(EVERY);
        let answer = ask(path).map_err(|e| match e {
            Unanswered::Absent(error) => error.cause().to_string(),
            Unanswered::Untrusted(error) => error.to_string(),
            Unanswered::Refused(problem) => problem.to_string(),
        });
        if tell.send(answer).is_err() {
            return;
        }
    }
}
