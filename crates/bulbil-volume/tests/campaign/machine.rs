//! A machine whose processes keep the stores and their volumes on one file system, which loses power.

use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex};

use bulbil_testkit::{MountFaults, PowerLossMachine, PowerLossMount, Rng, Schedule};

pub(crate) struct Machine {
    machine: PowerLossMachine,
    mounts: Vec<PowerLossMount>,
    observer: PowerLossMount,
    power: Mutex<Power>,
    restarted: Condvar,
}

/// Who must have noticed that the power is lost before it comes back.
struct Power {
    running: usize,
    waiting: usize,
    restarts: u64,
}

impl Machine {
    pub(crate) fn new(directory: &Path, actors: usize, rng: &mut Rng) -> Self {
        let machine = PowerLossMachine::new(rng.next_u64());
        let mount = |name: &str, is_observer| {
            let path = directory.join(format!("mount-{name}"));
            std::fs::create_dir(&path).unwrap();
            machine.mount(&path, is_observer)
        };
        let mounts: Vec<_> = (0..actors).map(|actor| mount(&actor.to_string(), false)).collect();
        let observer = mount("observer", true);
        (0..actors).for_each(|actor| std::fs::create_dir(observer.path().join(format!("host-{actor}"))).unwrap());
        std::fs::File::open(observer.path()).unwrap().sync_all().unwrap();
        let mut often = |n| if rng.one_in(2) { 0 } else { n };
        machine.set_faults(MountFaults { no_space: often(150), failed_io: often(400) });
        let power = Mutex::new(Power { running: actors, waiting: 0, restarts: 0 });
        Self { machine, mounts, observer, power, restarted: Condvar::new() }
    }

    /// The file system as a process of a host sees it.
    pub(crate) fn path(&self, actor: usize) -> &Path {
        self.mounts[actor].path()
    }

    /// The same, without faults.
    pub(crate) fn observer(&self) -> &Path {
        self.observer.path()
    }

    /// The directory of a host.
    pub(crate) fn host_directory(&self, actor: usize) -> PathBuf {
        self.path(actor).join(format!("host-{actor}"))
    }

    /// Lets a process be killed, or the power be lost, in the middle of something.
    pub(crate) fn arm(&self, actor: usize, rng: &mut Rng) {
        if rng.one_in(3) {
            self.mounts[actor].set_fuse(rng.below(1500));
        }
        if rng.one_in(4) {
            self.machine.set_fuse(rng.below(3000));
        }
    }

    /// Which boot of the machine this is.
    pub(crate) fn boot_id(&self) -> String {
        format!("boot {}", self.power.lock().unwrap().restarts)
    }

    pub(crate) fn is_dead(&self, actor: usize) -> bool {
        self.mounts[actor].is_dead()
    }

    /// Another process of a host begins. Where the power is lost, the machine starts again when all its processes
    /// have ended. Whether it was lost.
    pub(crate) fn restart(&self, actor: usize, schedule: &Schedule) -> bool {
        if !self.machine.is_off() {
            self.mounts[actor].kill_process();
            return false;
        }
        schedule.finish(actor);
        let mut power = self.power.lock().unwrap();
        power.waiting += 1;
        let restarts = power.restarts;
        self.start_again(&mut power);
        while power.restarts == restarts {
            power = self.restarted.wait(power).unwrap();
        }
        drop(power);
        schedule.begin(actor);
        true
    }

    /// A host has done all it had to.
    pub(crate) fn finish(&self) {
        let mut power = self.power.lock().unwrap();
        power.running -= 1;
        if self.machine.is_off() {
            self.start_again(&mut power);
        }
    }

    fn start_again(&self, power: &mut Power) {
        if power.waiting == power.running {
            self.machine.lose_power();
            power.waiting = 0;
            power.restarts += 1;
            self.restarted.notify_all();
        }
    }

    pub(crate) fn settle(&self) {
        self.machine.set_faults(MountFaults::default());
    }

    pub(crate) fn faults(&self) -> std::collections::BTreeMap<&'static str, u64> {
        self.machine.faults()
    }
}
