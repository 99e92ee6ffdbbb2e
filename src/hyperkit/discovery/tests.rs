#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;

use tempfile::TempDir;

use super::*;
use crate::address::Port;

/// A private home and current directory.
struct World {
    root: TempDir,
    places: Places,
}

impl World {
    fn new() -> World {
        let root = tempfile::tempdir().unwrap();
        let places = Places {
            home: Some(root.path().join("home")),
            minikube_home: None,
            current_dir: root.path().join("here"),
        };
        fs::create_dir(root.path().join("here")).unwrap();
        World { root, places }
    }

    /// With the system's own separators, as messages print it.
    fn path(&self, path: &str) -> PathBuf {
        let mut joined = self.root.path().to_owned();
        joined.extend(path.split('/'));
        joined
    }

    /// Writes a file and makes its directories; the directory's path.
    fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.path(path);
        let dir = path.parent().unwrap().to_owned();
        fs::create_dir_all(&dir).unwrap();
        fs::write(path, text).unwrap();
        dir
    }

    fn find(&self, vm: &str) -> HyperkitVm {
        find(vm, &self.places).unwrap()
    }

    fn error(&self, vm: &str) -> Error {
        find(vm, &self.places).unwrap_err()
    }

    fn found(&self) -> Vec<(String, Source, bool)> {
        let found = discover(&self.places).into_iter();
        found.map(|vm| (vm.name, vm.source, vm.running)).collect()
    }
}

const MACHINES: &str = "home/.minikube/machines";
const DOCKER: &str = "home/Library/Containers/com.docker.docker/Data";

#[test]
fn a_path_is_a_state_directory() {
    let world = World::new();
    let dir = world.write("here/vm/connect", "");
    for vm in ["vm", "./vm", "./vm/.", "../here/../here/vm"] {
        let found = world.find(vm);
        assert_eq!(
            found.state_dir.canonicalize().unwrap(),
            dir.canonicalize().unwrap()
        );
        assert_eq!(found, HyperkitVm::new(&found.state_dir), "{vm}");
    }
    assert_eq!(world.find("./vm").state_dir, dir, "no byte is wasted");
    assert_eq!(world.find(dir.to_str().unwrap()), HyperkitVm::new(&dir));
}

#[test]
fn a_uri_is_taken_as_it_is() {
    let world = World::new();
    let vm = "hyperkit://4/nowhere?connect=@connect";
    assert_eq!(world.find(vm), vm.parse().unwrap());
    let error = world.error("hyperkit://:80/x");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(
        error
            .to_string()
            .contains("a right one: hyperkit:///path/to/state"),
        "{error}"
    );
}

#[test]
fn names_come_from_those_who_start_vms() {
    let world = World::new();
    world.write(&format!("{MACHINES}/minikube/hyperkit.json"), "{}");
    world.write(
        &format!("{MACHINES}/fresh/config.json"),
        r#"{"DriverName": "hyperkit"}"#,
    );
    world.write(
        &format!("{MACHINES}/other/config.json"),
        r#"{"DriverName": "docker"}"#,
    );
    world.write(&format!("{MACHINES}/server.pem"), "");
    world.write(&format!("{DOCKER}/vms/0/connect"), "");
    world.write("here/linux-state/hyperkit.pid", "1");
    world.write("here/mine/hyperkit.json", "{}");
    world.write("here/src/main.rs", "");
    let names: Vec<(String, Source)> = world.found().into_iter().map(|vm| (vm.0, vm.1)).collect();
    let expected = [
        ("fresh", Source::Minikube),
        ("minikube", Source::Minikube),
        ("docker", Source::Docker),
        ("linux", Source::Linuxkit),
        ("mine", Source::HyperkitJson),
    ];
    assert_eq!(
        names,
        expected.map(|(name, source)| (name.to_owned(), source))
    );
    for (name, dir) in [
        ("minikube", format!("{MACHINES}/minikube")),
        ("docker", format!("{DOCKER}/vms/0")),
        ("linux", "here/linux-state".to_owned()),
        ("mine", "here/mine".to_owned()),
    ] {
        assert_eq!(world.find(name).state_dir, world.path(&dir));
    }
}

#[test]
fn minikube_home_moves_minikube() {
    let mut world = World::new();
    let dir = world.write("a/.minikube/machines/m/hyperkit.json", "{}");
    for home in ["a", "a/.minikube"] {
        world.places.minikube_home = Some(world.path(home));
        assert_eq!(world.find("m").state_dir, dir);
    }
}

#[test]
fn an_old_docker_has_other_names() {
    let world = World::new();
    let dir = world.write(&format!("{DOCKER}/@connect"), "");
    let vm = world.find("docker");
    assert_eq!(vm.connect_path(), dir.join("@connect"));
    assert_eq!(vm.listen_path(Port(80)), dir.join("@00000002.00000050"));
    // A newer one that stands beside it is preferred.
    let dir = world.write(&format!("{DOCKER}/vms/0/connect"), "");
    assert_eq!(world.find("docker"), HyperkitVm::new(dir));
}

