//! `cargo xtask tidy`: rules about the workspace that no compiler checks.
//!
//! - arrows between crates: [`ARROWS`]
//! - every crate takes the workspace's lints and is never published
//! - `README.md` and `README.zh-CN.md` have the same headings and the same code blocks
//! - no file names a home directory, this checkout or a package registry's host
//! - no Rust file is longer than [`MAX_RUST_LINES`]
//!
//! Each rule is a function that returns what it found wrong; the tests at the end run them all, so
//! that `cargo test` alone sees a breach too.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::run::{Cmd, cargo, say, workspace_root};

/// Which crates each crate may use, besides `bulbil-types`, which every crate may use.  A crate that
/// is not listed may use no other.  A new arrow gets a design note first.
const ARROWS: &[(&str, &[&str])] = &[
    ("bulbil-volume", &["bulbil-store"]),
    // Only tests use it, so what it uses binds nobody.
    ("bulbil-testkit", &["bulbil-store", "bulbil-volume"]),
    ("bulbil-export", &["bulbil-volume"]),
    ("bulbil-inspect", &["bulbil-volume"]),
    (
        "bulbil-control",
        &[
            "bulbil-store",
            "bulbil-format",
            "bulbil-volume",
            "bulbil-export",
            "bulbil-vm",
            "bulbil-net",
            "bulbil-metadata",
            "bulbil-inspect",
        ],
    ),
    ("bulbil-api", &["bulbil-control"]),
    ("bulbil", &["bulbil-api", "bulbil-control"]),
];

/// Anyone may use it, for tests only.
const TESTKIT: &str = "bulbil-testkit";

/// A longer file wants to be several.
const MAX_RUST_LINES: usize = 1200;

/// Users whose home directory a file may name: those inside guests, and one for examples.
const HOMES_IN_GUESTS: &[&str] = &["debian", "ubuntu", "user", "you"];

/// Hosts of package registries, in parts, so that this file does not name them.
const REGISTRY_HOSTS: &[&[&str]] = &[
    &["deb", "debian", "org"],
    &["security", "debian", "org"],
    &["snapshot", "debian", "org"],
    &["archive", "ubuntu", "com"],
    &["index", "crates", "io"],
    &["static", "crates", "io"],
    &["pypi", "org"],
    &["files", "pythonhosted", "org"],
    &["registry", "npmjs", "org"],
    &["proxy", "golang", "org"],
];

/// Written by cargo, which names its registry.
const NOT_OURS: &[&str] = &["Cargo.lock"];

pub(crate) fn run() -> Result<()> {
    let mut found = Vec::new();
    for rule in [crates, readmes, file_contents] {
        found.extend(rule()?);
    }
    if found.is_empty() {
        say("tidy");
        return Ok(());
    }
    bail!("{} breaches of the workspace's rules:\n  {}", found.len(), found.join("\n  "));
}

/// Arrows, lints and publishing of every crate.
fn crates() -> Result<Vec<String>> {
    let text = cargo().args(["metadata", "--no-deps", "--format-version=1", "--offline"]).quiet().read()?;
    let metadata: Value = serde_json::from_str(&text).context("cannot read what cargo metadata wrote")?;
    let mut found = Vec::new();
    for package in array(&metadata, "packages") {
        let manifest_path = package["manifest_path"].as_str().context("a package without a manifest path")?;
        let manifest =
            std::fs::read_to_string(manifest_path).with_context(|| format!("cannot read {manifest_path}"))?;
        found.extend(check_crate(package, &manifest));
    }
    Ok(found)
}

fn array<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

