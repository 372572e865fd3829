//! What every implementation of `Objects` must do, as one suite that each of them runs.

use std::collections::BTreeSet;

use bulbil_store::{Objects, StoreErrorKind};

use crate::rng::Rng;

/// Threads that put one name at the same time.
const RACERS: usize = 16;

/// Runs the whole suite on objects that are empty.
///
/// # Panics
/// When the contract is broken, with what was expected.
pub fn objects_conformance(objects: &dyn Objects) {
    what_is_put_is_read(objects);
    what_is_missing_or_too_short_is_an_error(objects);
    a_conditional_put_replaces_nothing(objects);
    a_put_replaces(objects);
    lists_are_of_directories_and_whole(objects);
    deleting_leaves_the_rest(objects);
    one_of_many_conditional_puts_wins(objects);
    readers_see_whole_objects(objects);
    ranges_are_read_by_many_threads(objects);
}

#[track_caller]
fn check_kind<T: std::fmt::Debug>(outcome: Result<T, bulbil_store::StoreError>, kind: StoreErrorKind) {
    assert_eq!(outcome.expect_err("an error").kind(), kind);
}

fn what_is_put_is_read(objects: &dyn Objects) {
    let mut rng = Rng::new(1);
    for (name, len) in [("read/empty", 0), ("read/one", 1), ("read/deep/er/x.y_z-1", 5000), ("read/large", 3 << 20)] {
        let bytes = rng.bytes(len);
        assert!(objects.put_if_absent(name, &bytes).unwrap(), "`{name}` was not there");
        assert_eq!(objects.get(name, len as u64).unwrap(), bytes, "`{name}`");
        let half = len / 2;
        assert_eq!(objects.get_range(name, half as u64, len - half).unwrap(), bytes[half..], "end of `{name}`");
        assert_eq!(objects.get_range(name, 0, half).unwrap(), bytes[..half], "beginning of `{name}`");
        assert!(objects.get_range(name, half as u64, 0).unwrap().is_empty(), "nothing of `{name}`");
    }
}

fn what_is_missing_or_too_short_is_an_error(objects: &dyn Objects) {
    objects.put("short/ten", b"0123456789").unwrap();
    check_kind(objects.get("short/none", 10), StoreErrorKind::NotFound);
    check_kind(objects.get_range("short/none", 0, 1), StoreErrorKind::NotFound);
    check_kind(objects.get_range("short/none", 0, 0), StoreErrorKind::NotFound);
    check_kind(objects.get("short", 10), StoreErrorKind::NotFound);
    check_kind(objects.get("short/ten", 9), StoreErrorKind::Corrupt);
    check_kind(objects.get_range("short/ten", 5, 6), StoreErrorKind::Corrupt);
    check_kind(objects.get_range("short/ten", 10, 1), StoreErrorKind::Corrupt);
    check_kind(objects.get_range("short/ten", 1 << 40, 1), StoreErrorKind::Corrupt);
    objects.put("short/empty", b"").unwrap();
    check_kind(objects.get_range("short/empty", 0, 1), StoreErrorKind::Corrupt);
}

fn a_conditional_put_replaces_nothing(objects: &dyn Objects) {
    assert!(objects.put_if_absent("once/x", b"first").unwrap());
    assert!(!objects.put_if_absent("once/x", b"other").unwrap(), "the same length, other bytes");
    assert!(!objects.put_if_absent("once/x", b"").unwrap());
    assert!(!objects.put_if_absent("once/x", b"first and more").unwrap());
    assert!(objects.put_if_absent("once/x", b"first").unwrap(), "the same bytes count as stored");
    assert_eq!(objects.get("once/x", 99).unwrap(), b"first");
}

fn a_put_replaces(objects: &dyn Objects) {
    objects.put("many/x", b"a long first content").unwrap();
    objects.put("many/x", b"short").unwrap();
    assert_eq!(objects.get("many/x", 99).unwrap(), b"short");
    objects.delete("many/x").unwrap();
    assert!(objects.put_if_absent("many/x", b"again").unwrap(), "a deleted name is free");
}

fn lists_are_of_directories_and_whole(objects: &dyn Objects) {
    assert_eq!(objects.list("nowhere").unwrap(), []);
    let mut expected = BTreeSet::new();
    for i in 0..45_u64 {
        let name = format!("list/{:02}/{i}", i % 7);
        objects.put(&name, &vec![1; i as usize]).unwrap();
        expected.insert((name, i));
    }
    // Beginning with the same letters is not being below.
    objects.put("list-not/x", b"x").unwrap();
    objects.put("listx", b"x").unwrap();
    let list = |directory: &str| -> BTreeSet<_> {
        let found = objects.list(directory).unwrap();
        let count = found.len();
        let set: BTreeSet<_> = found.into_iter().collect();
        assert_eq!(set.len(), count, "nothing is in a list twice");
        set
    };
    assert_eq!(list("list"), expected);
    let below: BTreeSet<_> = expected.iter().filter(|(name, _)| name.starts_with("list/03/")).cloned().collect();
    assert_eq!(list("list/03"), below);
    assert_eq!(list("list/0"), BTreeSet::new());
}

fn deleting_leaves_the_rest(objects: &dyn Objects) {
    for name in ["delete/x", "delete/x1", "delete/y"] {
        objects.put(name, b"x").unwrap();
    }
    objects.delete("delete/x").unwrap();
    objects.delete("delete/x").unwrap();
    objects.delete("delete/never/there").unwrap();
    let left: BTreeSet<_> = objects.list("delete").unwrap().into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, ["delete/x1", "delete/y"].map(str::to_owned).into());
    check_kind(objects.get("delete/x", 9), StoreErrorKind::NotFound);
}

fn one_of_many_conditional_puts_wins(objects: &dyn Objects) {
    for round in 0..5 {
        let name = format!("race/{round}");
        let put = |racer: usize| objects.put_if_absent(&name, &[racer as u8; 20_000]).unwrap();
        let won: Vec<_> = std::thread::scope(|scope| {
            let racers: Vec<_> = (0..RACERS).map(|racer| scope.spawn(move || put(racer))).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let winners: Vec<_> = (0..RACERS).filter(|racer| won[*racer]).collect();
        assert_eq!(winners.len(), 1, "exactly one of {RACERS} wins: {winners:?}");
        assert_eq!(objects.get(&name, 1 << 20).unwrap(), [winners[0] as u8; 20_000], "the winner's bytes are there");
    }
}

fn readers_see_whole_objects(objects: &dyn Objects) {
    let content = |version: u8| vec![version; 100_000 + usize::from(version)];
    objects.put("whole/x", &content(0)).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| (1..20).for_each(|version| objects.put("whole/x", &content(version)).unwrap()));
        for _ in 0..20 {
            let read = objects.get("whole/x", 1 << 20).unwrap();
            assert_eq!(read, content(read[0]), "an old content or a new one, and all of it");
        }
    });
}

fn ranges_are_read_by_many_threads(objects: &dyn Objects) {
    let bytes = Rng::new(2).bytes(1 << 20);
    objects.put("ranges/x", &bytes).unwrap();
    std::thread::scope(|scope| {
        for seed in 0..8 {
            let bytes = &bytes;
            scope.spawn(move || {
                let mut rng = Rng::new(seed);
                for _ in 0..25 {
                    let offset = rng.below(1 << 20) as usize;
                    let len = rng.below(((1 << 20) - offset) as u64 + 1) as usize;
                    let read = objects.get_range("ranges/x", offset as u64, len).unwrap();
                    assert!(read == bytes[offset..offset + len], "{len} bytes at {offset}, seed {seed}");
                }
            });
        }
    });
}
