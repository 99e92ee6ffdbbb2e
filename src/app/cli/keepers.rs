//! The keepers that run: of which hvsock each is, and of which VMs.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::app::control::Status;
use crate::hyperkit::{self, Places};
use crate::keeper::status::{KeeperStatus, query};

/// A keeper, and the state directories of its VMs.
pub(super) struct Known {
    status: KeeperStatus,
    directories: Vec<PathBuf>,
}

/// Finds the keepers of the VMs that these hvsocks lead to, and of others that can be found.
pub(super) fn find<'a>(hvsocks: impl Iterator<Item = &'a Status>) -> Vec<Known> {
    let led_to = hvsocks.flat_map(|it| {
        let vms = it.vms().into_iter();
        vms.map(|vm| PathBuf::from(&vm.directory))
    });
    let survey = hyperkit::survey(&Places::from_env()).found.into_iter();
    let directories = led_to
        .chain(survey.map(|it| it.vm.state_dir))
        .chain(directories_by_sockets());
    // However they are spelled.
    let directories: BTreeSet<PathBuf> = directories
        .filter_map(|directory| directory.canonicalize().ok())
        .collect();
    let mut known: Vec<Known> = Vec::new();
    for directory in directories {
        for status in query(&directory) {
            match known.iter_mut().find(|it| it.status.pid == status.pid) {
                Some(it) => it.directories.push(directory.clone()),
                None => known.push(Known {
                    status,
                    directories: vec![directory.clone()],
                }),
            }
        }
    }
    known
}

/// Returns the directories in which keepers can be asked, as far as Linux' list of sockets tells.
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

/// Says whose a keeper is: `keeper of 2105 (VM /path)`.
pub(super) fn describe(process: u32, known: &[Known]) -> String {
    let Some(Known {
        status,
        directories,
    }) = known.iter().find(|it| it.status.pid == process)
    else {
        return "keeper, of an hvsock that can't be found".to_owned();
    };
    let vms: Vec<String> = directories
        .iter()
        .map(|it| it.display().to_string())
        .collect();
    let (proxy, vms) = (status.proxy, vms.join(", "));
    match status.proxy_ended {
        false => format!("keeper of {proxy} (VM {vms})"),
        true => format!("keeper of {proxy}, which has ended: waits for a successor (VM {vms})"),
    }
}