/// `package` is one of cargo metadata's, `manifest` the text of its Cargo.toml.
fn check_crate(package: &Value, manifest: &str) -> Vec<String> {
    let name = package["name"].as_str().unwrap_or_default();
    let mut found = Vec::new();
    for dependency in array(package, "dependencies") {
        let target = dependency["name"].as_str().unwrap_or_default();
        let is_ours = dependency["path"].is_string();
        let for_tests_only = dependency["kind"] == "dev";
        if is_ours && !arrow_is_allowed(name, target, for_tests_only) {
            found.push(format!("{name} may not use {target}: see the arrows in xtask/src/tidy.rs"));
        }
    }
    if package["publish"] != Value::Array(vec![]) {
        found.push(format!("{name}: wants `publish.workspace = true` or `publish = false`"));
    }
    let takes_lints =
        manifest.split("[lints]").nth(1).and_then(|rest| rest.lines().find(|line| !line.trim().is_empty()));
    if takes_lints.map(str::trim) != Some("workspace = true") {
        found.push(format!("{name}: wants `[lints]` with `workspace = true`"));
    }
    found
}

fn arrow_is_allowed(from: &str, to: &str, for_tests_only: bool) -> bool {
    if to == "bulbil-types" || (to == TESTKIT && for_tests_only) {
        return true;
    }
    ARROWS.iter().any(|(name, targets)| *name == from && targets.contains(&to))
}

fn readmes() -> Result<Vec<String>> {
    let read = |name: &str| {
        std::fs::read_to_string(workspace_root().join(name))
            .with_context(|| format!("cannot read {name}: both languages must exist"))
    };
    Ok(compare_readmes(&read("README.md")?, &read("README.zh-CN.md")?))
}

/// The headings' levels and the code blocks of a Markdown text.
#[derive(Default, PartialEq, Eq)]
struct Outline {
    levels: Vec<usize>,
    code_blocks: Vec<String>,
}

fn outline(markdown: &str) -> Outline {
    let mut outline = Outline::default();
    let mut block: Option<String> = None;
    for line in markdown.lines() {
        match (&mut block, line.trim_start().starts_with("```")) {
            (None, true) => block = Some(format!("{}\n", line.trim())),
            (Some(_), true) => outline.code_blocks.extend(block.take()),
            (Some(text), false) => *text += &format!("{line}\n"),
            (None, false) if line.starts_with('#') => {
                outline.levels.push(line.chars().take_while(|c| *c == '#').count())
            }
            (None, false) => {}
        }
    }
    outline
}

fn compare_readmes(english: &str, chinese: &str) -> Vec<String> {
    let (english, chinese) = (outline(english), outline(chinese));
    let mut found = Vec::new();
    if english.levels != chinese.levels {
        let (en, zh) = (english.levels.len(), chinese.levels.len());
        found.push(format!("README.md has {en} headings and README.zh-CN.md {zh}, or their levels differ"));
    }
    if english.code_blocks.len() != chinese.code_blocks.len() {
        let (en, zh) = (english.code_blocks.len(), chinese.code_blocks.len());
        found.push(format!("README.md has {en} code blocks and README.zh-CN.md {zh}"));
    }
    for (number, (en, zh)) in english.code_blocks.iter().zip(&chinese.code_blocks).enumerate() {
        if en != zh {
            found.push(format!("code block {} differs between the READMEs:\n{en}", number + 1));
        }
    }
    found
}

/// What no file may name, and how long one may be.
fn file_contents() -> Result<Vec<String>> {
    let root = workspace_root();
    let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let files = Cmd::new("git").args(list).quiet().hint("run this in a git checkout").read()?;
    let mut found = Vec::new();
    for name in files.split('\0').filter(|name| !name.is_empty() && !NOT_OURS.contains(name)) {
        // A file may be deleted but not yet committed as such, and binary files have no words.
        let Ok(text) = std::fs::read_to_string(root.join(name)) else { continue };
        found.extend(forbidden_words(name, &text, &root));
        let lines = text.lines().count();
        if Path::new(name).extension().is_some_and(|extension| extension == "rs") && lines > MAX_RUST_LINES {
            found.push(format!("{name}: {lines} lines, {MAX_RUST_LINES} at most"));
        }
    }
    Ok(found)
}

