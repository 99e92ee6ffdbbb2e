//! What a file needs that isn't there: directories, files, addresses of this host. Most of it may come
//! later, so `hvsock run` takes the file, and tries again.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::{IpAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use super::forward::Forward;
use super::problems::{Line, Problem, Weight};
use super::{Config, Wanted};
use crate::address::{Address, UnixAddress};

/// A directory that is needed.
enum Directory {
    /// As far as can be known.
    IsThere,
    IsMissing {
        path: PathBuf,
        /// The nearest one above it that is there.
        nearest: PathBuf,
    },
    /// What is in its place, or in that of one above it.
    CanNotBe(PathBuf),
}

impl Directory {
    fn look_at(path: &Path) -> Directory {
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => Directory::IsThere,
            Ok(_) => Directory::CanNotBe(path.to_owned()),
            Err(e) if is_missing(&e) => match nearest(path) {
                Some((nearest, true)) => Directory::IsMissing {
                    path: path.to_owned(),
                    nearest: nearest.to_owned(),
                },
                Some((nearest, false)) => Directory::CanNotBe(nearest.to_owned()),
                None => Directory::IsThere,
            },
            Err(_) => Directory::IsThere,
        }
    }

    /// The one in which a file is.
    fn of(file: &Path) -> Directory {
        match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => Directory::look_at(parent),
            _ => Directory::IsThere,
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    let kinds = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
    kinds.contains(&error.kind())
}

/// Returns the nearest path above one that is there, and whether it is a directory.
fn nearest(path: &Path) -> Option<(&Path, bool)> {
    let mut above = path.ancestors().skip(1);
    above.find_map(|it| Some((it, fs::metadata(it).ok()?.is_dir())))
}

/// Returns the nearest directory above a path that is there.
#[cfg(unix)]
pub(crate) fn nearest_directory(path: &Path) -> Option<&Path> {
    nearest(path)
        .filter(|(_, is_directory)| *is_directory)
        .map(|(path, _)| path)
}

/// How long the files that forwards need may take to be looked at.
const PATIENCE: Duration = Duration::from_secs(3);

impl Config {
    /// Looks at what is needed, on a thread of its own: where a disk hangs, what is on others is carried
    /// all the same.
    pub(super) fn needs(&self, wanted: &Wanted) -> Vec<Problem> {
        let (config, wanted) = (self.clone(), wanted.clone());
        let (looking, looked) = channel();
        let look = move || {
            // Nobody may wait for it any more.
            let _ = looking.send(config.look_at_needs(&wanted));
        };
        let thread = thread::Builder::new().name("hvsock-needs".to_owned());
        let failure = thread.spawn(look).err();
        looked.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            let why = match failure {
                Some(e) => format!("no thread can be started: {e}"),
                None => "a file system takes long".to_owned(),
            };
            vec![Problem {
                line: None,
                text: format!("what its forwards need was not looked at: {why}"),
                weight: Weight::Note,
            }]
        })
    }

    /// Returns what is needed and isn't there, as notes; and as mistakes what can never be.
    fn look_at_needs(&self, wanted: &Wanted) -> Vec<Problem> {
        let mut needs = Needs::default();
        let forwards = self.forwards.iter().map(|it| (it.name.as_str(), it));
        let forwards: HashMap<&str, &Forward> = forwards.collect();
        for missing in &wanted.missing {
            let vm = self.vms.iter().find(|vm| vm.name == missing.name);
            let line = vm.map(|vm| vm.line.clone());
            let nearest = nearest(&missing.vm.state_dir);
            let nearest = nearest.map(|(path, _)| format!(" (there is {})", path.display()));
            let text = format!(
                "VM {:?} is not there yet: {}{}; until then its clients are refused",
                missing.name,
                missing.why,
                nearest.unwrap_or_default()
            );
            needs.add(line, Weight::Note, text);
        }
        for rule in &wanted.rules {
            let name = rule.name.as_deref().unwrap_or_default();
            let Some(forward) = forwards.get(name) else {
                continue;
            };
            needs.look_at_listen(forward, &rule.listen);
            needs.look_at_connect(forward, &rule.connect);
        }
        if let Some(path) = &self.control
            && let Some(directory) = path.parent()
        {
            // The directory itself is made.
            needs.look_at_directory("control", None, Directory::of(directory));
        }
        needs.list
    }
}

