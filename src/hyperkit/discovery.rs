//! Finds hyperkit's VMs where the programs that start them keep them.

#[cfg(test)]
mod tests;

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::HyperkitVm;
use super::state;
use crate::address::{Address, UnixAddress};
use crate::error::{Error, Operation, Result};

/// The places where VMs are looked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// The user's home directory: minikube's machines and Docker Desktop's container are below it.
    pub home: Option<PathBuf>,
    /// `MINIKUBE_HOME`, which moves minikube's directory: itself if it is named `.minikube`, else
    /// the `.minikube` in it.
    pub minikube_home: Option<PathBuf>,
    /// Where linuxkit keeps its `NAME-state`, and what relative paths start from.
    pub current_dir: PathBuf,
}

impl Places {
    /// Returns the places of this process: `HOME`, `MINIKUBE_HOME` and the current directory.
    pub fn from_env() -> Places {
        let var = |name| {
            std::env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        Places {
            home: var("HOME"),
            minikube_home: var("MINIKUBE_HOME"),
            current_dir: std::env::current_dir().unwrap_or_else(|_| PathBuf::from(".")),
        }
    }

    /// Returns where minikube keeps its machines, `machines/NAME`.
    fn minikube(&self) -> Option<PathBuf> {
        let dir = match (&self.minikube_home, &self.home) {
            (Some(dir), _) if dir.file_name() == Some(OsStr::new(".minikube")) => dir.clone(),
            (Some(dir), _) | (None, Some(dir)) => dir.join(".minikube"),
            (None, None) => return None,
        };
        Some(dir.join("machines"))
    }

    /// Returns Docker Desktop's state directories, the newest version's first.
    fn docker(&self) -> Vec<PathBuf> {
        let data = self
            .home
            .as_ref()
            .map(|home| home.join("Library/Containers/com.docker.docker/Data"));
        data.map_or(Vec::new(), |data| {
            vec![
                data.join("vms/0"),
                data.join("com.docker.driver.amd64-linux"),
                data,
            ]
        })
    }
}

/// Which program keeps a VM where it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Source {
    /// A machine of minikube.
    Minikube,
    /// Docker Desktop's VM, named `docker`.
    Docker,
    /// linuxkit's `NAME-state` in the current directory.
    Linuxkit,
    /// Any other directory in the current one, or itself, with a `hyperkit.json`.
    HyperkitJson,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Source::Minikube => "minikube",
            Source::Docker => "docker",
            Source::Linuxkit => "linuxkit",
            Source::HyperkitJson => "hyperkit.json",
        })
    }
}

/// A VM that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// The name by which [`find`] finds it.
    pub name: String,
    /// The program that keeps it.
    pub source: Source,
    /// The VM itself.
    pub vm: HyperkitVm,
    /// Whether the process named by its `hyperkit.pid` lives. No socket was touched for it.
    pub running: bool,
}

/// Returns the VMs at these places, by name within each place. VMs that can't be read are left out;
/// [`find`] says why.
pub fn discover(places: &Places) -> Vec<Discovered> {
    Search::run(places).found
}

/// What a search of all places has found.
#[cfg(feature = "cli")]
pub(crate) struct Survey {
    pub(crate) found: Vec<Discovered>,
    /// The places, each with a note.
    pub(crate) looked: Vec<String>,
    /// One of them may not be read.
    pub(crate) denied: bool,
}

/// Searches as [`discover`] does, and keeps what was seen at each place.
#[cfg(feature = "cli")]
pub(crate) fn survey(places: &Places) -> Survey {
    let search = Search::run(places);
    Survey {
        found: search.found,
        looked: search.looked,
        denied: search.denied,
    }
}

