//! The command `hvsock`.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A keeper is a process of its own, which is to stay small.
    #[cfg(unix)]
    if std::env::args_os().nth(1).is_some_and(|it| it == "keeper") {
        return ExitCode::from(u8::try_from(hvsock::keeper::serve()).unwrap_or(1));
    }
    hvsock::app::run(std::env::args_os())
}
