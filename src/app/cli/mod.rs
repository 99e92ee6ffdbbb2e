//! The command line: turns words into rules, starts what they ask for, waits for its end.

mod arguments;
mod cat;
mod completions;
#[cfg(unix)]
mod control;
#[cfg(unix)]
mod demo;
mod doctor;
mod expose;
mod forward;
mod kept;
mod man;
mod manager;
mod options;
#[cfg(unix)]
mod passed;
mod reconciler;
mod run;
mod running;
mod services;
mod signals;
#[cfg(unix)]
mod simulate;
mod spec;
mod stress;
mod summary;
#[cfg(unix)]
mod syslog;
mod table;
#[cfg(unix)]
mod top;
mod vms;

use std::ffi::OsString;
use std::fmt;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing::Level;

use crate::app::log::{self, LogOptions};
use crate::app::lossy_writer::{Patience, set_patience};
use crate::app::{escape, output};
use crate::proxy::{Proxy, ProxyConfig, Rule};
use kept::{Describe, KeepTrying, Kept};
use manager::Manager;
use options::ProxyOptions;
use signals::{Asked, EndSignals};

/// Makes the vsock ports of a hyperkit VM reachable as local TCP and Unix sockets, and services of the host reachable
/// from the guest.
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
    Expose(expose::Expose),
    Forward(forward::Forward),
    Run(run::Run),
    Check(run::Check),
    #[cfg(unix)]
    Status(control::Status),
    #[cfg(unix)]
    Top(top::Top),
    #[cfg(unix)]
    Add(control::Add),
    #[cfg(unix)]
    Remove(control::Remove),
    #[cfg(unix)]
    Reload(control::Reload),
    #[cfg(unix)]
    Stop(control::Stop),
    Cat(cat::Cat),
    Stress(stress::Stress),
    #[cfg(unix)]
    Syslog(syslog::Syslog),
    Vms(vms::Vms),
    Doctor(doctor::Doctor),
    Register(services::Register),
    Unregister(services::Unregister),
    Services(services::Services),
    #[cfg(unix)]
    Simulate(simulate::Simulate),
    #[cfg(unix)]
    Demo(demo::Demo),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    /// Returns whether clients and signals depend on it, so that it must never wait for its
    /// readers.
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

    /// Returns where its log goes, if that can be said.
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

/// Why a command ended without having done what it was asked for.
#[derive(Debug)]
enum Failure {
    /// The words were wrong: exit code 2.
    Usage(String),
    /// It could not be done: exit code 1.
    Failed(String),
    /// The same, in several lines, of which the first says what.
    #[cfg(unix)]
    Listed(Vec<String>),
    /// It could not be done, and whoever would be told knows: exit code 1.
    Silent,
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::Failed(error.to_string())
    }
}

type Outcome = Result<(), Failure>;

/// Runs the command that `arguments` ask for (the first is the program's name); the process' exit code: 0 done,
/// 1 failed, 2 usage.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let _flush = Flush;
    set_patience(Patience::Unlimited);
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(e) => {
            // Help and version go to standard output with code 0, the rest to standard error with code 2.
            if let Err(why) = e.print()
                && !e.use_stderr()
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
        Command::Top(top) => top.run(),
        #[cfg(unix)]
        Command::Add(add) => add.run(),
        #[cfg(unix)]
        Command::Remove(remove) => remove.run(),
        #[cfg(unix)]
        Command::Reload(reload) => reload.run(),
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
        Command::Man(man) => man.run(),
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
            // Whoever wrote them, none looks as if it were another message.
            list(lines.map(|line| format!("  {line}")));
            ExitCode::FAILURE
        }
        Err(Failure::Silent) => ExitCode::FAILURE,
    }
}

/// Waits at the end, however it comes, until what was said is written.
struct Flush;

impl Drop for Flush {
    fn drop(&mut self) {
        output::flush();
    }
}

/// Says what people should know. One that serves never waits for it to be read.
fn complain(what: impl fmt::Display) {
    log::say(Level::WARN, what);
}

/// Says why it ends.
fn fail(what: impl fmt::Display) {
    log::say(Level::ERROR, what);
}

/// Says more of it, line by line.
fn list(lines: impl IntoIterator<Item = impl fmt::Display>) {
    for line in lines {
        log::say_more(Level::WARN, line);
    }
}

/// Says a line on standard output; a closed one is no reason to stop carrying.
fn say(line: impl fmt::Display) {
    output::OUT.send(one_line(line).into_bytes());
}

fn one_line(text: impl fmt::Display) -> String {
    format!("{}\n", escape::line(&text.to_string()))
}

