//! Keys and values as text, in both directions: arguments, tables, JSON and TSV.
//!
//! Pure. Invariants, held by property tests:
//! * JSON: `from_json(to_json(bytes)) == bytes` for all bytes. Text that is valid UTF-8 is itself, everything else is
//!   `b64:` and base64; text that happens to begin with `b64:` is encoded as well, so the prefix always means base64;
//! * TSV: `from_tsv(to_tsv(bytes)) == bytes` for all bytes, and the text holds no tab, newline or carriage return;
//! * integer keys are decimal numbers everywhere; one outside of `[0, M)` is `KEY_OUT_OF_DOMAIN`.

use crate::{
    error::{Error, Reason},
    key::{KeyKind, integer_key, integer_of_key, printable},
};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// Marks base64 in JSON strings.
pub const BASE64_PREFIX: &str = "b64:";
/// Characters of a value that a table shows.
const TABLE_CHARS_MAX: usize = 60;

/// A key in JSON: a number in an integer keyspace, a string elsewhere.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum JsonKey {
    /// Of an integer keyspace.
    Number(u64),
    /// Of any other, as [`to_json`] makes it.
    Text(String),
}

/// How the keys of one keyspace are read and shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeyText {
    /// Kind of the keyspace's keys.
    pub kind: KeyKind,
    /// Arguments are hexadecimal (byte keys only).
    pub hex: bool,
}

impl KeyText {
    /// Text of UTF-8 keys, integers as decimal numbers.
    #[must_use]
    pub const fn new(kind: KeyKind) -> Self {
        Self { kind, hex: false }
    }

    /// The stored key behind an argument.
    ///
    /// # Errors
    /// `KEY_OUT_OF_DOMAIN` naming value and limit, or `INVALID_FIELD` for bad hexadecimal.
    pub fn parse(&self, text: &[u8]) -> Result<Bytes, Error> {
        match self.kind {
            KeyKind::Integer { max } => integer(text, max)
                .and_then(|n| if n < max { Ok(integer_key(n)) } else { Err(out_of_domain(text, max)) }),
            KeyKind::Bytes => bytes_of_argument(text, self.hex),
        }
    }

    /// The stored key behind an end of a range; the exclusive upper end may be M itself.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_end(&self, text: &[u8], inclusive: bool) -> Result<Bytes, Error> {
        match self.kind {
            KeyKind::Integer { max } if !inclusive => integer(text, max).map(integer_key),
            _ => self.parse(text),
        }
    }

    /// The stored key behind a JSON key.
    ///
    /// # Errors
    /// `KEY_OUT_OF_DOMAIN`, or `INVALID_FIELD` when the kind is wrong.
    pub fn parse_json(&self, key: &serde_json::Value) -> Result<Bytes, Error> {
        match (self.kind, key) {
            (KeyKind::Integer { .. }, serde_json::Value::Number(n)) => self.parse(n.to_string().as_bytes()),
            (KeyKind::Bytes, serde_json::Value::String(text)) => from_json(text),
            (KeyKind::Integer { .. }, other) => {
                Err(Error::field("key", format!("{other} is not a number, and the keyspace has integer keys")))
            }
            (KeyKind::Bytes, other) => Err(Error::field("key", format!("{other} is not a string"))),
        }
    }

    /// For JSON.
    #[must_use]
    pub fn json(&self, key: &[u8]) -> JsonKey {
        match (self.kind, integer_of_key(key)) {
            (KeyKind::Integer { .. }, Some(n)) => JsonKey::Number(n),
            _ => JsonKey::Text(to_json(key)),
        }
    }

    /// For TSV and plain output.
    #[must_use]
    pub fn tsv(&self, key: &[u8]) -> String {
        match (self.kind, integer_of_key(key)) {
            (KeyKind::Integer { .. }, Some(n)) => n.to_string(),
            _ => to_tsv(key),
        }
    }

    /// For messages and tables.
    #[must_use]
    pub fn shown(&self, key: &[u8]) -> String {
        match (self.kind, integer_of_key(key)) {
            (KeyKind::Integer { .. }, Some(n)) => n.to_string(),
            _ => printable(key),
        }
    }
}

