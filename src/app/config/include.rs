//! Finds the files of `include = ["hvsock.d/*.toml"]`, which have more VMs and forwards.

use std::path::{Path, PathBuf};

use glob::Pattern;

/// Returns the files that match a pattern, sorted by name. A pattern without wildcards must match a
/// file; one with wildcards may match none.
///
/// # Errors
/// Returns what is wrong with the pattern, or with its directory.
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