#[test]
fn hyperkit_json_tells_the_cid_and_where_the_sockets_are() {
    let world = World::new();
    let sockets = world.path("sockets");
    let json = serde_json::json!({"vsock": true, "vsock_dir": sockets, "vsock_guest_cid": 7});
    world.write("here/vm/hyperkit.json", &json.to_string());
    let vm = world.find("vm");
    assert_eq!((vm.state_dir, vm.cid), (sockets, 7));

    for (json, cid, dir) in [
        (r#"{"vsock_guest_cid": 2}"#, 3, "here/vm"),
        (r#"{"vsock_guest_cid": 4294967295}"#, 3, "here/vm"),
        (r#"{"vsock_guest_cid": "7", "vsock_dir": ""}"#, 3, "here/vm"),
        ("[]", 3, "here/vm"),
        (r#"{"vsock_dir": "elsewhere"}"#, 3, "here/vm"),
        (r#"{"vsock_dir": "s", "state_dir": "here/vm"}"#, 3, "s"),
    ] {
        world.write("here/vm/hyperkit.json", json);
        let vm = world.find("vm");
        assert_eq!((vm.cid, vm.state_dir), (cid, world.path(dir)), "{json}");
    }
}

#[test]
fn a_vm_runs_if_its_pid_lives() {
    let world = World::new();
    world.write("here/vm/hyperkit.json", "{}");
    let running = |pid: &str| {
        world.write("here/vm/hyperkit.pid", pid);
        world.found()[0].2
    };
    assert!(!world.found()[0].2);
    // hyperkit.pid elsewhere was copied there.
    assert_eq!(running(&std::process::id().to_string()), cfg!(unix));
    assert_eq!(running("1\n"), cfg!(unix));
    for dead in ["", "0", "-1", "x", "99999999999999999999", "2147483647"] {
        assert!(!running(dead), "{dead}");
    }
}

// Elsewhere a path's text has both kinds of slashes.
#[cfg(unix)]
#[test]
fn who_is_not_found_learns_where_it_was_looked_for() {
    let world = World::new();
    world.write(&format!("{MACHINES}/minikube/hyperkit.json"), "{}");
    world.write(
        &format!("{MACHINES}/other/config.json"),
        r#"{"DriverName": "docker"}"#,
    );
    let error = world.error("vm\u{1b}");
    assert_eq!(error.kind(), ErrorKind::NotFound);
    let machines = world.path(MACHINES);
    assert_eq!(
        error.to_string(),
        format!(
            r#"cannot find VM "vm\u{{1b}}": no VM has this name; looked in {machines:?}, {:?} (other runs on docker), {:?}, nothing is at 3 other places; found minikube; give one of these names, or a state directory (./DIR or an absolute path)"#,
            machines.join("other"),
            world.path("here"),
        )
    );
}

#[test]
fn a_path_that_is_no_directory_says_so() {
    let world = World::new();
    let absent = world.error("./absent");
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    assert!(
        absent
            .to_string()
            .contains(&format!("{:?}", world.path("here/absent"))),
        "{absent}"
    );
    world.write("here/file", "");
    assert_eq!(world.error("./file").kind(), ErrorKind::NotADirectory);
    assert_eq!(world.error("").kind(), ErrorKind::InvalidInput);
}

#[test]
fn a_name_of_two_vms_is_refused() {
    let world = World::new();
    world.write(&format!("{MACHINES}/vm/hyperkit.json"), "{}");
    world.write("here/vm-state/hyperkit.json", "{}");
    let error = world.error("vm");
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert_eq!(
        error.remedy(),
        Some("give the directory instead of the name")
    );
}

#[test]
fn a_directory_of_the_same_name_does_not_hide_a_vm() {
    let world = World::new();
    let vm = world.write(&format!("{MACHINES}/vm/hyperkit.json"), "{}");
    world.write("here/vm/main.rs", "");
    world.write("here/empty/main.rs", "");
    assert_eq!(world.find("vm").state_dir, vm);
    assert_eq!(world.find("empty").state_dir, world.path("here/empty"));
}

#[test]
fn a_broken_hyperkit_json_is_named() {
    let world = World::new();
    let dir = world.write("here/vm/hyperkit.json", "{");
    let error = world.error("vm");
    assert_eq!(error.kind(), ErrorKind::InvalidData);
    let file = format!("{:?}", dir.join("hyperkit.json"));
    assert_eq!(error.to_string().matches(&file).count(), 1, "{error}");
    assert!(discover(&world.places).is_empty());
}

#[test]
fn a_vm_without_vsock_says_so() {
    let world = World::new();
    world.write("here/vm/hyperkit.json", r#"{"vsock": false}"#);
    assert_eq!(world.error("vm").kind(), ErrorKind::Unsupported);
    world.write("here/vm/connect", "");
    assert_eq!(world.find("vm").state_dir, world.path("here/vm"));
}

#[cfg(unix)]
#[test]
fn unreadable_is_told_apart_from_absent() {
    use std::os::unix::fs::PermissionsExt;
    if nix::unistd::geteuid().is_root() {
        eprintln!("skipped: root reads everything; run the tests as another user");
        return;
    }
    let close = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let world = World::new();
    let dir = world.write(&format!("{MACHINES}/vm/hyperkit.json"), "{}");
    close(&dir, 0o000);
    assert_eq!(world.error("vm").kind(), ErrorKind::PermissionDenied);
    close(&dir, 0o700);
    close(&world.path(MACHINES), 0o000);
    let error = world.error("vm");
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
    assert!(
        error.to_string().contains("not readable for this user"),
        "{error}"
    );
    close(&world.path(MACHINES), 0o700);
}