/// Returns the VM that a person means by `vm`, the first of these that it is:
///
/// 1. a `hyperkit://` URI without a port;
/// 2. a path with a `/` in it, or `.` or `..`: a state directory;
/// 3. the name of a directory in the current one in which a hyperkit VM has left something;
/// 4. the name of a VM that [`discover`] finds;
/// 5. the name of any directory in the current one, in which a VM may start later.
///
/// Except by URI, the VM's CID and the place of its sockets come from the directory's
/// `hyperkit.json`.
pub fn find(vm: &str, places: &Places) -> Result<HyperkitVm> {
    let scheme = vm.split_once("://").map_or("", |(scheme, _)| scheme);
    if !scheme.is_empty()
        && scheme
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '-')
    {
        return vm
            .parse()
            .map_err(|error| failed(vm, io::ErrorKind::InvalidInput, error));
    }
    if vm.is_empty() {
        return Err(failed(vm, io::ErrorKind::InvalidInput, "no VM is named")
            .with_remedy("give a VM's name or its state directory"));
    }
    let dir = clean(&places.current_dir.join(vm));
    if vm.starts_with("~/") && !dir.exists() {
        let why = "there is no directory of this name here";
        return Err(failed(vm, io::ErrorKind::InvalidInput, why)
            .with_remedy("~ is filled in by the shell, at the start of a word that is not in quotes: write the whole path"));
    }
    if vm.contains(std::path::is_separator) || vm == "." || vm == ".." {
        return from_dir(vm, &dir);
    }
    if state::holds_vm(&dir) {
        return from_dir(vm, &dir);
    }
    let search = Search::run(places);
    let mut named = search.dirs.iter().filter(|(name, _)| name == vm);
    match (named.next(), named.next()) {
        (None, _) if dir.is_dir() => from_dir(vm, &dir),
        (None, _) => Err(search.not_found(vm)),
        (Some((_, dir)), None) => from_dir(vm, dir),
        (Some((_, one)), Some((_, other))) => {
            let why = format!("{one:?} and {other:?} have this name");
            Err(failed(vm, io::ErrorKind::InvalidInput, why)
                .with_remedy("give the directory instead of the name"))
        }
    }
}

fn failed(vm: &str, kind: io::ErrorKind, why: impl fmt::Display) -> Error {
    Error::new(
        Operation::Find,
        format_args!("VM {vm:?}"),
        io::Error::new(kind, why.to_string()),
    )
}

/// The remedy where a file is named as a state directory.
pub(crate) const NO_DIRECTORY: &str =
    "give the VM's state directory; the socket of a VMM is given as vsock-mux:///PATH";

/// Returns the URI of a VM behind its VMM's socket.
pub(crate) fn uri_of_vmm(socket: &Path) -> String {
    let address = Address::Unix(UnixAddress::Path(socket.to_owned())).to_string();
    // Both are written alike but for the scheme.
    let path = address.strip_prefix("unix:").unwrap_or(&address);
    format!("vsock-mux:{path}")
}

/// Returns whether there is a socket at a path.
#[cfg_attr(not(unix), allow(unused_variables))]
fn is_socket(path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        path.metadata().is_ok_and(|it| it.file_type().is_socket())
    }
    #[cfg(not(unix))]
    false
}

/// Returns the VM of a state directory.
fn from_dir(vm: &str, dir: &Path) -> Result<HyperkitVm> {
    let state = state::read(dir).map_err(|why| {
        if is_socket(dir) {
            return failed(vm, why.kind(), format!("{dir:?} is a socket"))
                .with_remedy(format!("if it is a VMM's, write {}", uri_of_vmm(dir)));
        }
        let remedy = match why.kind() {
            io::ErrorKind::NotFound => "start the VM first, or see that the path is right",
            io::ErrorKind::PermissionDenied => "run as the VM's user, or let this one read it",
            io::ErrorKind::InvalidData
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::IsADirectory => "name the VM by hyperkit:// to do without the file",
            _ => NO_DIRECTORY,
        };
        // The error of a file in the directory names the file.
        let why_text = match why.get_ref() {
            Some(inner) => inner.to_string(),
            None => format!("{dir:?}: {why}"),
        };
        failed(vm, why.kind(), why_text).with_remedy(remedy)
    })?;
    if state.without_vsock {
        let why = format!(
            "{:?} says that it has no vsock device",
            dir.join(state::JSON_NAME)
        );
        return Err(failed(vm, io::ErrorKind::Unsupported, why).with_remedy(
            "start it with one (minikube start --driver=hyperkit --hyperkit-vsock-ports=PORT)",
        ));
    }
    Ok(state.vm)
}

/// A search of all places.
#[derive(Default)]
struct Search {
    found: Vec<Discovered>,
    /// Names and state directories, also of VMs whose state can't be read.
    dirs: Vec<(String, PathBuf)>,
    /// The places, each with a note.
    looked: Vec<String>,
    denied: bool,
}

