//! The command line: turns words into rules, runs what they ask for, and waits for the end.

mod arguments;
mod carrying;
mod cat;
mod complete;
mod completions;
#[cfg(unix)]
mod connections;
mod console;
#[cfg(unix)]
mod control;
#[cfg(unix)]
mod control_socket;
#[cfg(unix)]
mod demo;
mod doctor;
#[cfg(all(test, unix))]
mod documented;
mod ending;
#[cfg(unix)]
mod events;
mod expose;
mod forward;
mod given;
#[cfg(unix)]
mod keepers;
mod kept;
mod man;
mod manager;
#[cfg(unix)]
mod occupant;
mod options;
mod outcome;
mod passed;
#[cfg(unix)]
mod predecessor;
#[cfg(unix)]
mod ps;
mod reconciler;
mod rules;
mod run;
mod running;
mod services;
mod signals;
#[cfg(unix)]
mod simulate;
mod spec;
#[cfg(unix)]
mod stop;
mod stress;
mod summary;
#[cfg(unix)]
mod syslog;
mod table;
#[cfg(unix)]
mod top;
mod usage;
mod vms;

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::app::log::{self, LogOptions};
use crate::app::lossy_writer::{Patience, set_patience};
use crate::app::output;
use console::{complain, fail, list};
use outcome::Failure;

/// Makes the vsock ports of a hyperkit VM reachable as local TCP and Unix sockets, and services of
/// the host reachable from the guest.
#[derive(Parser, Debug)]
#[command(name = "hvsock", version, max_term_width = 100)]
#[command(after_help = "Vsock ports are decimal, or hexadecimal with 0x. \
    Try `hvsock demo`: it needs no VM.\n\
    HVSOCK_LOG=debug says more on standard error, HVSOCK_LOG=error less, HVSOCK_LOG=info,connection=debug more of one \
    part (access, connection, control, listener, syslog, vm).")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Expose(expose::ExposeArgs),
    Forward(forward::ForwardArgs),
    Run(run::RunArgs),
    Check(run::CheckArgs),
    #[cfg(unix)]
    Status(control::StatusArgs),
    #[cfg(unix)]
    Ps(ps::PsArgs),
    #[cfg(unix)]
    Connections(connections::ConnectionsArgs),
    #[cfg(unix)]
    Close(connections::CloseArgs),
    #[cfg(unix)]
    Top(top::TopArgs),
    #[cfg(unix)]
    Events(events::EventsArgs),
    #[cfg(unix)]
    Add(control::AddArgs),
    #[cfg(unix)]
    Remove(control::RemoveArgs),
    #[cfg(unix)]
    Reload(control::ReloadArgs),
    #[cfg(unix)]
    Upgrade(control::UpgradeArgs),
    #[cfg(unix)]
    Stop(stop::StopArgs),
    Cat(cat::CatArgs),
    Stress(stress::StressArgs),
    #[cfg(unix)]
    Syslog(syslog::SyslogArgs),
    Vms(vms::VmsArgs),
    Doctor(doctor::DoctorArgs),
    Register(services::RegisterArgs),
    Unregister(services::UnregisterArgs),
    Services(services::ServicesArgs),
    #[cfg(unix)]
    Simulate(simulate::SimulateArgs),
    #[cfg(unix)]
    Demo(demo::DemoArgs),
    Completions(completions::CompletionsArgs),
    Man(man::ManArgs),
}

impl Command {
    /// Returns whether the command serves clients or handles signals, so that it must never wait
    /// for the reader of its output.
    fn serves(&self) -> bool {
        match self {
            Command::Expose(_)
            | Command::Forward(_)
            | Command::Run(_)
            | Command::Cat(_)
            | Command::Stress(_) => true,
            #[cfg(unix)]
            Command::Syslog(_) | Command::Simulate(_) | Command::Demo(_) => true,
            _ => false,
        }
    }

