//! `hvsock demo`: shows the main job with nothing to prepare.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::console::say;
use super::ending::{log_start, run_proxy};
use super::options::ProxyOptions;
use super::outcome::Outcome;
use super::passed::start;
use super::signals::EndSignals;
use crate::address::{Address, HyperkitAddress, Port, UnixAddress};
use crate::error::{Error, Operation};
use crate::proxy::Rule;
use crate::simulate::{Service, Vm};

/// The guest's port in the demo.
const WEB: Port = Port(80);

/// The longest directory of temporary files, in bytes, in which a state directory fits: its path
/// may have 85 bytes, of which `/hvsock-demo-XXXXXX/vm` takes 22. macOS' own is often longer.
const LONGEST: usize = 85 - 22;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// Show it all on a stand-in VM with a web server: exposed on TCP and on a Unix socket until Ctrl-C
#[derive(Args, Debug)]
pub(super) struct DemoArgs {
    /// TCP port of 127.0.0.1 to expose the guest's web server on; 0 is chosen
    #[arg(long, value_name = "PORT", default_value_t = 0, value_parser = crate::app::values::number(0..=u16::MAX))]
    port: u16,
    #[command(flatten)]
    options: ProxyOptions,
}

impl DemoArgs {
    pub(super) fn run(self) -> Outcome {
        let signals = EndSignals::take()?;
        let mut temporary = std::env::temp_dir();
        if temporary.as_os_str().len() > LONGEST {
            temporary = "/tmp".into();
        }
        let directory = tempfile::Builder::new()
            .prefix("hvsock-demo-")
            .tempdir_in(&temporary)
            .map_err(|e| {
                let vm = format!("a VM in {}", temporary.display());
                Error::new(Operation::Run, vm, e)
            })?;
        let state = directory.path().join("vm");
        std::fs::create_dir(&state)?;
        let vm = Vm::builder(&state).guest(WEB.0, Service::Http).start()?;
        say(format_args!(
            "a stand-in VM in {}, with a web server on its vsock port {WEB}",
            state.display()
        ));

        let socket = directory.path().join("web.sock");
        let web = Address::from(HyperkitAddress::new(&state, WEB));
        let tcp: Address = format!("tcp://127.0.0.1:{}", self.port).parse()?;
        let unix = UnixAddress::Path(socket.clone()).into();
        let rules = [Rule::new(tcp, web.clone()), Rule::new(unix, web)];
        let proxy = start(self.options.config(rules))?;
        log_start(&proxy);
        let forwards = proxy.forwards();
        for forward in &forwards {
            say(format_args!("{} -> guest port {WEB}", forward.listen));
        }
        let Some(tcp) = forwards[0].listen.as_tcp() else {
            return Ok(());
        };

        let through_tcp = ask_tcp(tcp.port)
            .map_err(|e| Error::new(Operation::Connect, &forwards[0].listen, e))?;
        say(format_args!("GET / through TCP:            {through_tcp}"));
        let through_unix = ask_unix(&socket)
            .map_err(|e| Error::new(Operation::Connect, &forwards[1].listen, e))?;
        say(format_args!(
            "GET / through the Unix socket: {through_unix}"
        ));
        say("");
        say(format_args!("Try it:  curl http://127.0.0.1:{}/", tcp.port));
        say(format_args!(
            "         curl --unix-socket {} http://guest/",
            socket.display()
        ));
        say("Ctrl-C ends it.");

        let ended = run_proxy(proxy, &self.options, signals);
        vm.stop();
        remove_directory(directory.path());
        ended
    }
}

/// Removes a directory in which the VM's keeper, that ends now, may just make or remove a file.
fn remove_directory(path: &Path) {
    const TRIES: u32 = 50;
    const PAUSE: Duration = Duration::from_millis(20);
    for _ in 0..TRIES {
        match std::fs::remove_dir_all(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => std::thread::sleep(PAUSE),
            _ => return,
        }
    }
}

fn ask_tcp(port: u16) -> io::Result<String> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(stream)
}

fn ask_unix(path: &Path) -> io::Result<String> {
    let stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(stream)
}

/// Requests a page, and returns the first line of the answer and its size in bytes.
fn ask(mut stream: impl Read + Write) -> io::Result<String> {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: guest\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer.lines().next().unwrap_or("no answer");
    Ok(format!("{status}, {} bytes", answer.len()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    use std::fs::{File, create_dir, remove_file};
    use std::sync::atomic::{AtomicBool, Ordering};

    /// As the keeper's status socket, in a moment between the look into the directory and its
    /// removal.
    #[test]
    fn a_directory_in_which_files_are_made_meanwhile_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("vm");
        for _ in 0..200 {
            create_dir(&path).unwrap();
            let has_begun = AtomicBool::new(false);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    for number in 0..200 {
                        let _ = File::create(path.join(number.to_string()));
                        has_begun.store(true, Ordering::Release);
                        let _ = remove_file(path.join((number / 2).to_string()));
                    }
                });
                while !has_begun.load(Ordering::Acquire) {
                    std::hint::spin_loop();
                }
                remove_directory(&path);
            });
            assert!(!path.exists());
        }
    }
}
