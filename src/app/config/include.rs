//! `include = ["hvsock.d/*.toml"]`: other files with VMs and forwards.

use std::path::{Path, PathBuf};

use glob::Pattern;

/// Returns the files that a pattern stands for, in the order of their names. One that has no
/// wildcard must be there; of one that has, none may be.
///
/// # Errors
/// Returns what is wrong with the pattern, or with a directory that it names.
pub(super) fn find(pattern: &str, directory: &Path) -> Result<Vec<PathBuf>, String> {
    if !pattern.contains(['*', '?', '[']) {
        return Ok(vec![directory.join(pattern)]);
    }
    let directory = directory
        .to_str()
        .ok_or("its directory's name is no UTF-8")?;
    let whole = match Path::new(pattern).is_absolute() || directory.is_empty() {
        true => pattern.to_owned(),
        false => format!("{}/{pattern}", Pattern::escape(directory)),
    };
    let found = glob::glob(&whole).map_err(|e| format!("{pattern:?} is no pattern: {e}"))?;
    found
        .collect::<Result<_, _>>()
        .map_err(|e| format!("{}: {}", e.path().display(), e.error()))
}