    /// Returns the options that say where the command's log goes.
    fn log(&self) -> LogOptions {
        match self {
            Command::Expose(expose) => expose.log(),
            Command::Forward(forward) => forward.log(),
            Command::Run(run) => run.log(),
            #[cfg(unix)]
            Command::Syslog(syslog) => syslog.log(),
            _ => LogOptions::default(),
        }
    }
}

/// Runs the command that `arguments` ask for (the first is the program's name). Returns the
/// process' exit code: 0 done, 1 failed, 2 usage.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let _flush = Flush;
    set_patience(Patience::Unlimited);
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(answered) = complete::answer(arguments.clone(), Arguments::command()) {
        return answered;
    }
    let words = arguments.iter().map(|it| it.to_string_lossy().into_owned());
    let words: Vec<String> = words.collect();
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(e) => {
            let e = usage::reword_error(e, &words);
            // Help and version go to standard output with code 0, the rest to standard error with
            // code 2.
            if let Err(why) = e.print()
                && !e.use_stderr()
                && why.kind() != io::ErrorKind::BrokenPipe
            {
                complain(format_args!("cannot write to standard output: {why}"));
                return ExitCode::FAILURE;
            }
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    if arguments.command.serves() {
        set_patience(Patience::Limited);
    }
    if let Err(why) = log::start(&arguments.command.log()) {
        fail(why);
        return ExitCode::FAILURE;
    }
    let outcome = match arguments.command {
        Command::Expose(expose) => expose.run(),
        Command::Forward(forward) => forward.run(),
        Command::Run(run) => run.run(),
        Command::Check(check) => check.run(),
        #[cfg(unix)]
        Command::Status(status) => status.run(),
        #[cfg(unix)]
        Command::Ps(ps) => ps.run(),
        #[cfg(unix)]
        Command::Connections(connections) => connections.run(),
        #[cfg(unix)]
        Command::Close(close) => close.run(),
        #[cfg(unix)]
        Command::Top(top) => top.run(),
        #[cfg(unix)]
        Command::Events(events) => events.run(),
        #[cfg(unix)]
        Command::Add(add) => add.run(),
        #[cfg(unix)]
        Command::Remove(remove) => remove.run(),
        #[cfg(unix)]
        Command::Reload(reload) => reload.run(),
        #[cfg(unix)]
        Command::Upgrade(upgrade) => upgrade.run(),
        #[cfg(unix)]
        Command::Stop(stop) => stop.run(),
        Command::Cat(cat) => cat.run(),
        Command::Stress(stress) => stress.run(),
        #[cfg(unix)]
        Command::Syslog(syslog) => syslog.run(),
        Command::Vms(vms) => vms.run(),
        Command::Doctor(doctor) => doctor.run(),
        Command::Register(register) => register.run(),
        Command::Unregister(unregister) => unregister.run(),
        Command::Services(services) => services.run(),
        #[cfg(unix)]
        Command::Simulate(simulate) => simulate.run(),
        #[cfg(unix)]
        Command::Demo(demo) => demo.run(),
        Command::Completions(completions) => completions.run(),
        Command::Man(man) => man.run(Arguments::command()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(why)) => {
            fail(why);
            list(["Try --help."]);
            ExitCode::from(2)
        }
        Err(Failure::Failed(why)) => {
            fail(why);
            ExitCode::FAILURE
        }
        #[cfg(unix)]
        Err(Failure::Listed(lines)) => {
            let mut lines = lines.into_iter();
            fail(lines.next().unwrap_or_default());
            // Indented, so that no line looks like another message.
            list(lines.map(|line| format!("  {line}")));
            ExitCode::FAILURE
        }
        #[cfg(unix)]
        Err(Failure::Program(code)) => ExitCode::from(code),
        Err(Failure::Silent) => ExitCode::FAILURE,
    }
}

/// When dropped, waits until all output is written.
struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        output::flush();
    }
}
