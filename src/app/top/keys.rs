//! Handles the keys.

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::model::{Focus, Mode, Model};

/// How many connections a page key moves; a screen of any height shows the chosen one.
const PAGE: isize = 10;

/// What to do after a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyAction {
    GoOn,
    End,
    /// Close the connection of that id.
    Close(u64),
}

/// Handles a key.
pub(super) fn handle_key(model: &mut Model, key: KeyEvent) -> KeyAction {
    if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
        return KeyAction::End;
    }
    model.note = None;
    match model.mode {
        Mode::Command => command(model, key.code),
        Mode::Filter => {
            edit_filter(model, key.code);
            KeyAction::GoOn
        }
        Mode::Question(id) => {
            model.mode = Mode::Command;
            match key.code {
                KeyCode::Char('y' | 'Y') => KeyAction::Close(id),
                _ => KeyAction::GoOn,
            }
        }
        Mode::Help => {
            model.mode = Mode::Command;
            KeyAction::GoOn
        }
    }
}

fn command(model: &mut Model, key: KeyCode) -> KeyAction {
    match key {
        // Escape first removes the filter, then ends the view.
        KeyCode::Esc if !model.filter.is_empty() => model.set_filter(String::new()),
        KeyCode::Char('q') | KeyCode::Esc => return KeyAction::End,
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
        KeyCode::Down => model.move_selection(1),
        KeyCode::Up => model.move_selection(-1),
        KeyCode::PageDown => model.move_selection(PAGE),
        KeyCode::PageUp => model.move_selection(-PAGE),
        KeyCode::End => model.move_selection(isize::MAX),
        KeyCode::Home => model.move_selection(isize::MIN),
        _ => {}
    }
    KeyAction::GoOn
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
