//! The command `hvsock`.

use std::process::ExitCode;

fn main() -> ExitCode {
    hvsock::cli::run(std::env::args_os())
}
