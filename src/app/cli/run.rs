//! `hvsock run` and `hvsock check`: carry what a file says, and check a file.

#[cfg(unix)]
use std::ffi::OsString;
#[cfg(unix)]
use std::io::Write as _;
#[cfg(unix)]
use std::os::fd::OwnedFd;
#[cfg(unix)]
use std::os::unix::net::UnixStream;
#[cfg(unix)]
use std::path::Path;
use std::path::PathBuf;
#[cfg(unix)]
use std::process::Command;
use std::sync::Arc;
#[cfg(unix)]
use std::time::Duration;

use clap::{Args, ValueHint};

use super::console::{complain, list, print, say};
#[cfg(unix)]
use super::ending::{
    ProcessEnd, end_without_what_hangs, log_start, run_until_told, tell_manager_of_end,
};
#[cfg(not(unix))]
use super::ending::{ProcessEnd, log_start, run_until_told};
use super::manager::Manager;
#[cfg(unix)]
use super::options::KeeperOptions;
use super::outcome::{Failure, Outcome};
#[cfg(unix)]
use super::predecessor;
use super::reconciler::RetryThread;
use super::running::{self, ControlSockets, NotStarted, Running};
use super::signals::EndSignals;
use super::summary::Summary;
#[cfg(unix)]
use crate::app::config::STANDARD_INPUT;
use crate::app::config::{Config, Problems, display_name};
#[cfg(unix)]
use crate::app::control::{Actions, ApiProblem, Started, Succession};
use crate::app::log::LogOptions;
use crate::error::counted;
#[cfg(unix)]
use crate::error::counted_have;
use crate::hyperkit::Places;
use crate::proxy::ProxyConfig;
#[cfg(unix)]
use crate::proxy::{Handle, Proxy};

const EXAMPLE: &str = "Example:
  [vm.docker]
  at = \"~/vms/docker\"            # as --vm takes it; else the VM's name
  [forward.docker-api]
  listen = \"/tmp/docker.sock\"    # 8080, \"ADDR:PORT\", a path or a URI
  vm = \"docker\"
  port = 2375                    # the guest's vsock port
  [forward.registry]
  vm = \"docker\"
  guest-dials = 5000             # port 5000 of CID 2, as the guest dials it
  connect = \"127.0.0.1:8080\"
More: https://docs.rs/hvsock, and scripts/hvsock.toml beside the source, which has every key";

/// Carry what a file says: many VMs and forwards in one process
#[derive(Args, Debug)]
#[command(after_help = EXAMPLE)]
#[command(
    long_about = "Carry what a file says: many VMs and forwards in one process

What can't be listened on now is said, and tried again every 2 s. SIGHUP reads the file again: only what has changed is \
touched, live connections stay, and a file with a mistake in it changes nothing. SIGINT and SIGTERM end as with `expose`.

`hvsock upgrade` has it replaced by another version of the program, and no client is refused meanwhile."
)]
pub(super) struct RunArgs {
    /// The file, in TOML; - is standard input
    #[arg(value_name = "CONFIG", value_hint = ValueHint::FilePath)]
    file: PathBuf,
    /// Take over the listening sockets of the hvsock that runs there and is controlled where this
    /// one is to be: no client is refused. Its connections go on, and are cut off after its grace
    #[cfg(unix)]
    #[arg(long)]
    take_over: bool,
    #[cfg(unix)]
    #[command(flatten)]
    keeper: KeeperOptions,
    /// Log a line for each connection that has ended, with why it has, whatever the file says
    #[arg(long)]
    access_log: bool,
    // The last, for its heading would be that of what follows.
    #[command(flatten)]
    log: LogOptions,
}

/// Say all that is wrong with such a file, or what it would forward
#[derive(Args, Debug)]
#[command(after_help = EXAMPLE)]
pub(super) struct CheckArgs {
    /// The file, in TOML; - is standard input
    #[arg(value_name = "CONFIG", value_hint = ValueHint::FilePath)]
    file: PathBuf,
}

impl CheckArgs {
    pub(super) fn run(self) -> Outcome {
        let (config, wanted) =
            Config::read(&self.file, &Places::from_env()).map_err(|e| show(&e))?;
        list(Problems::new(&self.file, wanted.notes).lines());
        let vms = config.vms_of_forwards();
        for rule in &wanted.rules {
            let name = rule.name.as_deref().unwrap_or_default();
            let vm = vms.get(name).copied();
            print(running::describe(name, &rule.listen, &rule.connect, vm))?;
        }
        let file = display_name(&self.file);
        let forwards = counted(wanted.rules.len() as u64, "forward");
        print(format_args!("{file} is right: {forwards}"))
    }
}

impl RunArgs {
    pub(super) fn log(&self) -> LogOptions {
        self.log.clone()
    }