/// A decimal integer in `[0, max]`.
fn integer(text: &[u8], max: u64) -> Result<u64, Error> {
    let number = std::str::from_utf8(text).ok().and_then(|text| text.parse::<u64>().ok());
    number.filter(|n| *n <= max).ok_or_else(|| out_of_domain(text, max))
}

fn out_of_domain(text: &[u8], max: u64) -> Error {
    let shown = String::from_utf8_lossy(&text[..text.len().min(64)]).into_owned();
    Error::new(
        Reason::KeyOutOfDomain,
        format!("the key {shown} is not an integer in [0, {max}): the keyspace takes 0 to {}", max.saturating_sub(1)),
    )
    .in_field("key")
    .with("key", shown)
    .with("limit", max)
}

/// The bytes of a key or value given as an argument.
///
/// # Errors
/// `INVALID_FIELD` for bad hexadecimal.
pub fn bytes_of_argument(text: &[u8], hex: bool) -> Result<Bytes, Error> {
    if !hex {
        return Ok(Bytes::copy_from_slice(text));
    }
    let digits = text.strip_prefix(b"0x").unwrap_or(text);
    let wrong =
        || Error::new(Reason::InvalidField, format!("{} is not hexadecimal: two digits per byte", printable(text)));
    if !digits.len().is_multiple_of(2) {
        return Err(wrong());
    }
    digits
        .chunks(2)
        .map(|pair| Some(hex_digit(pair[0])? << 4 | hex_digit(pair[1])?))
        .collect::<Option<Vec<u8>>>()
        .map(Bytes::from)
        .ok_or_else(wrong)
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

/// Bytes as the text of a JSON string.
#[must_use]
pub fn to_json(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.starts_with(BASE64_PREFIX) => text.to_owned(),
        _ => format!("{BASE64_PREFIX}{}", BASE64.encode(bytes)),
    }
}

/// The bytes behind the text of a JSON string.
///
/// # Errors
/// `INVALID_FIELD` when `b64:` is not followed by base64.
pub fn from_json(text: &str) -> Result<Bytes, Error> {
    match text.strip_prefix(BASE64_PREFIX) {
        None => Ok(Bytes::copy_from_slice(text.as_bytes())),
        Some(encoded) => BASE64.decode(encoded).map(Bytes::from).map_err(|error| {
            Error::new(Reason::InvalidField, format!("{text:?} begins with b64: but is not base64: {error}"))
        }),
    }
}

/// Bytes as a field of a TSV line: `\t`, `\n`, `\r`, `\\` and, for what is not UTF-8 or is a control character, `\xHH`.
#[must_use]
pub fn to_tsv(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\t' => out.push_str("\\t"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\\' => out.push_str("\\\\"),
                c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            out.push_str(&format!("\\x{byte:02x}"));
        }
    }
    out
}

/// The bytes behind a field of a TSV line.
///
/// # Errors
/// A message naming the escape that is not one.
pub fn from_tsv(text: &[u8]) -> Result<Bytes, String> {
    if !text.contains(&b'\\') {
        return Ok(Bytes::copy_from_slice(text));
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let used = match (byte, tail) {
            (b'\\', [b't', ..]) => push(&mut out, b'\t', 2),
            (b'\\', [b'n', ..]) => push(&mut out, b'\n', 2),
            (b'\\', [b'r', ..]) => push(&mut out, b'\r', 2),
            (b'\\', [b'\\', ..]) => push(&mut out, b'\\', 2),
            (b'\\', [b'x', high, low, ..]) => match (hex_digit(*high), hex_digit(*low)) {
                (Some(high), Some(low)) => push(&mut out, high << 4 | low, 4),
                _ => return Err(bad_escape(rest)),
            },
            (b'\\', _) => return Err(bad_escape(rest)),
            (byte, _) => push(&mut out, byte, 1),
        };
        rest = &rest[used..];
    }
    Ok(out.into())
}

fn push(out: &mut Vec<u8>, byte: u8, used: usize) -> usize {
    out.push(byte);
    used
}

fn bad_escape(rest: &[u8]) -> String {
    let shown = String::from_utf8_lossy(&rest[..rest.len().min(4)]);
    format!(
        "`{shown}` is not one of the escapes \\t \\n \\r \\\\ \\xHH; if backslashes stand for themselves, use --raw"
    )
}

