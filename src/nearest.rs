//! What a word was probably meant to be.

/// Returns which of these a word was probably meant to be.
pub(crate) fn nearest<'a>(word: &str, among: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // Clap's measure for options, so that both guess alike.
    const ALIKE: f64 = 0.7;
    among
        .map(|known| (strsim::jaro_winkler(word, known), known))
        .filter(|(alike, _)| *alike > ALIKE)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}
