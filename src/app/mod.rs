//! The command: turns its arguments, its file and the requests to its control socket into
//! [`Rule`](crate::Rule)s, and shows people what happens.

#[cfg(unix)]
mod answering;
mod cat;
mod cli;
mod config;
#[cfg(unix)]
mod control;
mod doctor;
mod escape;
mod guest_control;
mod log;
mod lossy_writer;
mod needs;
mod output;
#[cfg(unix)]
mod processes;
mod ranges;
mod rule_options;
mod serve;
mod slow;
mod stress;
#[cfg(unix)]
mod syslog;
#[cfg(target_os = "linux")]
mod tcp_clients;
#[cfg(unix)]
mod top;
mod values;
mod vm;
#[cfg(unix)]
mod vmms;

pub use cli::run;