/// A value for a table: printable, in one line, cut when long.
#[must_use]
pub fn cell(value: &[u8]) -> String {
    let text = match std::str::from_utf8(value) {
        Ok(text) => to_tsv(text.as_bytes()),
        Err(_) => {
            let hex: String = value.iter().take(TABLE_CHARS_MAX / 2).map(|byte| format!("{byte:02x}")).collect();
            format!("0x{hex}{}", if value.len() > TABLE_CHARS_MAX / 2 { "…" } else { "" })
        }
    };
    if text.chars().count() <= TABLE_CHARS_MAX {
        return text;
    }
    text.chars().take(TABLE_CHARS_MAX - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INTEGERS: KeyText = KeyText::new(KeyKind::Integer { max: 1_000 });

    proptest! {
        #[test]
        fn json_text_brings_every_byte_back(bytes in any::<Vec<u8>>(), tail in ".*") {
            prop_assert_eq!(from_json(&to_json(&bytes)).unwrap(), bytes);
            let literal = format!("{BASE64_PREFIX}{tail}");
            prop_assert_eq!(from_json(&to_json(literal.as_bytes())).unwrap(), literal.as_bytes());
        }

        #[test]
        fn tsv_text_brings_every_byte_back_on_one_line(bytes in any::<Vec<u8>>()) {
            let text = to_tsv(&bytes);
            prop_assert!(!text.contains(['\t', '\n', '\r']));
            prop_assert_eq!(from_tsv(text.as_bytes()).unwrap(), bytes);
        }
    }

    #[test]
    fn text_stays_readable() {
        assert_eq!(to_json("grüße".as_bytes()), "grüße");
        assert_eq!(to_json(b"b64:x"), "b64:YjY0Ong=");
        assert_eq!(to_json(&[0xFF, 0]), "b64:/wA=");
        assert_eq!(to_tsv(b"a\tb\\\xFF\0"), "a\\tb\\\\\\xff\\x00");
        assert!(from_tsv(b"C:\\dir").is_err() && from_tsv(b"end\\").is_err() && from_tsv(b"\\x4").is_err());
        assert!(from_json("b64:?").is_err());
    }

    #[test]
    fn integer_keys_are_decimal_numbers_inside_the_domain() {
        assert_eq!(INTEGERS.parse(b"999").unwrap(), integer_key(999));
        assert_eq!(INTEGERS.json(&integer_key(7)), JsonKey::Number(7));
        assert_eq!(INTEGERS.tsv(&integer_key(7)), "7");
        for bad in ["1000", "-5", "x", "", "99999999999999999999999", "1.0"] {
            let error = INTEGERS.parse(bad.as_bytes()).unwrap_err();
            assert_eq!(error.reason, Reason::KeyOutOfDomain);
            assert!(error.message.contains(bad) && error.message.contains("[0, 1000)"), "{}", error.message);
        }
    }

    #[test]
    fn the_exclusive_end_of_an_integer_range_may_be_the_maximum() {
        assert_eq!(INTEGERS.parse_end(b"1000", false).unwrap(), integer_key(1_000));
        assert!(INTEGERS.parse_end(b"1000", true).is_err());
        assert!(INTEGERS.parse_end(b"1001", false).is_err());
        assert!(INTEGERS.parse_end(b"-1", false).is_err());
    }

    #[test]
    fn hexadecimal_arguments() {
        assert_eq!(bytes_of_argument(b"00ff", true).unwrap().as_ref(), [0, 0xFF]);
        assert_eq!(bytes_of_argument(b"0x", true).unwrap().as_ref(), b"");
        assert!(bytes_of_argument(b"0f0", true).is_err() && bytes_of_argument(b"zz", true).is_err());
        assert_eq!(bytes_of_argument(b"00ff", false).unwrap().as_ref(), b"00ff");
    }

    #[test]
    fn table_cells_are_short_and_in_one_line() {
        assert_eq!(cell(b"a\nb"), "a\\nb");
        let binary = cell(&[0xFF; 40]);
        assert!(binary.chars().count() <= TABLE_CHARS_MAX && binary.ends_with('…'));
        assert_eq!(cell("ä".repeat(100).as_bytes()).chars().count(), TABLE_CHARS_MAX);
    }
}