impl Search {
    fn run(places: &Places) -> Search {
        let mut search = Search::default();
        if let Some(machines) = places.minikube() {
            for dir in search.list(&machines) {
                if state::holds_vm(&dir) {
                    search.add(name_of(&dir), Source::Minikube, &dir);
                } else if let Some(driver) = state::driver(&dir) {
                    let name = name_of(&dir);
                    search.note(&dir, format!("{name} runs on {driver}"));
                }
            }
        }
        let docker = places.docker();
        match docker.iter().find(|dir| state::holds_vm(dir)) {
            Some(dir) => search.add("docker".to_owned(), Source::Docker, dir),
            None => {
                for dir in docker {
                    search.list(&dir);
                }
            }
        }
        if state::has_json(&places.current_dir) {
            let dir = &places.current_dir;
            search.add(name_of(dir), Source::HyperkitJson, dir);
        }
        for dir in search.list(&places.current_dir) {
            let name = name_of(&dir);
            match name.strip_suffix("-state") {
                Some(name) if !name.is_empty() && state::holds_vm(&dir) => {
                    search.add(name.to_owned(), Source::Linuxkit, &dir);
                }
                _ if state::has_json(&dir) => search.add(name, Source::HyperkitJson, &dir),
                _ => {}
            }
        }
        search
    }

    /// Returns the directories in `place`, sorted.
    fn list(&mut self, place: &Path) -> Vec<PathBuf> {
        match fs::read_dir(place) {
            Ok(entries) => {
                self.looked.push(format!("{place:?}"));
                let mut dirs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
                dirs.retain(|path| path.is_dir());
                dirs.sort();
                dirs
            }
            Err(why) => {
                self.denied |= why.kind() == io::ErrorKind::PermissionDenied;
                let why = match why.kind() {
                    io::ErrorKind::NotFound => "not there".to_owned(),
                    io::ErrorKind::PermissionDenied => "not readable for this user".to_owned(),
                    _ => why.to_string(),
                };
                self.note(place, why);
                Vec::new()
            }
        }
    }

    fn note(&mut self, place: &Path, note: impl fmt::Display) {
        self.looked.push(format!("{place:?} ({note})"));
    }

    fn add(&mut self, name: String, source: Source, dir: &Path) {
        // The current directory may be one of the other places.
        if self.dirs.iter().any(|(_, known)| known == dir) {
            return;
        }
        match state::read(dir) {
            Ok(state) => self.found.push(Discovered {
                name: name.clone(),
                source,
                vm: state.vm,
                running: state::running_pid(dir).is_some(),
            }),
            Err(why) => self.note(dir, why),
        }
        self.dirs.push((name, dir.to_owned()));
    }

    fn not_found(&self, vm: &str) -> Error {
        let names: Vec<&str> = self.dirs.iter().map(|(name, _)| name.as_str()).collect();
        let hint = match nearest(vm, &names) {
            Some(near) => format!("did you mean {near}? "),
            None => String::new(),
        };
        let why = format!(
            "{hint}no VM has this name; looked in {}; found {}",
            self.looked.join(", "),
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            },
        );
        let (kind, remedy) = if self.denied {
            (
                io::ErrorKind::PermissionDenied,
                "run as the VM's user, or give its state directory",
            )
        } else {
            (
                io::ErrorKind::NotFound,
                "give one of these names, or a state directory (./DIR or an absolute path)",
            )
        };
        failed(vm, kind, why).with_remedy(remedy)
    }
}

/// Returns what a name was probably meant to be.
#[cfg(feature = "cli")]
fn nearest<'a>(name: &str, among: &[&'a str]) -> Option<&'a str> {
    crate::nearest::nearest(name, among.iter().copied())
}

/// Returns none: a program knows what it asks for.
#[cfg(not(feature = "cli"))]
fn nearest<'a>(_: &str, _: &[&'a str]) -> Option<&'a str> {
    None
}

fn name_of(dir: &Path) -> String {
    let name = dir.file_name().unwrap_or(dir.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Returns the path without `.` in it, for every byte of a socket's path counts.
fn clean(path: &Path) -> PathBuf {
    path.components().collect()
}