/// Prints a line that was asked for.
fn print(line: impl fmt::Display) -> Outcome {
    write_out(one_line(line).as_bytes())
}

/// Prints what was asked for and has many lines; what stands in one of them was made fit for it.
fn print_text(text: impl fmt::Display) -> Outcome {
    write_out(format!("{}\n", escape::text(&text.to_string())).as_bytes())
}

/// Prints JSON that was asked for.
fn print_json(json: &str) -> Outcome {
    write_out(format!("{}\n", escape::json(json)).as_bytes())
}

/// Writes to standard output.
fn write_out(bytes: &[u8]) -> Outcome {
    let written = output::print(bytes);
    written.map_err(|e| Failure::Failed(format!("cannot write to standard output: {e}")))
}

/// Carries rules as the options have it until the end is asked for; the control socket and the metrics
/// beside it, if they were asked for.
fn carry(
    options: &ProxyOptions,
    patience: KeepTrying,
    rules: impl IntoIterator<Item = Rule>,
    describe: Describe,
    signals: EndSignals,
) -> Outcome {
    let config = options.config(rules);
    #[cfg(unix)]
    let (config, bound) = control::open(options, patience, config)?;
    let (proxy, kept) = patience.start(config, describe)?;
    let kept = kept.map(Arc::new);
    #[cfg(unix)]
    let _control = control::begin(options, bound, &proxy, kept.clone())?;
    proxy.forwards().iter().map(describe).for_each(say);
    kept.iter().for_each(|kept| kept.complain());
    let _retry = kept.map(Kept::keep_trying).transpose()?;
    run_proxy(proxy, options.grace(), signals)
}

/// Starts a proxy, on the sockets that a service manager has passed where rules listen there.
fn start(config: ProxyConfig) -> Result<Proxy, Failure> {
    Ok(Proxy::start(on_passed_sockets(config)?)?)
}

/// Adds the sockets that a service manager has passed; to be called once.
fn on_passed_sockets(mut config: ProxyConfig) -> Result<ProxyConfig, Failure> {
    #[cfg(unix)]
    config.listeners.extend(passed::listeners()?);
    // Elsewhere there are none.
    let _ = &mut config;
    Ok(config)
}

/// Runs a proxy until one of the [`EndSignals`] or a failure ends it.
fn run_proxy(proxy: Proxy, grace: Duration, signals: EndSignals) -> Outcome {
    run_until_told(proxy, signals, move || grace, || {})
}

/// How long the last words may take once the proxy has ended: whoever is to hear them may hang.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ends the process some time after that grace, if it has not ended by itself: a worker that looks up a socket's path on
/// a disk that hangs never does, nor one that waits for the reader of its report.
fn end_without_what_hangs(grace: Duration) {
    /// How long a proxy takes at the end at most: it closes the connections of guests, and removes its files.
    const END: Duration = Duration::from_secs(12);
    std::thread::spawn(move || {
        std::thread::sleep(grace.saturating_add(END));
        set_patience(Patience::Limited);
        complain("something hangs: ending without it");
        output::flush();
        std::process::exit(1);
    });
}

/// The same; `grace` is asked for when the end begins, `reload` called when a signal asks for one.
/// Neither may wait for anything: a signal ends the process whatever else goes on.
fn run_until_told(
    proxy: Proxy,
    mut signals: EndSignals,
    grace: impl Fn() -> Duration + Send + 'static,
    reload: impl Fn() + Send + 'static,
) -> Outcome {
    let closer = signals.closer();
    let handle = proxy.handle();
    let _manager = Manager::begin(&handle);
    let (speaking, silence) = channel::<()>();
    std::thread::spawn(move || {
        let _speaking = speaking;
        let end = |asked: &Asked| {
            if *asked == Asked::Reload {
                reload();
            }
            *asked == Asked::End
        };
        for (count, _) in signals.asked().filter(end).enumerate() {
            if count == 0 {
                let grace = grace();
                let status = match handle.live() {
                    0 => "stopping".to_owned(),
                    n => format!(
                        "stopping: no new clients; {n} connections have {} s to finish; once more to cut them off",
                        grace.as_secs()
                    ),
                };
                // First what ends it, then what is said of it.
                handle.stop(grace);
                end_without_what_hangs(grace);
                complain(&status);
                Manager::stopping(status);
            } else {
                handle.stop(Duration::ZERO);
                end_without_what_hangs(Duration::ZERO);
                complain("cutting clients off, closing the connections of guests");
            }
        }
    });
    let ended = proxy.wait();
    closer.close();
    // It has nothing to send: this is the thread's end.
    let _ = silence.recv_timeout(LAST_WORDS);
    Ok(ended?)
}
