//! The running keepers: the hvsock of each, and its VMs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::app::control::Status;
use crate::hyperkit::{self, Places};
use crate::keeper::status::query;

/// A keeper, and the state directories of its VMs.
pub(super) struct Known {
    keeper: u32,
    proxy: u32,
    proxy_ended: bool,
    directories: Vec<PathBuf>,
}

/// Finds the keepers of these hvsocks, and other keepers that can be found.
pub(super) fn find(hvsocks: &[&Status]) -> Vec<Known> {
    let led_to = hvsocks.iter().flat_map(|it| {
        let vms = it.vms().into_iter();
        vms.map(|vm| PathBuf::from(&vm.directory))
    });
    let survey = hyperkit::survey(&Places::from_env()).found.into_iter();
    let directories = led_to
        .chain(survey.map(|it| it.vm.state_dir))
        .chain(directories_by_sockets());
    // The same directory may be spelled in several ways.
    let directories: BTreeSet<PathBuf> = directories
        .filter_map(|directory| directory.canonicalize().ok())
        .collect();
    let mut known: Vec<Known> = Vec::new();
    for directory in directories {
        for status in query(&directory) {
            match known.iter_mut().find(|it| it.keeper == status.pid) {
                Some(it) => it.directories.push(directory.clone()),
                None => known.push(Known {
                    keeper: status.pid,
                    proxy: status.proxy,
                    proxy_ended: status.proxy_ended,
                    directories: vec![directory.clone()],
                }),
            }
        }
    }
    // Adds keepers whose VMs are not there yet.
    for hvsock in hvsocks {
        let keeper = hvsock.keeper.as_ref().and_then(|it| it.pid);
        if let Some(keeper) = keeper
            && known.iter().all(|it| it.keeper != keeper)
        {
            known.push(Known {
                keeper,
                proxy: hvsock.pid,
                proxy_ended: false,
                directories: Vec::new(),
            });
        }
    }
    known
}

/// Returns the directories in which keepers can be asked, by Linux' list of Unix sockets.
fn directories_by_sockets() -> Vec<PathBuf> {
    let list = std::fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let paths = list.lines().filter_map(|line| {
        let path = Path::new(&line[line.find('/')?..]);
        let name = path.file_name()?.to_str()?;
        name.starts_with("hvsock-keeper.")
            .then(|| path.parent().map(Path::to_owned))?
    });
    paths.collect()
}

/// Describes a keeper by its hvsock: `keeper of 2105 (VM /path)`.
pub(super) fn describe(process: u32, known: &[Known]) -> String {
    let Some(it) = known.iter().find(|it| it.keeper == process) else {
        return "keeper, of an hvsock that can't be found".to_owned();
    };
    let directories = it.directories.iter();
    let vms: Vec<String> = directories.map(|it| it.display().to_string()).collect();
    let vms = match vms.is_empty() {
        true => String::new(),
        false => format!(" (VM {})", vms.join(", ")),
    };
    let proxy = it.proxy;
    match it.proxy_ended {
        false => format!("keeper of {proxy}{vms}"),
        true => format!("keeper of {proxy}, which has ended: waits for a successor{vms}"),
    }
}
