//! Rules that no compiler checks: layering, words, sizes, module docs, and the files for deployment.
//!
//! Reads the sources as text. Every rule has a test that plants a snippet and sees the rule fail.

#![allow(clippy::unwrap_used, reason = "a test stops at what it did not expect")]

mod deploy;
mod rules;
mod source;

use rules::{File, RULES};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The repository.
pub(crate) fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(folder: &Path, into: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn every_source_file_keeps_every_rule() {
    let src = root().join("src");
    let mut files = Vec::new();
    rust_files(&src, &mut files);
    assert!(files.len() > 10, "the sources are found");
    let mut faults = Vec::new();
    for path in &files {
        let text = fs::read_to_string(path).unwrap();
        let relative = path.strip_prefix(&src).unwrap().to_string_lossy().replace('\\', "/");
        for (name, rule) in RULES {
            let found = rule(&File { path: &relative, text: &text });
            faults.extend(found.into_iter().map(|fault| format!("{fault}  [{name}]")));
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
}
