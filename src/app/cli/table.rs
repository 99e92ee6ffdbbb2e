//! Tables for people, on standard output.

use comfy_table::{Table, presets};
#[cfg(unix)]
use indicatif::HumanCount;

use crate::app::escape;

/// Formats rows below their headings, without rules, columns two spaces apart. Control characters
/// are escaped.
pub(super) fn of<const N: usize>(
    headings: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(headings);
    table.add_rows(
        rows.into_iter()
            .map(|row| row.map(|cell| escape::line(&cell).into_owned())),
    );
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table.trim_fmt()
}

/// Returns a number with its noun, as `1 connection`.
#[cfg(unix)]
pub(super) fn counted(n: u64, what: &str) -> String {
    let s = if n == 1 { "" } else { "s" };
    format!("{} {what}{s}", HumanCount(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other_and_cells_stay_on_their_line() {
        let rows = [
            ["a\nb\u{1b}[2J", "1"].map(str::to_owned),
            ["", "22"].map(str::to_owned),
            ["日本", "\u{202e}3"].map(str::to_owned),
        ];
        assert_eq!(
            of(["NAME", "N"], rows),
            "NAME           N\na\\nb\\u{1b}[2J  1\n               22\n日本           \\u{202e}3"
        );
    }
}
