//! A network, a `/tmp`, a `/run` and a process table of a test's own: the ports and paths that
//! stand in the guide are free there, and nothing that it starts outlives it.

use std::env;
use std::process::{Command, Stdio};

/// Set inside.
const APART: &str = "HVSOCK_IDIOMS_APART";

const BEGIN: &str = r#"
set -e
ip link set lo up
mount -t tmpfs tmpfs "$BASE"
mkdir "$BASE/bin" "$BASE/h"
touch "$BASE/bin/hvsock" "$BASE/bin/test" "$BASE/hosts"
mount --bind "$HVSOCK" "$BASE/bin/hvsock"
mount --bind "$PROGRAM" "$BASE/bin/test"
echo "127.0.0.1 localhost kms.us-east-1.amazonaws.com" >"$BASE/hosts"
mount --bind "$BASE/hosts" /etc/hosts
mount --rbind "$BASE" /tmp
mount -t tmpfs tmpfs /run
mkdir -m 700 -p /run/user/0
export PATH="/tmp/bin:$PATH" HOME=/tmp/h XDG_RUNTIME_DIR=/run/user/0
unset TMPDIR HVSOCK_LOG MINIKUBE_HOME LISTEN_FDS LISTEN_PID
cd /tmp
exec /tmp/bin/test "$TEST" --exact --nocapture
"#;

/// Returns whether this process is apart already. If not, it runs the test of that name once more,
/// apart, and asserts that it passes.
pub(crate) fn is_apart(test: &str) -> bool {
    if env::var_os(APART).is_some() {
        return true;
    }
    let base = tempfile::tempdir().unwrap();
    let apart = |program: &[&str]| {
        let mut unshare = Command::new("unshare");
        if !nix::unistd::geteuid().is_root() {
            unshare.args(["--user", "--map-root-user"]);
        }
        unshare.args(["--mount", "--net", "--pid", "--fork", "--kill-child"]);
        unshare.arg("--mount-proc").args(program);
        unshare.env(APART, "1").env("TEST", test);
        unshare.env("HVSOCK", env!("CARGO_BIN_EXE_hvsock"));
        unshare.env("PROGRAM", env::current_exe().unwrap());
        unshare.env("BASE", base.path()).stdin(Stdio::null());
        unshare.output()
    };
    if !apart(&["true"]).is_ok_and(|it| it.status.success()) {
        println!("skipped: unshare may not make namespaces here; run as root");
        return false;
    }
    let output = apart(&["timeout", "300", "sh", "-c", BEGIN]).unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{said}");
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{test} has failed: {said}"
    );
    false
}
