//! Replaces `${NAME}` in the file's strings by environment variables.

use std::env::{self, VarError};

/// Returns whether [`fill`] would replace anything in a string.
pub(super) fn has_variable(text: &str) -> bool {
    text.replace("$$", "").contains("${")
}

/// Replaces environment variables in a string: `${NAME}`, or `${NAME:-DEFAULT}` if the variable may
/// be unset or empty. `$$` is a dollar sign.
///
/// # Errors
/// Returns which variable is not set, or what is wrong with the string.
pub(super) fn fill(text: &str) -> Result<String, String> {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        filled += before;
        if let Some(after) = after.strip_prefix('$') {
            filled.push('$');
            rest = after;
            continue;
        }
        let Some(inner) = after.strip_prefix('{') else {
            filled.push('$');
            rest = after;
            continue;
        };
        let (inner, after) = inner
            .split_once('}')
            .ok_or_else(|| format!("{text:?}: the }} of ${{ is missing; $$ is a dollar sign"))?;
        filled += &variable(inner)?;
        rest = after;
    }
    filled += rest;
    Ok(filled)
}

/// Returns the value of `NAME` or `NAME:-DEFAULT`.
fn variable(inner: &str) -> Result<String, String> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let is_in_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(is_in_name) {
        return Err(format!(
            "{inner:?} is no variable's name; write ${{NAME}} or ${{NAME:-DEFAULT}}, and $$ for a dollar sign"
        ));
    }
    match (env::var(name), default) {
        (Ok(value), None) => Ok(value),
        (Ok(value), Some(_)) if !value.is_empty() => Ok(value),
        (Ok(_) | Err(VarError::NotPresent), Some(default)) => Ok(default.to_owned()),
        (Err(VarError::NotPresent), None) => Err(format!(
            "${{{name}}} is not set; set it, or write ${{{name}:-DEFAULT}}"
        )),
        (Err(VarError::NotUnicode(_)), _) => Err(format!("${{{name}}} is no UTF-8")),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A variable that all systems have.
    const SET: &str = "PATH";

    #[test]
    fn variables_and_defaults_stand_in_strings() {
        let set = env::var(SET).unwrap();
        for (text, right) in [
            ("plain $ and $5 and $", "plain $ and $5 and $".to_owned()),
            ("$${PATH} $$", "${PATH} $".to_owned()),
            ("/a/${PATH}/b", format!("/a/{set}/b")),
            (
                "${HVSOCK_UNSET:-/run/s}:${HVSOCK_UNSET:-}",
                "/run/s:".to_owned(),
            ),
        ] {
            assert_eq!(fill(text).unwrap(), right, "{text}");
        }
        for (text, has) in [("$${PATH}", false), ("$", false), ("a${PATH}", true)] {
            assert_eq!(has_variable(text), has, "{text}");
        }
    }

    #[test]
    fn what_is_no_variable_is_told() {
        for (text, part) in [
            ("${HVSOCK_UNSET}", "${HVSOCK_UNSET} is not set"),
            ("${HVSOCK_UNSET", "is missing"),
            ("${}", "no variable's name"),
            ("${a b}", "no variable's name"),
        ] {
            let why = fill(text).unwrap_err();
            assert!(why.contains(part), "{text}: {why}");
        }
    }
}
