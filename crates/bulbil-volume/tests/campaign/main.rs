//! Whole lives of stores, images and volumes on several hosts at the same time, with everything going wrong that
//! may: nothing acknowledged is lost, no wrong byte is served, nothing in use is collected, the store always opens.
//!
//! docs/design/campaign.md says what is modelled, and what is not. `BULBIL_CAMPAIGN_SCHEDULES` is the number of
//! schedules; `BULBIL_CAMPAIGN_SEED` the seed of the first one; `BULBIL_CAMPAIGN_BACKING` (`memory`, `mount`, `s3`) has
//! all of them in one kind of store; `BULBIL_CAMPAIGN_VERBOSE` tells each step.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "a test may panic and makes small numbers"
)]

mod backing;
mod disk;
mod figures;
mod host;
mod host_volume;
mod machine;
mod rest;
mod volume_steps;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use self::backing::Servers;
use self::figures::Figures;
use self::host::Host;
use self::world::World;

/// One schedule: hosts do what the seed says, then everything is checked.
fn run_schedule(seed: u64, directory: &Path, servers: &Servers) -> Figures {
    let world = World::new(seed, directory, servers);
    let hosts: Vec<_> = (0..world.actors).map(|actor| Host::new(&world, actor)).collect();
    let hosts: Vec<_> = std::thread::scope(|scope| {
        let run = |mut host: Host| {
            let world = &world;
            move || {
                let outcome = catch_unwind(AssertUnwindSafe(|| host.run(world)));
                world.host_is_done(host.actor);
                outcome.map(|()| host).unwrap_or_else(|panic| resume_unwind(panic))
            }
        };
        let threads: Vec<_> = hosts.into_iter().map(|host| scope.spawn(run(host))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    rest::check(&world, hosts);
    world.finish()
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number")))
}

#[test]
fn nothing_acknowledged_is_lost_and_no_wrong_byte_served_whatever_crashes_and_fails() {
    let schedules = from_environment("BULBIL_CAMPAIGN_SCHEDULES", 120);
    let first = from_environment("BULBIL_CAMPAIGN_SEED", 1);
    println!("seeds {first} to {}", first + schedules - 1);
    let shared_memory = Path::new("/dev/shm");
    let next = AtomicU64::new(first);
    let total = Mutex::new(Figures::default());
    let servers = Servers::default();
    let worker = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= first + schedules {
                return;
            }
            // Index and cache need not reach a disk here.
            let directory = match shared_memory.is_dir() {
                true => tempfile::tempdir_in(shared_memory),
                false => tempfile::tempdir(),
            };
            let directory = directory.unwrap();
            let done = catch_unwind(AssertUnwindSafe(|| run_schedule(seed, directory.path(), &servers)));
            // The others need not go on.
            let done = done.unwrap_or_else(|panic| {
                next.store(u64::MAX / 2, Ordering::Relaxed);
                println!("seed {seed} failed; again: BULBIL_CAMPAIGN_SEED={seed} BULBIL_CAMPAIGN_SCHEDULES=1");
                resume_unwind(panic)
            });
            total.lock().unwrap().add(&done);
        }
    };
    std::thread::scope(|scope| (0..2).for_each(|_| drop(scope.spawn(worker))));
    println!("{schedules} schedules\n{}", total.lock().unwrap());
}
