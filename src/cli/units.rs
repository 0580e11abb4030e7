//! Durations and sizes as people write them: `200ms`, `5s`, `64KiB`.
//!
//! Pure. A number without a unit is refused, unless the name of the setting already carries the unit.

/// Milliseconds of a duration with a unit: `ms`, `s`, `m` or `h`.
///
/// # Errors
/// A message naming the text and the units.
pub fn duration_ms(text: &str) -> Result<u64, String> {
    let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
    scaled(text, &units).ok_or_else(|| format!("{text:?} is not a duration such as 200ms, 5s, 2m or 1h"))
}

/// Milliseconds: a duration with a unit, or a bare number of milliseconds.
///
/// # Errors
/// A message naming the text and the units.
pub fn milliseconds(text: &str) -> Result<u64, String> {
    text.parse().or_else(|_| duration_ms(text))
}

/// Bytes: a bare number, or one with a unit `B`, `KiB`, `MiB` or `GiB`.
///
/// # Errors
/// A message naming the text and the units.
pub fn bytes(text: &str) -> Result<u64, String> {
    let units = [("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("B", 1)];
    text.parse()
        .ok()
        .or_else(|| scaled(text, &units))
        .ok_or_else(|| format!("{text:?} is not a size such as 4096, 64KiB or 16MiB"))
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration_ms("200ms"), Ok(200));
        assert_eq!(duration_ms("5s"), Ok(5_000));
        assert_eq!(duration_ms("2 m"), Ok(120_000));
        assert_eq!(duration_ms("1h"), Ok(3_600_000));
        for bad in ["5", "", "ms", "-1s", "1.5s", "1d", "99999999999999999999h", "18446744073709551615h"] {
            assert!(duration_ms(bad).is_err(), "{bad}");
        }
        assert_eq!(milliseconds("150"), Ok(150));
        assert_eq!(milliseconds("1s"), Ok(1_000));
    }

    #[test]
    fn sizes_are_binary() {
        assert_eq!(bytes("4096"), Ok(4096));
        assert_eq!(bytes("64KiB"), Ok(65_536));
        assert_eq!(bytes("1 MiB"), Ok(1 << 20));
        assert_eq!(bytes("7B"), Ok(7));
        assert!(bytes("64KB").is_err() && bytes("x").is_err());
    }
}