#[derive(Default)]
struct Needs {
    list: Vec<Problem>,
    /// Addresses, and whether each is one of this host.
    known: HashMap<IpAddr, bool>,
}

impl Needs {
    fn add(&mut self, line: Option<Line>, weight: Weight, text: String) {
        self.list.push(Problem { line, text, weight });
    }

    /// Says what is wrong with the directory of a file that is to be in it. Returns whether it is there.
    fn look_at_directory(&mut self, whose: &str, line: Option<&Line>, it: Directory) -> bool {
        let line = line.cloned();
        match it {
            Directory::IsThere => return true,
            Directory::IsMissing { path, nearest } => {
                let text = format!(
                    "{whose}: there is no directory {} yet (there is {}); make it, or is the path right?",
                    path.display(),
                    nearest.display()
                );
                self.add(line, Weight::Note, text);
            }
            Directory::CanNotBe(path) => {
                let text = format!(
                    "{whose}: {} is no directory; choose another path",
                    path.display()
                );
                self.add(line, Weight::Mistake, text);
            }
        }
        false
    }

    fn look_at_listen(&mut self, forward: &Forward, listen: &Address) {
        let (name, line) = (&forward.name, &forward.listen_line);
        let whose = format!("[forward.{name}]: {listen}");
        match listen {
            Address::Unix(UnixAddress::Path(path)) => {
                let directory = Directory::of(path);
                if self.look_at_directory(&whose, Some(line), directory)
                    && let Ok(found) = fs::symlink_metadata(path)
                    && (found.is_file() || found.is_dir())
                {
                    let kind = if found.is_dir() { "directory" } else { "file" };
                    let text = format!(
                        "{whose}: a {kind} is there; remove it, or choose another path for the socket"
                    );
                    self.add(Some(line.clone()), Weight::Mistake, text);
                }
            }
            Address::VsockMux(mux) => {
                self.look_at_directory(&whose, Some(line), Directory::of(&mux.path));
            }
            Address::Tcp(tcp) => {
                let ip = tcp.socket_addr().map(|it| it.ip());
                let known = &mut self.known;
                let mut is_here = |ip| *known.entry(ip).or_insert_with(|| is_of_this_host(ip));
                if let Some(ip) = ip.filter(|ip| !is_here(*ip)) {
                    let text = format!(
                        "[forward.{name}]: {ip} is no address of this host now; choose another, or it can't be listened on until it is"
                    );
                    self.add(Some(line.clone()), Weight::Note, text);
                }
            }
            _ => {}
        }
    }

    fn look_at_connect(&mut self, forward: &Forward, connect: &Address) {
        let line = &forward.connect_line;
        let whose = format!("[forward.{}]: {connect}", forward.name);
        let path = match connect {
            Address::Unix(UnixAddress::Path(path)) => {
                self.look_at_directory(&whose, Some(line), Directory::of(path));
                return;
            }
            Address::File(file) => &file.path,
            Address::Exec(exec) => &exec.program,
            _ => return,
        };
        if !self.look_at_directory(&whose, Some(line), Directory::of(path)) {
            return;
        }
        match fs::metadata(path) {
            Ok(found) if found.is_dir() => {
                let text = format!("{whose}: it is a directory; name a file in it");
                self.add(Some(line.clone()), Weight::Mistake, text);
            }
            Err(e) if is_missing(&e) => {
                let text = format!("{whose}: it is not there; its clients are refused until it is");
                self.add(Some(line.clone()), Weight::Note, text);
            }
            _ => {}
        }
    }
}

/// Returns whether an address can be listened on here, as far as is known.
fn is_of_this_host(ip: IpAddr) -> bool {
    match TcpListener::bind((ip, 0)) {
        Err(e) => e.kind() != io::ErrorKind::AddrNotAvailable,
        Ok(_) => true,
    }
}
