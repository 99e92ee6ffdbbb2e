#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use super::*;
use crate::address::Port;

#[test]
fn names_are_hyperkits() {
    let mut vm = HyperkitVm::new("/vm");
    vm.cid = 4;
    assert_eq!(vm.connect_path(), PathBuf::from("/vm/connect"));
    assert_eq!(
        vm.forward_path(Port(80)),
        PathBuf::from("/vm/00000004.00000050")
    );
    assert_eq!(
        vm.guest_link_path(Port(0x5f5)),
        PathBuf::from("/vm/guest.000005f5")
    );
    assert_eq!(
        vm.listen_path(Port(0xF3A5)),
        PathBuf::from("/vm/00000002.0000f3a5")
    );
    assert_eq!(vm.pid_path(), PathBuf::from("/vm/hyperkit.pid"));
    vm.prefix = "@".to_owned();
    assert_eq!(
        vm.forward_path(Port(80)),
        PathBuf::from("/vm/@00000004.00000050")
    );
    assert_eq!(
        vm.guest_link_path(Port(80)),
        PathBuf::from("/vm/guest.00000050")
    );
}

#[test]
fn the_longest_name_fits_behind_the_longest_directory() {
    assert_eq!(MAX_STATE_DIR, 85);
    let vm = HyperkitVm::new("/".repeat(MAX_STATE_DIR - 1) + "d");
    let longest = vm.forward_path(Port(u32::MAX));
    assert_eq!(longest.as_os_str().len() + 1, 104);
}

#[test]
fn a_line_names_what_it_was_made_for() {
    assert_eq!(&connect_line(3, 80), b"00000003.00000050\n");
    assert_eq!(
        parse_connect_line(&connect_line(3, u32::MAX)),
        Some((3, u32::MAX))
    );
    assert_eq!(parse_connect_line(b"00000003 00000050\n"), None);
    assert_eq!(parse_connect_line(b"00000003.00000050 "), None);
}
