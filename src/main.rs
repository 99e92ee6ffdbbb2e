//! The command `hvsock`.

use std::process::ExitCode;

fn main() -> ExitCode {
    hvsock::app::run(std::env::args_os())
}
