//! `cargo xtask quickstart`: from a fresh clone to a running instance.
//!
//! Can be run again: what is built stays built, what is imported stays imported, and an earlier
//! instance of the same name is removed first.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::images::{Image, Profile, build};
use crate::run::{Cmd, Steps, cargo, print_data, say, workspace_root};
use crate::setup;

const IMAGE: &str = "debian-12";
const INSTANCE: &str = "hello";

/// What stock cloud-init does on the first boot.
const USER_DATA: &str = "\
#cloud-config
write_files:
  - path: /etc/hello
    content: |
      hello from user data
";

/// What shows that host name, user data and key took effect.
const LOOK: &str = "hostname; cat /etc/hello; tail -n 1 ~/.ssh/authorized_keys; cloud-init status";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave the instance running
    #[arg(long)]
    keep: bool,
    /// Where Bulbil keeps its data (default: target/quickstart-data)
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Do not look for system packages
    #[arg(long)]
    skip_setup: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let root = workspace_root();
    let bulbil = Bulbil {
        program: root.join("target/release/bulbil"),
        data_dir: args.data_dir.clone().unwrap_or_else(|| root.join("target/quickstart-data")),
    };
    say("1 system packages   2 release build   3 Debian image   4 import   5 launch   6 look inside");
    let mut steps = Steps::new();
    if !args.skip_setup {
        steps.step("1 system packages", || setup::ensure(false))?;
    }
    steps.step("2 release build", || cargo().args(["build", "--locked", "--release", "--package", "bulbil"]).run())?;
    let mut disk = PathBuf::new();
    steps.step("3 Debian image", || {
        disk = build(Image::Debian { profile: Profile::Fast, rebuilt: false }, false)?.with_extension("qcow2");
        Ok(())
    })?;
    steps.step("4 import", || bulbil.import(&disk))?;
    steps.step("5 launch", || bulbil.launch())?;
    let mut said = String::new();
    steps.step("6 look inside", || {
        said = bulbil.look_inside()?;
        Ok(())
    })?;
    bulbil.finish(args.keep)?;
    steps.print_times();
    say("\nWhat the guest said over SSH: its host name, a file out of the user data, the key, cloud-init's verdict");
    print_data(said.trim_end())
}

struct Bulbil {
    program: PathBuf,
    data_dir: PathBuf,
}

impl Bulbil {
    fn cmd(&self, args: &[&str]) -> Cmd {
        Cmd::new(&self.program).shown_as("bulbil").env("BULBIL_DATA_DIR", &self.data_dir).args(args)
    }

    /// Whether a listing has an entry of this name.
    fn lists(&self, listing: &[&str], name: &str) -> Result<bool> {
        let text = self.cmd(&[listing, &["-o", "json"]].concat()).quiet().read()?;
        let value: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("bulbil {} wrote no JSON", listing.join(" ")))?;
        Ok(has_name(&value, name))
    }

    fn import(&self, disk: &Path) -> Result<()> {
        std::fs::create_dir_all(&self.data_dir)
            .with_context(|| format!("cannot create {}", self.data_dir.display()))?;
        if self.lists(&["list"], INSTANCE)? {
            self.cmd(&["rm", INSTANCE, "--force"]).run()?;
        }
        // The image may have been built anew since an earlier run.
        if self.lists(&["image", "list"], IMAGE)? {
            self.cmd(&["image", "rm", IMAGE]).run()?;
        }
        self.cmd(&["image", "import"]).args([disk.as_os_str(), "--as".as_ref(), IMAGE.as_ref()]).run()
    }

    fn launch(&self) -> Result<()> {
        let user_data = self.data_dir.join("hello.yaml");
        write_file(&user_data, USER_DATA)?;
        self.cmd(&["launch", IMAGE, "--name", INSTANCE, "--wait", "ready", "--user-data"])
            .args([&user_data])
            .hint(format!("see what the guest said: {} logs {INSTANCE}", self.typed()))
            .run()
    }

    fn look_inside(&self) -> Result<String> {
        self.cmd(&["exec", INSTANCE, "--", "sh", "-c", LOOK]).read()
    }

    fn finish(&self, keep: bool) -> Result<()> {
        if !keep {
            self.cmd(&["rm", INSTANCE, "--force"]).run()?;
            self.cmd(&["shutdown"]).run()?;
            say(format!(
                "\nThe instance is gone, the image stays. To keep one: cargo xtask quickstart --keep, or\n  {} launch {IMAGE}",
                self.typed()
            ));
            return Ok(());
        }
        let bulbil = self.typed();
        say(format!(
            "\n{INSTANCE} is running. Go on with:\n  {bulbil} shell {INSTANCE}\n  {bulbil} list\n  {bulbil} rm {INSTANCE} --force"
        ));
        Ok(())
    }

    /// The start of a command line that reaches the same data.
    fn typed(&self) -> String {
        let root = workspace_root();
        let short = |path: &Path| path.strip_prefix(&root).unwrap_or(path).display().to_string();
        format!("BULBIL_DATA_DIR={} {}", short(&self.data_dir), short(&self.program))
    }
}

/// Whether some object in `value` has this `name`.
fn has_name(value: &serde_json::Value, name: &str) -> bool {
    match value {
        serde_json::Value::Array(items) => items.iter().any(|item| has_name(item, name)),
        serde_json::Value::Object(fields) => {
            fields.get("name").is_some_and(|found| found == name) || fields.values().any(|item| has_name(item, name))
        }
        _ => false,
    }
}

#[expect(clippy::disallowed_methods, reason = "a file for one run: losing it costs nothing")]
fn write_file(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_are_found_wherever_a_listing_has_its_entries() {
        assert!(has_name(&json!([{"name": "hello"}]), "hello"));
        assert!(has_name(&json!({"instances": [{"name": "a"}, {"name": "hello"}]}), "hello"));
        assert!(!has_name(&json!([{"name": "other", "id": "hello"}]), "hello"));
    }
}
