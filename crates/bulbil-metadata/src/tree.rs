//! The tree of values. Listings are generated from it, so whatever is listed can be asked for.
//!
//! One listed entry that answers 404 costs an EC2 guest everything: cloud-init retries it six
//! times and then gives up the whole tree (`cloudinit/sources/helpers/ec2.py`).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;

/// A directory or a value.
#[derive(Debug, Clone)]
pub enum Node {
    /// A directory, answered with a listing.
    Dir(Dir),
    /// A value.
    Leaf(Leaf),
}

/// A value and what it is served as. `Debug` shows the size only.
#[derive(Clone)]
pub struct Leaf {
    /// The bytes of the answer.
    pub body: Bytes,
    /// The media type of the answer.
    pub content_type: &'static str,
}

impl Leaf {
    /// A value served as `text/plain`.
    #[must_use]
    pub fn text(value: impl Into<Bytes>) -> Self {
        Self { body: value.into(), content_type: "text/plain" }
    }

    /// Bytes served as they are, as `application/octet-stream`.
    #[must_use]
    pub fn octets(value: impl Into<Bytes>) -> Self {
        Self { body: value.into(), content_type: "application/octet-stream" }
    }
}

impl fmt::Debug for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Leaf({} bytes, {})", self.body.len(), self.content_type)
    }
}

/// How a directory shows one of its entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listed {
    /// By its name, with `/` after a directory.
    ByName,
    /// As this text; `0=name` in `public-keys/`, a version without `/` at the root.
    As(String),
    /// Not at all, though it answers.
    Hidden,
}

#[derive(Debug, Clone)]
struct Child {
    node: Arc<Node>,
    listed: Listed,
}

/// A directory: entries sorted by name.
#[derive(Debug, Clone, Default)]
pub struct Dir {
    children: BTreeMap<String, Child>,
}

impl Dir {
    /// An empty directory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `node` at `name`, which is one path segment, and lists it by name.
    pub fn insert(&mut self, name: impl Into<String>, node: Node) {
        self.attach(name, Arc::new(node), Listed::ByName);
    }

    /// Puts a node that may also stand elsewhere at `name`, shown as `listed` says.
    pub fn attach(&mut self, name: impl Into<String>, node: Arc<Node>, listed: Listed) {
        self.children.insert(name.into(), Child { node, listed });
    }

    /// Puts a text value at `path`, whose segments are separated by `/`, making directories on the way.
    pub fn set(&mut self, path: &str, value: impl Into<Bytes>) {
        match path.split_once('/') {
            Some((name, rest)) => self.subdir(name).set(rest, value),
            None => self.insert(path, Node::Leaf(Leaf::text(value))),
        }
    }

    /// The directory at `name`, made (in place of a value, if there is one) when it is missing.
    pub fn subdir(&mut self, name: &str) -> &mut Dir {
        let empty = || Child { node: Arc::new(Node::Dir(Dir::new())), listed: Listed::ByName };
        let child = self.children.entry(name.to_owned()).or_insert_with(empty);
        let node = Arc::make_mut(&mut child.node);
        if matches!(node, Node::Leaf(_)) {
            *node = Node::Dir(Dir::new());
        }
        match node {
            Node::Dir(dir) => dir,
            Node::Leaf(_) => unreachable!("it was made a directory just now"),
        }
    }

    /// The entry names as a client sees them: one a line, no newline at the end.
    ///
    /// The missing last newline matters: botocore uses a one-line listing as the next path element.
    #[must_use]
    pub fn listing(&self) -> Bytes {
        let lines: Vec<String> = self.children.iter().filter_map(|(name, child)| label(name, child)).collect();
        Bytes::from(lines.join("\n"))
    }

    /// The entry at `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Node> {
        self.children.get(name).map(|child| child.node.as_ref())
    }

    /// Every entry, listed or not.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.children.iter().map(|(name, child)| (name.as_str(), child.node.as_ref()))
    }

    /// The node under the path made of `segments`; `None` if there is none.
    pub(crate) fn find<'a, 'n>(&'n self, segments: impl IntoIterator<Item = &'a str>) -> Option<Found<'n>> {
        let mut found = Found::Dir(self);
        for segment in segments {
            found = match found {
                Found::Dir(dir) => match dir.get(segment)? {
                    Node::Dir(dir) => Found::Dir(dir),
                    Node::Leaf(leaf) => Found::Leaf(leaf),
                },
                Found::Leaf(_) => return None,
            };
        }
        Some(found)
    }
}

/// What a path leads to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found<'n> {
    Dir(&'n Dir),
    Leaf(&'n Leaf),
}

fn label(name: &str, child: &Child) -> Option<String> {
    match (&child.listed, child.node.as_ref()) {
        (Listed::Hidden, _) => None,
        (Listed::As(text), _) => Some(text.clone()),
        (Listed::ByName, Node::Dir(_)) => Some(format!("{name}/")),
        (Listed::ByName, Node::Leaf(_)) => Some(name.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listings_mark_directories_and_end_without_a_newline() {
        let mut dir = Dir::new();
        dir.set("placement/region", "r");
        dir.set("ami-id", "a");
        dir.attach("0", Arc::new(Node::Dir(Dir::new())), Listed::As("0=me".to_owned()));
        dir.attach("all", Arc::new(Node::Leaf(Leaf::text("x"))), Listed::Hidden);
        assert_eq!(dir.listing(), "0=me\nami-id\nplacement/");
        assert_eq!(Dir::new().listing(), "");
    }

    #[test]
    fn paths_lead_through_directories_only() {
        let mut dir = Dir::new();
        dir.set("a/b", "value");
        assert!(matches!(dir.find(["a", "b"]), Some(Found::Leaf(leaf)) if leaf.body == "value"));
        assert!(matches!(dir.find(["a"]), Some(Found::Dir(_))));
        assert!(dir.find(["a", "b", "c"]).is_none());
        assert!(dir.find(["a", ""]).is_none());
        assert!(dir.find([".."]).is_none());
    }

    #[test]
    fn debug_of_a_value_shows_its_size_only() {
        assert_eq!(format!("{:?}", Leaf::octets("hunter2")), "Leaf(7 bytes, application/octet-stream)");
    }
}
