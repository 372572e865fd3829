//! `cargo xtask setup`: checks for system packages and installs the missing ones.

use anyhow::{Result, bail};

use crate::packages::{INSTALL_FIRST, Need, PACKAGES, Package};
use crate::run::{Cmd, find_program, print_data, say};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Also install what only tests and measurements need
    #[arg(long)]
    tests: bool,
    /// Only say what is missing; fails when something is
    #[arg(long)]
    check: bool,
    /// Print every package with its reason, and stop
    #[arg(long, conflicts_with_all = ["tests", "check"])]
    list: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.list {
        return list();
    }
    let missing = missing(args.tests);
    if missing.is_empty() {
        say("every system package is there");
        return Ok(());
    }
    for package in &missing {
        say(format!("missing: {:<24} {}", package.name, package.reason));
    }
    let names: Vec<_> = missing.iter().map(|package| package.name).collect();
    if args.check {
        bail!("{} packages are missing\nhint: cargo xtask setup", names.len());
    }
    install(&names)?;
    let still: Vec<_> = self::missing(args.tests).iter().map(|package| package.name).collect();
    if !still.is_empty() {
        bail!("apt-get succeeded, but these are still missing: {}", still.join(" "));
    }
    Ok(())
}

/// Installs what running Bulbil and building images needs, and with `tests` what those need.
pub(crate) fn ensure(tests: bool) -> Result<()> {
    run(&Args { tests, check: false, list: false })
}

fn list() -> Result<()> {
    for package in PACKAGES {
        let state = if package.is_present() { "present" } else { "missing" };
        print_data(format!("{:<24} {state}  {}", package.name, package.reason))?;
    }
    Ok(())
}

fn missing(tests: bool) -> Vec<&'static Package> {
    let root = is_root();
    let wanted = |need| match need {
        Need::Run | Need::Images => true,
        Need::ImagesWithoutRoot => !root,
        Need::Tests => tests,
    };
    PACKAGES.iter().filter(|package| wanted(package.need) && !package.is_present()).collect()
}

fn install(names: &[&str]) -> Result<()> {
    let by_hand = || {
        let groups = install_groups(names);
        let lines = groups.iter().map(|group| format!("sudo {}", apt_install(group).join(" ")));
        std::iter::once("sudo apt-get update".to_owned()).chain(lines).collect::<Vec<_>>().join(" && ")
    };
    if find_program("apt-get").is_none() {
        bail!("this machine has no apt-get\nhint: install what these Debian packages hold: {}", names.join(" "));
    }
    if !is_root() && !Cmd::new("sudo").args(["-n", "true"]).succeeds() {
        bail!("installing packages needs root\nhint: {}", by_hand());
    }
    // A list of packages may be old or absent: installing then fails, and says so.
    as_root(&["apt-get", "update"]).hint("check this machine's network and apt sources").run()?;
    for group in install_groups(names) {
        as_root(&apt_install(&group)).hint(format!("try it by hand: {}", by_hand())).run()?;
    }
    Ok(())
}

/// The packages in the order in which apt must see them: see [`INSTALL_FIRST`].
fn install_groups<'a>(names: &[&'a str]) -> Vec<Vec<&'a str>> {
    let (first, mut rest): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| **name == INSTALL_FIRST);
    if !first.is_empty() && !rest.contains(&"qemu-utils") {
        // Present now, but perhaps not after the first.
        rest.push("qemu-utils");
    }
    [first, rest].into_iter().filter(|group| !group.is_empty()).collect()
}

fn apt_install<'a>(names: &[&'a str]) -> Vec<&'a str> {
    [&["apt-get", "install", "-y", "--no-install-recommends"], names].concat()
}

fn as_root(words: &[&str]) -> Cmd {
    let quiet_questions = ["env", "DEBIAN_FRONTEND=noninteractive"];
    let (program, prefix): (_, &[&str]) = if is_root() {
        ("env", &quiet_questions[1..])
    } else {
        ("sudo", &["-n", "env", "DEBIAN_FRONTEND=noninteractive"])
    };
    Cmd::new(program).args(prefix).args(words)
}

fn is_root() -> bool {
    Cmd::new("id").args(["-u"]).quiet().read().is_ok_and(|uid| uid.trim() == "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulator_is_installed_before_the_tools_it_may_push_out() {
        assert_eq!(install_groups(&["fio", "qemu-system-x86"]), [vec!["qemu-system-x86"], vec!["fio", "qemu-utils"]]);
        assert_eq!(install_groups(&["qemu-utils", "fio"]), [vec!["qemu-utils", "fio"]]);
    }
}
