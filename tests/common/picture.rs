//! What a terminal shows, as an SVG picture: text in the places of its cells, colours, and bars of
//! block elements.

use std::fmt::Write as _;

use vt100::{Cell, Color, Screen};

const FONT: f32 = 14.0;
const WIDTH: f32 = 8.4;
const HEIGHT: f32 = 18.0;
/// Around the text.
const MARGIN: f32 = 12.0;
/// Of the baseline below a cell's top.
const ASCENT: f32 = 13.5;

const FOREGROUND: &str = "#d8dee9";
const BACKGROUND: &str = "#1b1f27";
/// The first eight colours of a terminal.
const COLORS: [&str; 8] = [
    "#11141a", "#e06c75", "#98c379", "#e5c07b", "#61afef", "#c678dd", "#56b6c2", "#abb2bf",
];

/// Eighths of a cell, from one to eight.
const BARS: [&str; 8] = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];

/// Returns a picture of the screen, in which each line of text is a line of the file.
pub(crate) fn picture(screen: &Screen, what: &str) -> String {
    let (rows, columns) = screen.size();
    let (rows, columns) = (rows.get(), columns.get());
    let width = f32::from(columns) * WIDTH + 2.0 * MARGIN;
    let height = f32::from(rows) * HEIGHT + 2.0 * MARGIN;
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1} {height:.1}" width="{width:.0}" role="img">
<title>{what}</title>
<rect width="100%" height="100%" rx="8" fill="{BACKGROUND}"/>
<g font-family="ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace" font-size="{FONT}" xml:space="preserve">
"#
    );
    for row in 0..rows {
        let cells: Vec<&Cell> = (0..columns)
            .map(|column| screen.cell(row, column).unwrap())
            .collect();
        let top = MARGIN + f32::from(row) * HEIGHT;
        draw_blocks(&mut svg, &cells, top);
        draw_text(&mut svg, &cells, top);
    }
    svg + "</g>\n</svg>\n"
}

/// Returns the text of such a picture, line by line, without the places of its words.
pub(crate) fn text_of(picture: &str) -> Vec<String> {
    let lines = picture.lines().filter(|line| line.starts_with("<text"));
    let words = |line: &str| {
        let parts = line.split('<').filter_map(|part| part.split_once('>'));
        let text: Vec<&str> = parts.map(|(_, text)| text).collect();
        let text = text.join(" ").replace("&lt;", "<").replace("&gt;", ">");
        let text = text.replace("&amp;", "&");
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    lines.map(words).collect()
}

fn left(column: usize) -> f32 {
    MARGIN + column as f32 * WIDTH
}

/// Draws backgrounds, and bars, which a font may give gaps.
fn draw_blocks(svg: &mut String, cells: &[&Cell], top: f32) {
    let block_of = |cell: &Cell| {
        let bar = BARS.iter().position(|bar| *bar == cell.contents());
        let eighths = bar.map(|bar| bar + 1);
        let (front, back) = colors(cell);
        (back, eighths.map(|eighths| (front, eighths)))
    };
    let mut column = 0;
    for same in cells.chunk_by(|one, next| block_of(one) == block_of(next)) {
        let (x, width) = (left(column), same.len() as f32 * WIDTH);
        let (back, bar) = block_of(same[0]);
        let mut block = |color, y: f32, height: f32| {
            writeln!(
                svg,
                r#"<rect x="{x:.1}" y="{y:.2}" width="{width:.1}" height="{height:.2}" fill="{color}"/>"#
            )
            .unwrap();
        };
        if back != BACKGROUND {
            block(back, top, HEIGHT);
        }
        if let Some((front, eighths)) = bar {
            let height = HEIGHT * eighths as f32 / 8.0;
            block(front, top + HEIGHT - height, height);
        }
        column += same.len();
    }
}

fn draw_text(svg: &mut String, cells: &[&Cell], top: f32) {
    let is_text = |cell: &Cell| !cell.contents().trim().is_empty() && !is_bar(cell);
    let Some(last) = cells.iter().rposition(|cell| is_text(cell)) else {
        return;
    };
    write!(svg, r#"<text y="{:.1}">"#, top + ASCENT).unwrap();
    // One blank is within a text; from two on another one begins, in its own place.
    let mut runs: Vec<(usize, String)> = Vec::new();
    let mut style = String::new();
    let mut blanks = 2;
    for (column, cell) in cells[..=last].iter().enumerate() {
        let text = if is_text(cell) { cell.contents() } else { " " };
        if text == " " {
            blanks += 1;
        } else {
            let its = style_of(cell);
            let goes_on = blanks < 2 && its == style;
            match runs.last_mut().filter(|_| goes_on) {
                Some((_, run)) => run.push_str(&" ".repeat(blanks)),
                None => {
                    finish(svg, &runs, &style);
                    runs.clear();
                    runs.push((column, String::new()));
                    style = its;
                }
            }
            runs[0].1.push_str(text);
            blanks = 0;
        }
    }
    finish(svg, &runs, &style);
    svg.push_str("</text>\n");
}

fn finish(svg: &mut String, runs: &[(usize, String)], style: &str) {
    for (column, text) in runs {
        let length = text.chars().count() as f32 * WIDTH;
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let text = text.replace('>', "&gt;");
        write!(
            svg,
            r#"<tspan x="{:.1}" textLength="{length:.1}"{style}>{text}</tspan>"#,
            left(*column)
        )
        .unwrap();
    }
}

fn is_bar(cell: &Cell) -> bool {
    BARS.contains(&cell.contents())
}

fn style_of(cell: &Cell) -> String {
    let mut style = format!(r#" fill="{}""#, colors(cell).0);
    for (is_set, attribute) in [
        (cell.bold(), r#" font-weight="bold""#),
        (cell.dim(), r#" opacity="0.6""#),
        (cell.underline(), r#" text-decoration="underline""#),
    ] {
        if is_set {
            style.push_str(attribute);
        }
    }
    style
}

/// Returns the colours of a cell's text and of what is behind it.
fn colors(cell: &Cell) -> (&'static str, &'static str) {
    let of = |color, default| match color {
        Color::Idx(index) => COLORS[usize::from(index) % 8],
        Color::Default | Color::Rgb(..) => default,
    };
    let (front, back) = (
        of(cell.fgcolor(), FOREGROUND),
        of(cell.bgcolor(), BACKGROUND),
    );
    match cell.inverse() {
        true => (back, front),
        false => (front, back),
    }
}
