//! Filters of log lines: levels, for the whole program or for parts of it.

use tracing_subscriber::filter::{Directive, EnvFilter, LevelFilter};

/// The parts of the program that users can name, with their modules.
const PARTS: [(&str, &[&str]); 6] = [
    ("access", &["hvsock::access"]),
    (
        "connection",
        &["hvsock::engine::connection", "hvsock::proxy::relay_threads"],
    ),
    ("control", &["hvsock::app::control"]),
    (
        "listener",
        &["hvsock::proxy::listeners", "hvsock::listener"],
    ),
    ("syslog", &["hvsock::app::syslog"]),
    ("vm", &["hvsock::engine::health"]),
];

/// Returns the default filter: level info.
pub(super) fn default_filter() -> EnvFilter {
    EnvFilter::default().add_directive(LevelFilter::INFO.into())
}

/// Parses a filter: a level, or several directives of tracing's [`EnvFilter`], whose targets may be
/// [`PARTS`] (`info,connection=debug`). An empty text is level info.
///
/// # Errors
/// Returns which word is wrong, and the valid ones.
pub(super) fn parse(text: &str) -> Result<EnvFilter, String> {
    let mut filter = default_filter();
    let words = text.split(',').map(str::trim);
    for word in words.filter(|word| !word.is_empty()) {
        for directive in directives(word)? {
            filter = filter.add_directive(directive);
        }
    }
    Ok(filter)
}

fn directives(word: &str) -> Result<Vec<Directive>, String> {
    let (target, level) = match word.split_once('=') {
        // EnvFilter takes any word for a target: a misspelt level would turn off all other lines.
        None if word.parse::<LevelFilter>().is_ok() => return Ok(vec![directive(word, word)?]),
        None => (word, "trace"),
        Some((target, level)) => (target, level),
    };
    // A span's name, or fields, may follow in brackets.
    let (name, rest) = target.split_at(target.find('[').unwrap_or(target.len()));
    let is_module = name == "hvsock" || name.starts_with("hvsock::") || name.is_empty();
    let modules = match PARTS.iter().find(|(part, _)| *part == name) {
        Some((_, modules)) => modules.to_vec(),
        None if is_module => vec![name],
        None => {
            let parts = PARTS.map(|(part, _)| part).join(", ");
            return Err(format!(
                "{word:?} is no level (error, warn, info, debug, trace or off) and no PART=LEVEL ({parts})"
            ));
        }
    };
    let all = modules.iter();
    all.map(|module| directive(&format!("{module}{rest}={level}"), word))
        .collect()
}

fn directive(text: &str, word: &str) -> Result<Directive, String> {
    text.parse().map_err(|e| format!("{word:?}: {e}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_levels_and_modules_are_read_and_mistakes_named() {
        for right in [
            "",
            "debug",
            "off",
            "info,connection=debug",
            "warn, vm=trace",
            "hvsock::engine=debug",
            "connection[connection]=trace",
            "access",
        ] {
            parse(right).unwrap_or_else(|e| panic!("{right:?}: {e}"));
        }
        for wrong in ["debgu", "info,conection=debug", "connection=debgu"] {
            let why = parse(wrong).unwrap_err();
            let word = wrong.rsplit(',').next().unwrap();
            assert!(why.contains(word), "{why}");
        }
        let both = parse("warn,connection=debug").unwrap().to_string();
        assert!(both.contains("hvsock::engine::connection=debug"), "{both}");
        assert!(both.contains("warn") && !both.contains("info"), "{both}");
    }

    /// A part whose module was moved would log nothing.
    #[test]
    fn each_part_has_its_modules() {
        let source = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        for (part, modules) in PARTS {
            for module in modules {
                let rooms = module.split("::").skip(1);
                let place = rooms.fold(source.clone(), |place, room| place.join(room));
                let is_there = place.is_dir() || place.with_extension("rs").is_file();
                assert!(is_there || *module == "hvsock::access", "{part}: {module}");
            }
        }
    }
}