    pub(super) fn run(self) -> Outcome {
        let signals = EndSignals::take_with_reload()?;
        let configure = |config: &mut ProxyConfig| {
            #[cfg(unix)]
            self.keeper.apply(config);
            config.access_log |= self.access_log;
        };
        #[cfg(unix)]
        let program = std::env::current_exe();
        #[cfg(unix)]
        let started = match self.take_over {
            true => Running::take_over(&self.file, configure),
            false => Running::start(&self.file, configure),
        };
        #[cfg(not(unix))]
        let started = Running::start(&self.file, configure);
        #[cfg(unix)]
        if let Err(why) = &started
            && self.take_over
        {
            predecessor::tell_why_not(&why.lines());
        }
        let (proxy, running, sockets) = started.map_err(|e| match e {
            NotStarted::File(problems) => show(&problems),
            NotStarted::Failed(why) => why,
        })?;
        let running = Arc::new(running);
        #[cfg(unix)]
        let _control = control(&running, sockets, &proxy, program)?;
        #[cfg(not(unix))]
        let ControlSockets = sockets;
        log_start(&proxy);
        running.describe(&[]).iter().for_each(say);
        running.troubles().iter().for_each(complain);
        let [retrying, reloading, asked] = [(); 3].map(|()| Arc::clone(&running));
        let retry = RetryThread::start(
            move || retrying.try_again(),
            move || {
                // The reload has logged what is wrong.
                let _ = reload(&reloading);
            },
        )?;
        let end = ProcessEnd {
            exit_idle: asked.exit_idle(),
            grace: move || asked.grace(),
        };
        run_until_told(proxy, signals, end, retry.reloader())
    }
}

/// Reads the file again, and reports that to the service manager.
fn reload(running: &Running) -> Result<Summary, Problems> {
    // At the end the process must not report that it is ready.
    if running.handle().is_stopping() {
        return running.reload();
    }
    Manager::reloading();
    let read = running.reload();
    Manager::ready(running.handle());
    read
}

/// Returns the arguments with which the command takes over, given its own arguments.
#[cfg(unix)]
fn words_to_take_over(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    const TAKE_OVER: &str = "--take-over";
    let mut words: Vec<OsString> = words.skip(1).collect();
    if !words.iter().any(|word| word == TAKE_OVER) {
        // Directly after `run`, the first argument: nothing after a `--` is an option.
        words.insert(1.min(words.len()), TAKE_OVER.into());
    }
    words
}

/// Starts the program that is now at the path of this one, to take over from it.
///
/// # Errors
/// Returns why it can't be started, with its path; or that there is no file for it to read.
#[cfg(unix)]
fn start_successor(program: &std::io::Result<PathBuf>, file: &Path) -> Result<Started, ApiProblem> {
    if file == Path::new(STANDARD_INPUT) {
        let why = "what is carried came from standard input, and can't be read again";
        let remedy = "give it to a new one: `hvsock run - --take-over <CONFIG`";
        return Err(ApiProblem::new(409, why).with_remedy(remedy));
    }
    let fail = |why: &dyn std::fmt::Display| {
        let problem = ApiProblem::new(500, format!("the program can't be started: {why}"));
        problem.with_remedy("install it there, and ask again")
    };
    let program = program.as_ref().map_err(|e| fail(e))?;
    let mut command = Command::new(program);
    command.args(words_to_take_over(std::env::args_os()));
    // These variables name this process. The passed sockets are handed over on the control socket.
    for variable in ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "WATCHDOG_PID"] {
        command.env_remove(variable);
    }
    // The new process reports here why it can't take over.
    let (mut report, theirs) = UnixStream::pair().map_err(|e| fail(&e))?;
    report
        .write_all(predecessor::TELL_WHY_NOT)
        .map_err(|e| fail(&e))?;
    let child = command.stdin(OwnedFd::from(theirs)).spawn();
    let child = child.map_err(|e| fail(&format_args!("{}: {e}", program.display())))?;
    Ok(Started { child, report })
}

/// Ends a proxy whose listeners another process has taken.
#[cfg(unix)]
fn end_after_hand_over(handle: &Handle, grace: Duration, successor: u32) {
    Manager::handed_over(successor);
    let live = handle.live();
    handle.stop(grace);
    end_without_what_hangs(grace);
    complain(format_args!(
        "process {successor} has taken over; {} {} s to finish here",
        counted_have(live as u64, "connection"),
        grace.as_secs()
    ));
}

#[cfg(unix)]
fn control(
    running: &Arc<Running>,
    sockets: ControlSockets,
    proxy: &Proxy,
    program: std::io::Result<PathBuf>,
) -> crate::Result<crate::app::control::Control> {
    let [unchanged, ended] = [(); 2].map(|()| Arc::clone(running));
    let file = running.file().to_owned();
    let succession = Succession {
        file: file.clone(),
        predecessor: running.predecessor(),
        while_unchanged: Box::new(move |f| unchanged.while_unchanged(f)),
        start: Box::new(move || start_successor(&program, &file)),
        end: Box::new(move |pid| end_after_hand_over(ended.handle(), ended.grace(), pid)),
    };
    let (read, options, grace, pending, exec) = (
        Arc::clone(running),
        Arc::clone(running),
        Arc::clone(running),
        Arc::clone(running),
        Arc::clone(running),
    );
    let actions = Actions {
        options: Box::new(move || options.defaults()),
        pending: Box::new(move || pending.pending()),
        stopping: tell_manager_of_end,
        reload: Some(Box::new(move || match reload(&read) {
            Ok(summary) => serde_json::to_value(summary.report())
                .map_err(|e| ApiProblem::new(500, e.to_string())),
            Err(problems) => Err(ApiProblem::new(
                400,
                format!("{}; all stays as it was\n{problems}", problems.summary()),
            )),
        })),
        succession: Some(succession),
        grace: Box::new(move || grace.grace()),
        allows_exec: Box::new(move || exec.allows_exec()),
    };
    super::control_socket::serve(sockets, proxy, actions)
}

fn show(problems: &Problems) -> Failure {
    list(problems.lines());
    Failure::Failed(problems.summary())
}
