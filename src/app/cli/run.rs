//! `hvsock run` and `hvsock check`: what a file asks for.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;

use super::manager::Manager;
use super::reconciler::RetryThread;
use super::running::{self, Doors, NotStarted, Running};
use super::signals::EndSignals;
use super::summary::Summary;
use super::{Failure, Outcome, complain, list, print, run_until_told, say};
use crate::app::config::{Config, Problems, display_name};
use crate::app::log::LogOptions;
use crate::hyperkit::Places;
#[cfg(unix)]
use crate::proxy::Proxy;

const EXAMPLE: &str = "Example:
  [vm.docker]
  at = \"~/vms/docker\"            # as --vm takes it; left out, it is the VM's name
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
touched, live connections stay, and a file with a mistake in it changes nothing. SIGINT and SIGTERM end as with `expose`."
)]
pub(super) struct Run {
    /// The file, in TOML; - is standard input
    #[arg(value_name = "CONFIG")]
    file: PathBuf,
    #[command(flatten)]
    log: LogOptions,
}

/// Say all that is wrong with such a file, or what it would forward
#[derive(Args, Debug)]
#[command(after_help = EXAMPLE)]
pub(super) struct Check {
    /// The file, in TOML; - is standard input
    #[arg(value_name = "CONFIG")]
    file: PathBuf,
}

impl Check {
    pub(super) fn run(self) -> Outcome {
        let (config, wanted) =
            Config::read(&self.file, &Places::from_env()).map_err(|e| show(&e))?;
        for missing in &wanted.missing {
            complain(running::absence(missing));
        }
        for rule in &wanted.rules {
            let name = rule.name.as_deref().unwrap_or_default();
            let vm = config.vm_of(name);
            print(running::describe(name, &rule.listen, &rule.connect, vm))?;
        }
        let file = display_name(&self.file);
        match wanted.rules.len() {
            1 => print(format_args!("{file} is right: 1 forward")),
            n => print(format_args!("{file} is right: {n} forwards")),
        }
    }
}

impl Run {
    pub(super) fn log(&self) -> LogOptions {
        self.log.clone()
    }

    pub(super) fn run(self) -> Outcome {
        let signals = EndSignals::take_with_reload()?;
        let (proxy, running, doors) = Running::start(&self.file).map_err(|e| match e {
            NotStarted::File(problems) => show(&problems),
            NotStarted::Failed(why) => why,
        })?;
        let running = Arc::new(running);
        #[cfg(unix)]
        let _control = control(&running, doors, &proxy)?;
        #[cfg(not(unix))]
        let Doors = doors;
        running.describe(&[]).iter().for_each(say);
        running.troubles().iter().for_each(complain);
        let [retrying, reloading, asked] = [(); 3].map(|()| Arc::clone(&running));
        let retry = RetryThread::start(
            move || retrying.try_again(),
            move || {
                // It has said what is wrong.
                let _ = reload(&reloading);
            },
        )?;
        let grace = move || asked.grace();
        run_until_told(proxy, signals, grace, retry.reloader())
    }
}

/// Reads the file again, and tells the service manager so.
fn reload(running: &Running) -> Result<Summary, Problems> {
    // At the end there is nothing to be ready for.
    if running.handle().is_stopping() {
        return running.reload();
    }
    Manager::reloading();
    let read = running.reload();
    Manager::ready(running.handle());
    read
}

#[cfg(unix)]
fn control(
    running: &Arc<Running>,
    doors: Doors,
    proxy: &Proxy,
) -> crate::Result<crate::app::control::Control> {
    use crate::app::control::{Actions, Problem};
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
        reload: Some(Box::new(move || match reload(&read) {
            Ok(summary) => {
                serde_json::to_value(summary.report()).map_err(|e| Problem::new(500, e.to_string()))
            }
            Err(problems) => Err(Problem::new(
                400,
                format!("{}; all stays as it was\n{problems}", problems.summary()),
            )),
        })),
        grace: Box::new(move || grace.grace()),
        allows_exec: Box::new(move || exec.allows_exec()),
    };
    super::control::serve(doors, proxy, actions)
}

fn show(problems: &Problems) -> Failure {
    list(problems.lines());
    Failure::Failed(problems.summary())
}
