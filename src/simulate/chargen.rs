//! RFC 864's pattern.

use super::buffer::Buffer;

/// RFC 864's rotating lines of 72 printable characters.
#[derive(Debug, Default)]
pub(super) struct Chargen {
    at: usize,
}

const LINE: usize = 74;
const PRINTABLE: usize = 95;
const PATTERN: [u8; LINE * PRINTABLE] = {
    let mut pattern = [b'\n'; LINE * PRINTABLE];
    let mut at = 0;
    while at < pattern.len() {
        let (line, column) = (at / LINE, at % LINE);
        if column < 72 {
            pattern[at] = b' ' + ((line + column) % PRINTABLE) as u8;
        } else if column == 72 {
            pattern[at] = b'\r';
        }
        at += 1;
    }
    pattern
};

impl Chargen {
    /// Appends the pattern up to `most` bytes or as far as there is space; how much that was.
    pub(super) fn fill(&mut self, output: &mut Buffer, most: u64) -> u64 {
        let mut filled = 0;
        while filled < most {
            let piece = &PATTERN[self.at..];
            let n = (piece.len() as u64).min(most - filled) as usize;
            let n = output.push(&piece[..n]);
            if n == 0 {
                break;
            }
            self.at = (self.at + n) % PATTERN.len();
            filled += n as u64;
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_is_rfc_864s() {
        let mut output = Buffer::new(LINE * 2);
        assert_eq!(Chargen::default().fill(&mut output, 1000), 148);
        let text = output.bytes();
        assert!(text.starts_with(b" !\"#$%&'()*+"));
        assert_eq!(&text[72..77], b"\r\n!\"#");
    }
}
