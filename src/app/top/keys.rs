//! What the keys do.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::{Focus, Mode, Model};

/// How many connections a page has, whatever the screen: what is chosen stays in sight.
const PAGE: isize = 10;

/// What is to be done after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    GoOn,
    End,
    /// Close the connection of that id.
    Close(u64),
}

/// Does what a key says.
pub(super) fn press(model: &mut Model, key: KeyEvent) -> Wish {
    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
        return Wish::End;
    }
    model.note = None;
    match model.mode {
        Mode::Command => command(model, key.code),
        Mode::Filter => {
            edit_filter(model, key.code);
            Wish::GoOn
        }
        Mode::Question(id) => {
            model.mode = Mode::Command;
            match key.code {
                KeyCode::Char('y' | 'Y') => Wish::Close(id),
                _ => Wish::GoOn,
            }
        }
        Mode::Help => {
            model.mode = Mode::Command;
            Wish::GoOn
        }
    }
}

fn command(model: &mut Model, key: KeyCode) -> Wish {
    match key {
        // What was asked for last is taken back first.
        KeyCode::Esc if !model.filter.is_empty() => model.set_filter(String::new()),
        KeyCode::Char('q') | KeyCode::Esc => return Wish::End,
        KeyCode::Char('?') => model.mode = Mode::Help,
        KeyCode::Char('/') => model.mode = Mode::Filter,
        KeyCode::Char('s') => model.sort_anew(),
        KeyCode::Char('k') => model.ask_to_close(),
        KeyCode::Tab => {
            model.focus = match model.focus {
                Focus::Connections => Focus::Forwards,
                Focus::Forwards => Focus::Connections,
            };
        }
        KeyCode::Down => model.go(1),
        KeyCode::Up => model.go(-1),
        KeyCode::PageDown => model.go(PAGE),
        KeyCode::PageUp => model.go(-PAGE),
        KeyCode::End => model.go(isize::MAX),
        KeyCode::Home => model.go(isize::MIN),
        _ => {}
    }
    Wish::GoOn
}

fn edit_filter(model: &mut Model, key: KeyCode) {
    let mut text = model.filter.clone();
    match key {
        KeyCode::Enter => model.mode = Mode::Command,
        KeyCode::Esc => {
            model.mode = Mode::Command;
            text.clear();
        }
        KeyCode::Backspace => {
            text.pop();
        }
        KeyCode::Char(letter) => text.push(letter),
        _ => {}
    }
    model.set_filter(text);
}
