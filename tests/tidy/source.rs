//! A source file as the rules see it: code without comments, text and tests; the paths it names; its functions.
//!
//! Not a parser of Rust: it knows comments, literals, braces and `use` trees, which is what the rules need.

/// Code of a file, line by line as in the file, with comments and the insides of literals blanked.
#[must_use]
pub(crate) fn code_of(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut out = String::with_capacity(source.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &source[at..];
        let taken = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(len) = raw_string(rest, out.chars().last()) {
            len
        } else if rest.starts_with('"') {
            quoted(rest, b'"')
        } else if let Some(len) = char_literal(rest) {
            len
        } else {
            let c = rest.chars().next().expect("not at the end");
            out.push(c);
            at += c.len_utf8();
            continue;
        };
        out.extend(rest[..taken].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        at += taken;
    }
    out
}

fn raw_string(rest: &str, before: Option<char>) -> Option<usize> {
    if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
        return None;
    }
    let start = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let hashes = start.bytes().take_while(|b| *b == b'#').count();
    let open = rest.len() - start.len() + hashes;
    rest[open..].strip_prefix('"')?;
    let close = format!("\"{}", "#".repeat(hashes));
    Some(rest[open + 1..].find(&close).map_or(rest.len(), |end| open + 1 + end + close.len()))
}

fn quoted(rest: &str, quote: u8) -> usize {
    let bytes = rest.as_bytes();
    let mut at = 1;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Length of a character literal; a lifetime is none.
fn char_literal(rest: &str) -> Option<usize> {
    let inner = rest.strip_prefix('\'')?;
    if inner.starts_with('\\') {
        return Some(quoted(rest, b'\''));
    }
    let c = inner.chars().next()?;
    inner[c.len_utf8()..].starts_with('\'').then(|| c.len_utf8() + 2)
}

/// The same code with every `#[cfg(test)]` item blanked.
#[must_use]
pub(crate) fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = code.to_owned();
    let mut from = 0;
    while let Some(found) = out[from..].find(MARK) {
        let start = from + found;
        let end = end_of_item(&out, start + MARK.len());
        let blank: String = out[start..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }).collect();
        out.replace_range(start..end, &blank);
        from = start + blank.len();
    }
    out
}

/// End of the item that begins after `at`: its `;`, or the brace that closes its first.
fn end_of_item(code: &str, at: usize) -> usize {
    let mut depth = 0_usize;
    for (offset, c) in code[at..].char_indices() {
        match c {
            ';' if depth == 0 => return at + offset + 1,
            '{' => depth += 1,
            '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + offset + 1;
                }
            }
            _ => {}
        }
    }
    code.len()
}

/// Every path that the code names, `use` trees spelled out, with its line.
#[must_use]
pub(crate) fn paths(code: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut rest_of_uses = String::with_capacity(code.len());
    let mut at = 0;
    while at < code.len() {
        let rest = &code[at..];
        let word_starts = at == 0 || !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if word_starts && rest.starts_with("use ") {
            let end = rest.find(';').unwrap_or(rest.len());
            let line = line_at(code, at);
            expand("", &rest[4..end], &mut |path| found.push((line, path)));
            rest_of_uses.extend(rest[..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
            at += end;
        } else {
            let c = rest.chars().next().expect("not at the end");
            rest_of_uses.push(c);
            at += c.len_utf8();
        }
    }
    for (number, line) in rest_of_uses.lines().enumerate() {
        let words = line.split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':'));
        let named = words.map(|word| word.trim_matches(':')).filter(|word| word.contains("::"));
        found.extend(named.map(|word| (number + 1, word.to_owned())));
    }
    found
}

fn line_at(code: &str, at: usize) -> usize {
    code[..at].matches('\n').count() + 1
}

/// Spells out a `use` tree.
fn expand(prefix: &str, tree: &str, each: &mut impl FnMut(String)) {
    let tree = tree.trim();
    let Some(open) = tree.find('{') else {
        let name = tree.split(" as ").next().unwrap_or(tree).trim();
        if !name.is_empty() {
            each(format!("{prefix}{name}"));
        }
        return;
    };
    let inner_prefix = format!("{prefix}{}", tree[..open].trim());
    let inner = tree[open + 1..].rsplit_once('}').map_or("", |(inner, _)| inner);
    let mut depth = 0;
    let mut begin = 0;
    for (at, c) in inner.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&inner_prefix, &inner[begin..at], each);
                begin = at + 1;
            }
            _ => {}
        }
    }
    expand(&inner_prefix, &inner[begin..], each);
}

/// Functions: line, name, and number of lines.
#[must_use]
pub(crate) fn functions(code: &str) -> Vec<(usize, String, usize)> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(offset) = code[from..].find("fn ") {
        let at = from + offset;
        from = at + 3;
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let name: String = code[from..].chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
        if name.is_empty() {
            continue;
        }
        let lines = code[at..end_of_item(code, at)].matches('\n').count() + 1;
        found.push((line_at(code, at), name, lines));
    }
    found
}

#[test]
fn comments_and_literals_are_not_code() {
    let source = "let a = \"tokio::spawn \\\" x\"; // openraft::\nlet b = r#\"a \"std::fs\" b\"#; /* x\n y */ let c = '\"'; f::<'a>()";
    let code = code_of(source);
    assert!(!code.contains("tokio") && !code.contains("openraft") && !code.contains("std::fs"), "{code}");
    assert!(code.contains("let b =") && code.contains("let c =") && code.contains("f::<'a>()"), "{code}");
    assert_eq!(code.matches('\n').count(), source.matches('\n').count());
}

#[test]
fn tests_are_left_out() {
    let code =
        "fn a() {}\n#[cfg(test)]\nmod tests {\n fn b() { { } }\n}\nfn c() {}\n#[cfg(test)]\nmod tests;\nfn d() {}";
    let names: Vec<_> = functions(&without_tests(code)).into_iter().map(|(_, name, _)| name).collect();
    assert_eq!(names, ["a", "c", "d"]);
}

#[test]
fn use_trees_are_spelled_out() {
    let code = "use crate::{key::{self, Span as S}, error::Error};\nuse std::time::Duration;\nlet x = tokio::time::sleep(y::Z);";
    let found: Vec<_> = paths(code).into_iter().map(|(line, path)| format!("{line} {path}")).collect();
    let expected = [
        "1 crate::key::self",
        "1 crate::key::Span",
        "1 crate::error::Error",
        "2 std::time::Duration",
        "3 tokio::time::sleep",
        "3 y::Z",
    ];
    assert_eq!(found, expected);
}

#[test]
fn functions_are_measured() {
    let code = "impl A {\n    async fn one(\n        self,\n    ) {\n        if x {}\n    }\n    fn two(&self);\n}\n";
    assert_eq!(functions(code), [(2, "one".to_owned(), 5), (7, "two".to_owned(), 1)]);
}
