//! The public API of the library, as its documentation shows it, is what `tests/public_api.txt` says: nothing becomes
//! public, changes or goes without that being seen in a diff. After a change that is meant:
//!
//! `DISKMILL_RENEW=1 cargo test --test public_api`
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "test code")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use diskmill_testkit::{Cmd, skip, workspace_root};

/// Documentation of another compiler may be laid out in another way.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn the_public_api_is_as_recorded() {
    let version = Cmd::new("rustc").arg("--version").dir(workspace_root()).ok().out();
    if !version.starts_with(COMPILER) {
        return skip(&format!("the record is of {COMPILER}*, this is {version}"));
    }
    let api = api(&document());
    let record = workspace_root().join("tests/public_api.txt");
    if std::env::var_os("DISKMILL_RENEW").is_some() {
        fs::write(&record, &api).unwrap();
    }
    let recorded = fs::read_to_string(&record).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<Vec<_>>();
    let (api, recorded) = (lines(&api), lines(&recorded));
    let gone: Vec<_> = recorded.iter().filter(|line| !api.contains(line)).collect();
    let new: Vec<_> = api.iter().filter(|line| !recorded.contains(line)).collect();
    assert!(
        gone.is_empty() && new.is_empty(),
        "gone: {gone:#?}\nnew: {new:#?}\nIf that is meant: DISKMILL_RENEW=1 cargo test --test public_api"
    );
}

/// Documents the library alone, what is private left out, in a place of its own.
fn document() -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("public-api");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Cmd::new(cargo)
        .args(["doc", "--quiet", "--package", "diskmill", "--lib", "--no-deps", "--target-dir"])
        .arg(&dir)
        .dir(workspace_root())
        .limit(Duration::from_secs(1200))
        .ok();
    dir.join("doc/diskmill")
}

/// All items, with what they look like.
fn api(doc: &Path) -> String {
    let all = fs::read_to_string(doc.join("all.html")).unwrap();
    let mut lines = Vec::new();
    let mut modules = vec![doc.join("index.html")];
    for link in between(&all, "<li><a href=\"", "\"") {
        let (folder, file) = link.rsplit_once('/').unwrap_or(("", link));
        let index = doc.join(folder).join("index.html");
        if !modules.contains(&index) {
            modules.push(index);
        }
        let Some((kind, name)) = file.strip_suffix(".html").and_then(|file| file.split_once('.')) else {
            continue;
        };
        let module = if folder.is_empty() { String::new() } else { folder.replace('/', "::") + "::" };
        item(&mut lines, &format!("{kind} {module}{name}"), &fs::read_to_string(doc.join(link)).unwrap());
    }
    for module in modules {
        let page = fs::read_to_string(module).unwrap();
        lines.extend(
            between(&page, "<dt id=\"reexport", "</dt>").map(|text| format!("re-export: {}", plain(text))),
        );
    }
    lines.sort();
    lines.dedup();
    lines.join("\n") + "\n"
}

/// The declaration of an item, its own methods, and the traits that it has.
fn item(lines: &mut Vec<String>, name: &str, page: &str) {
    let mut line = |text: &str| {
        let text = plain(text);
        // The compiler's own.
        if !text.starts_with("impl StructuralPartialEq") {
            lines.push(format!("{name}: {text}"));
        }
    };
    between(page, "<pre class=\"rust item-decl\">", "</pre>").for_each(&mut line);
    let (own, traits) = page.split_once("id=\"trait-implementations-list\"").unwrap_or((page, ""));
    for section in between(own, "<section id=\"", "</section>") {
        if section.contains("class=\"method\"") || section.contains("class=\"associatedconstant\"") {
            between(section, "<h4 class=\"code-header\">", "</h4>").for_each(&mut line);
        }
    }
    let (traits, _) = traits.split_once("id=\"synthetic-implementations\"").unwrap_or((traits, ""));
    between(traits, "<h3 class=\"code-header\">", "</h3>").for_each(&mut line);
}

/// What stands between each `start` and the `end` that follows.
fn between<'t>(text: &'t str, start: &'t str, end: &'t str) -> impl Iterator<Item = &'t str> {
    text.split(start).skip(1).filter_map(move |rest| rest.split_once(end).map(|(inside, _)| inside))
}

/// Without tags, and with each white space as one blank.
fn plain(html: &str) -> String {
    let html =
        html.split_once('>').filter(|(before, _)| !before.contains('<')).map_or(html, |(_, rest)| rest);
    let mut text = String::new();
    for (index, part) in html.split('<').enumerate() {
        let shown = if index == 0 { part } else { part.split_once('>').map_or("", |(_, shown)| shown) };
        // The label of what is folded is not part of the code.
        if !(part.starts_with("span>Show ") || part.starts_with("summary")) {
            text += shown;
        }
    }
    let text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'");
    text.replace("&amp;", "&").split_whitespace().collect::<Vec<_>>().join(" ")
}
