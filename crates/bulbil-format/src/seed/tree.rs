//! The directory tree of a seed disk, with the two names of every entry.

#![allow(clippy::indexing_slicing, reason = "every index is one this module has handed out for the same tree")]

use super::{MAX_SEED_ENTRIES, SeedError};

/// The depth ISO 9660 allows, the root included.
const MAX_DEPTH: usize = 8;
/// The length Joliet allows.
const MAX_NAME_LEN: usize = 64;
/// The characters Joliet does not allow, beside the control characters and `/`.
const FORBIDDEN: &str = "*:;?\\";

/// A directory or file.
#[derive(Debug, Default)]
pub(super) struct Node<'a> {
    /// The name as given.
    pub(super) name: &'a str,
    /// The name in the primary tree: `BASE.EXT;1` in upper case, at most 8 and 3 characters.
    pub(super) short_name: String,
    pub(super) parent: usize,
    /// The content of a file; `None` for a directory.
    pub(super) content: Option<&'a [u8]>,
    pub(super) children: Vec<usize>,
}

/// All nodes; the first is the root, and a directory comes before what it holds.
#[derive(Debug)]
pub(super) struct Tree<'a> {
    pub(super) nodes: Vec<Node<'a>>,
}

impl<'a> Tree<'a> {
    pub(super) fn build(files: &[(&'a str, &'a [u8])]) -> Result<Self, SeedError> {
        let mut tree = Self { nodes: vec![Node::default()] };
        for (path, content) in files {
            tree.add(path, content)?;
        }
        Ok(tree)
    }

    fn add(&mut self, path: &'a str, content: &'a [u8]) -> Result<(), SeedError> {
        let duplicate = || SeedError::Duplicate { path: path.to_owned() };
        let (parts, name) = split(path)?;
        let mut directory = 0;
        for part in parts {
            directory = match self.find(directory, part) {
                None => self.push(directory, part, None)?,
                Some(node) if self.nodes[node].content.is_none() => node,
                Some(_) => return Err(duplicate()),
            };
        }
        match self.find(directory, name) {
            None => self.push(directory, name, Some(content)).map(|_| ()),
            Some(_) => Err(duplicate()),
        }
    }

    fn find(&self, directory: usize, name: &str) -> Option<usize> {
        self.nodes[directory].children.iter().copied().find(|child| self.nodes[*child].name == name)
    }

    fn push(&mut self, parent: usize, name: &'a str, content: Option<&'a [u8]>) -> Result<usize, SeedError> {
        if self.nodes.len() > MAX_SEED_ENTRIES {
            return Err(SeedError::TooLarge);
        }
        let short_name = self.unused_short_name(parent, name, content.is_some());
        let index = self.nodes.len();
        self.nodes.push(Node { name, short_name, parent, content, children: Vec::new() });
        self.nodes[parent].children.push(index);
        Ok(index)
    }

    fn unused_short_name(&self, parent: usize, name: &str, is_file: bool) -> String {
        let siblings = &self.nodes[parent].children;
        let taken = |name: &str| siblings.iter().any(|sibling| self.nodes[*sibling].short_name == name);
        // There are fewer entries than numbers, so one of them is free.
        let mut candidates = (0..=MAX_SEED_ENTRIES).map(|number| short_name(name, is_file, number));
        candidates.find(|candidate| !taken(candidate)).unwrap_or_default()
    }

    /// The directories in the order of a path table: by depth, then by parent, then by name.
    pub(super) fn directories(&self, name_of: impl for<'n> Fn(&'n Node<'a>) -> &'n str) -> Vec<usize> {
        let mut order = vec![0];
        let mut at = 0;
        while let Some(directory) = order.get(at).copied() {
            let children = self.sorted_children(directory, &name_of);
            order.extend(children.into_iter().filter(|child| self.nodes[*child].content.is_none()));
            at += 1;
        }
        order
    }

    /// What a directory holds, by name.
    pub(super) fn sorted_children(
        &self,
        directory: usize,
        name_of: impl for<'n> Fn(&'n Node<'a>) -> &'n str,
    ) -> Vec<usize> {
        let mut children = self.nodes[directory].children.clone();
        children.sort_by(|a, b| name_of(&self.nodes[*a]).cmp(name_of(&self.nodes[*b])));
        children
    }
}

/// Splits a path into its directories and its last part.
fn split(path: &str) -> Result<(Vec<&str>, &str), SeedError> {
    let mut parts: Vec<&str> = path.split('/').collect();
    let valid = parts.len() < MAX_DEPTH && parts.iter().all(|part| is_name(part));
    match parts.pop() {
        Some(name) if valid => Ok((parts, name)),
        _ => Err(SeedError::Path { path: path.to_owned() }),
    }
}

fn is_name(part: &str) -> bool {
    let printable = part.chars().all(|c| (c.is_ascii_graphic() || c == ' ') && !FORBIDDEN.contains(c));
    printable && (1..=MAX_NAME_LEN).contains(&part.len()) && part != "." && part != ".."
}

/// Makes a name of the first interchange level; `number` tells apart names that would be the same.
fn short_name(name: &str, is_file: bool, number: usize) -> String {
    let clean = |text: &str, len: usize| -> String {
        let chars = text.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' });
        chars.take(len).collect()
    };
    let (base, extension) = if is_file { name.rsplit_once('.').unwrap_or((name, "")) } else { (name, "") };
    let base = match number {
        0 => clean(base, 8),
        number => format!("{}{number:03}", clean(base, 4)),
    };
    let base = if base.is_empty() { "_".to_owned() } else { base };
    if is_file { format!("{base}.{};1", clean(extension, 3)) } else { base }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_names_are_of_the_first_level_and_differ() {
        let files: Vec<(&str, &[u8])> =
            vec![("meta-data", b""), ("meta_data", b""), ("meta_data.json", b""), (".x", b""), ("a.b/c", b"")];
        let tree = Tree::build(&files).unwrap();
        let names: Vec<_> = tree.nodes.iter().skip(1).map(|node| node.short_name.as_str()).collect();
        assert_eq!(names, ["META_DAT.;1", "META001.;1", "META_DAT.JSO;1", "_.X;1", "A_B", "C.;1"]);
    }

    #[test]
    fn paths_are_checked() {
        for path in ["", "/a", "a/", "a//b", "..", "a/../b", "a:b", "é", "a\0", "1/2/3/4/5/6/7/8", &"x".repeat(65)] {
            assert!(matches!(Tree::build(&[(path, b"")]), Err(SeedError::Path { .. })), "{path:?}");
        }
        for paths in [["a", "a"], ["a", "a/b"], ["a/b", "a"]] {
            let files = paths.map(|path| (path, b"".as_slice()));
            assert!(matches!(Tree::build(&files), Err(SeedError::Duplicate { .. })), "{paths:?}");
        }
    }
}
