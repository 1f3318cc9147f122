//! Sizes and addresses as people write and read them.

/// Units, 1024 to the next.
const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// `512M`, `3GiB`, `4096` or `0x1000` as a number of bytes.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if let Some(hex) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return u64::from_str_radix(hex, 16).map_err(|error| format!("{text:?} is no hexadecimal number: {error}"));
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let number: u64 = digits.parse().map_err(|_| {
        format!("{text:?} is no size: write a number, if need be with K, M, G or T, or 0x and hexadecimal")
    })?;
    let shift = match unit.trim().to_ascii_uppercase().trim_end_matches('B').trim_end_matches('I') {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(format!("{text:?} has the unit {unit:?}: use K, M, G or T (powers of 1024)")),
    };
    number.checked_mul(1 << shift).ok_or_else(|| format!("{text:?} is more than 64 bits of bytes"))
}

/// With a unit: exact where it is a whole number of it, else to a tenth, rounded down.
pub(crate) fn bytes(bytes: u64) -> String {
    let mut unit = 0;
    while unit + 1 < UNITS.len() && bytes >> (10 * (unit + 1)) != 0 {
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    let whole = bytes >> (10 * unit);
    let rest = bytes - (whole << (10 * unit));
    if rest == 0 {
        return format!("{whole} {name}");
    }
    let tenth = (u128::from(rest) * 10) >> (10 * unit);
    format!("{whole}.{tenth} {name}")
}

/// `1 block`, `2 blocks`.
pub(crate) fn blocks(count: usize) -> String {
    if count == 1 { "1 block".to_owned() } else { format!("{count} blocks") }
}

/// Bytes a second, for people.
pub(crate) fn rate(bytes: u64, seconds: f64) -> String {
    let per_second = bytes as f64 / seconds.max(1e-9) / f64::from(1 << 20);
    format!("{per_second:.0} MiB/s")
}

/// What share of `all` is `part`, in per cent.
pub(crate) fn percent(part: u64, all: u64) -> f64 {
    if all == 0 { 0.0 } else { part as f64 / all as f64 * 100.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, value) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 4096),
            ("3G", 3 << 30),
            ("256 MiB", 256 << 20),
            ("64k", 64 << 10),
            ("1TB", 1 << 40),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
        for text in ["", "G", "-1", "0x", "0xg", "1.5G", "12Q", "99999999999999999999", "18446744073709551615K"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_written() {
        for (value, text) in [
            (0, "0 bytes"),
            (4096, "4 KiB"),
            (4097, "4.0 KiB"),
            (1536, "1.5 KiB"),
            (256 << 20, "256 MiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
    }
}