fn forbidden_words(name: &str, text: &str, checkout: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let place = || format!("{name}:{number}");
        if let Some(host) = REGISTRY_HOSTS.iter().map(|parts| parts.join(".")).find(|host| line.contains(host)) {
            found.push(format!("{}: names the registry host {host}", place()));
        }
        if names_a_home(line) {
            found.push(format!("{}: names a home directory", place()));
        }
        if line.contains(&format!("{}/", checkout.display())) {
            found.push(format!("{}: names the folder of this checkout", place()));
        }
    }
    found
}

fn names_a_home(line: &str) -> bool {
    let users = line.split(concat!("/ho", "me/")).skip(1);
    let of_a_person = |user: &str| user.starts_with(|c: char| c.is_ascii_lowercase()) && !in_a_guest(user);
    users.into_iter().any(of_a_person)
        || line.contains(concat!("/Us", "ers/"))
        || line.contains(concat!("/root/.", "cargo"))
}

fn in_a_guest(rest_of_path: &str) -> bool {
    let user =
        rest_of_path.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '_')).next().unwrap_or_default();
    HOMES_IN_GUESTS.contains(&user)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn arrows_between_crates_lints_and_publishing() {
        assert_eq!(crates().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn both_readmes_have_the_same_shape() {
        assert_eq!(readmes().unwrap(), Vec::<String>::new());
    }

    #[test]
    fn no_file_names_a_home_or_a_registry_or_is_too_long() {
        assert_eq!(file_contents().unwrap(), Vec::<String>::new());
    }

    fn check_arrow(from: &str, dependency: Value) -> Vec<String> {
        let package = json!({"name": from, "publish": [], "dependencies": [dependency]});
        check_crate(&package, "[lints]\nworkspace = true\n")
    }

    #[test]
    fn an_arrow_that_points_up_is_found() {
        let found = check_arrow("bulbil-store", json!({"name": "bulbil-volume", "path": "x", "kind": null}));
        assert_eq!(found, ["bulbil-store may not use bulbil-volume: see the arrows in xtask/src/tidy.rs"]);
    }

    #[test]
    fn testkit_is_for_tests_only() {
        assert!(check_arrow("bulbil-vm", json!({"name": TESTKIT, "path": "x", "kind": "dev"})).is_empty());
        assert_eq!(check_arrow("bulbil-vm", json!({"name": TESTKIT, "path": "x", "kind": null})).len(), 1);
    }

    #[test]
    fn a_crate_without_lints_or_open_to_publishing_is_found() {
        let package = json!({"name": "bulbil-x", "publish": null, "dependencies": []});
        assert_eq!(check_crate(&package, "[lints.rust]\n").len(), 2);
    }

    #[test]
    fn translated_code_and_missing_headings_are_found() {
        assert!(compare_readmes("# A\ntext\n```\nls\n```\n", "# 甲\n文\n```\nls\n```\n").is_empty());
        assert_eq!(compare_readmes("# A\n## B\n```\nls\n```\n", "# 甲\n```\nls -l\n```\n").len(), 2);
        assert_eq!(compare_readmes("```sh\n# no heading\n```\n", "```sh\n# no heading\n```\n").len(), 0);
    }

    #[test]
    fn homes_of_people_are_found_and_those_in_guests_are_not() {
        let home = |user: &str| format!("see {}{user}/x", concat!("/ho", "me/"));
        assert!(names_a_home(&home("alice")));
        assert!(!names_a_home(&home("debian")));
        assert!(!names_a_home("/home/$USER"));
    }

    #[test]
    fn a_registry_host_is_found() {
        let line = format!("get https://{}/x", REGISTRY_HOSTS[0].join("."));
        assert_eq!(forbidden_words("a.md", &line, Path::new("/checkout")).len(), 1);
    }
}
