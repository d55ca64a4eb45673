//! `customize` and `sysprep`, by virt-customize and virt-sysprep: there is no single call of libguestfs for what they do.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;
use serde_json::json;

use super::args::{ImageArgs, KeySource};
use super::copy::{host_failure, readable};
use super::drive::Drive;
use super::external::Tool;
use super::guest::Access;
use super::output::print_json;
use crate::exit::{Exit, Failure};

const ORDER: &str = "\
Whatever the order of the options, it is done in this one: host name, time zone, users, passwords, keys, folders, files, \
packages (update, install, remove), scripts, commands, first-boot scripts and commands, deletions, SELinux labels.";

#[derive(Debug, Args)]
#[command(after_help = ORDER)]
pub(crate) struct CustomizeArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The image
    #[arg(value_name = "IMAGE")]
    file: PathBuf,

    /// Host name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// Time zone, such as Europe/Berlin
    #[arg(long, value_name = "ZONE")]
    timezone: Option<String>,

    /// Make a user with a home folder
    #[arg(long, value_name = "NAME", value_parser = user_name)]
    user: Vec<String>,

    /// Password of root: prompt, file:PATH, random, disabled or locked
    #[arg(long, value_name = "PASSWORD")]
    root_password: Option<Password>,

    /// Password of another user
    #[arg(long, value_name = "USER:PASSWORD", value_parser = user_password)]
    password: Vec<(String, Password)>,

    /// Let the key in FILE (public half) log in as USER
    #[arg(long, value_name = "USER:FILE", value_parser = user_file)]
    ssh_key: Vec<(String, PathBuf)>,

    /// Make a folder
    #[arg(long, value_name = "FOLDER")]
    mkdir: Vec<OsString>,

    /// Copy files and folders of the host into a folder of the guest
    #[arg(long, value_name = "PATH:FOLDER")]
    copy_in: Vec<OsString>,

    /// Copy a file of the host to a name in the guest
    #[arg(long, value_name = "FILE:NAME")]
    upload: Vec<OsString>,

    /// Update all packages
    #[arg(long)]
    update: bool,

    /// Install packages
    #[arg(long, value_name = "PACKAGE,…")]
    install: Vec<String>,

    /// Remove packages
    #[arg(long, value_name = "PACKAGE,…")]
    remove: Vec<String>,

    /// Run a script of the host inside the guest
    #[arg(long, value_name = "SCRIPT")]
    run: Vec<PathBuf>,

    /// Run a line of shell inside the guest
    #[arg(long, value_name = "LINE")]
    run_command: Vec<OsString>,

    /// Run a script of the host when the guest boots next
    #[arg(long, value_name = "SCRIPT")]
    first_boot: Vec<PathBuf>,

    /// Run a line of shell when the guest boots next
    #[arg(long, value_name = "LINE")]
    first_boot_command: Vec<OsString>,

    /// Delete files and folders
    #[arg(long, value_name = "PATH")]
    delete: Vec<OsString>,

    /// Restore SELinux labels
    #[arg(long)]
    selinux_relabel: bool,

    /// Give the guest network access also when no packages are installed or updated
    #[arg(long)]
    network: bool,
}

pub(crate) fn customize(args: &CustomizeArgs) -> Result<Exit, Failure> {
    let (before, passwords, after) = (args.before_passwords(), args.passwords(), args.after_passwords());
    if before.is_empty() && passwords.is_empty() && after.is_empty() {
        return Err(Failure::usage("customize is told of nothing to do; see diskmill fs customize --help"));
    }
    args.check_files()?;
    let (mut tool, _drive) = image_tool("virt-customize", &args.image, &args.file)?;
    let network = args.network || args.update || !args.install.is_empty();
    tool.arg(if network { "--network" } else { "--no-network" }).args(before);
    for (user, password) in passwords {
        let selector = password.selector(&mut tool, user.unwrap_or("root"))?;
        match user {
            None => tool.arg("--root-password").arg(selector),
            Some(user) => {
                let mut value = OsString::from(format!("{user}:"));
                value.push(selector);
                tool.arg("--password").arg(value)
            }
        };
    }
    tool.args(after);
    finish(tool, &args.image, &args.file)
}

impl CustomizeArgs {
    /// What comes first, in virt-customize's words.
    fn before_passwords(&self) -> Vec<OsString> {
        let mut steps: Vec<OsString> = Vec::new();
        if let Some(name) = &self.hostname {
            steps.extend(["--hostname".into(), name.into()]);
        }
        if let Some(zone) = &self.timezone {
            steps.extend(["--timezone".into(), zone.into()]);
        }
        for user in &self.user {
            steps.extend(["--run-command".into(), format!("useradd --create-home -- {user}").into()]);
        }
        steps
    }

    /// Whose password becomes what; `None` is root.
    fn passwords(&self) -> Vec<(Option<&str>, &Password)> {
        let root = self.root_password.iter().map(|password| (None, password));
        root.chain(self.password.iter().map(|(user, password)| (Some(user.as_str()), password))).collect()
    }

    fn after_passwords(&self) -> Vec<OsString> {
        let mut steps: Vec<OsString> = Vec::new();
        for (user, file) in &self.ssh_key {
            let mut value = OsString::from(format!("{user}:file:"));
            value.push(file);
            steps.extend(["--ssh-inject".into(), value]);
        }
        each(&mut steps, "--mkdir", &self.mkdir);
        each(&mut steps, "--copy-in", &self.copy_in);
        each(&mut steps, "--upload", &self.upload);
        if self.update {
            steps.push("--update".into());
        }
        each(&mut steps, "--install", &self.install);
        each(&mut steps, "--uninstall", &self.remove);
        each(&mut steps, "--run", &self.run);
        each(&mut steps, "--run-command", &self.run_command);
        each(&mut steps, "--firstboot", &self.first_boot);
        each(&mut steps, "--firstboot-command", &self.first_boot_command);
        each(&mut steps, "--delete", &self.delete);
        if self.selinux_relabel {
            steps.push("--selinux-relabel".into());
        }
        steps
    }

    /// Looks for the files of the host before an appliance is started for them.
    fn check_files(&self) -> Result<(), Failure> {
        self.passwords().into_iter().try_for_each(|(_, password)| match password {
            Password::From(source) => source.check(),
            Password::Random | Password::Disabled | Password::Locked => Ok(()),
        })?;
        let keys = self.ssh_key.iter().map(|(_, file)| file);
        keys.chain(&self.run).chain(&self.first_boot).try_for_each(|file| readable(file))?;
        self.upload.iter().try_for_each(|pair| readable(host_part(pair, "--upload takes FILE:NAME")?))?;
        self.copy_in.iter().try_for_each(|pair| {
            let path = host_part(pair, "--copy-in takes PATH:FOLDER")?;
            path.metadata().map(drop).map_err(|error| host_failure(path, &error))
        })
    }
}

/// Adds the option with each of its values.
fn each(steps: &mut Vec<OsString>, option: &str, values: &[impl AsRef<OsStr>]) {
    steps.extend(values.iter().flat_map(|value| [option.into(), value.as_ref().to_owned()]));
}

/// The file of the host in what virt-customize cuts at the first colon.
fn host_part<'p>(pair: &'p OsStr, usage: &str) -> Result<&'p Path, Failure> {
    let bytes = pair.as_bytes();
    let colon = bytes.iter().position(|&byte| byte == b':');
    let file = colon.and_then(|colon| bytes.get(..colon)).filter(|file| !file.is_empty());
    file.map(|file| Path::new(OsStr::from_bytes(file))).ok_or_else(|| Failure::usage(usage))
}

#[derive(Debug, Args)]
pub(crate) struct SysprepArgs {
    #[command(flatten)]
    image: ImageArgs,

    /// The image
    #[arg(value_name = "IMAGE")]
    file: PathBuf,

    /// Only these operations, or with `-` before a name all but it [default: those that virt-sysprep does by itself]
    #[arg(long, value_name = "NAME,…", allow_hyphen_values = true)]
    operations: Option<String>,
}

pub(crate) fn sysprep(args: &SysprepArgs) -> Result<Exit, Failure> {
    let (mut tool, _drive) = image_tool("virt-sysprep", &args.image, &args.file)?;
    if let Some(operations) = &args.operations {
        tool.arg("--operations").arg(operations);
    }
    finish(tool, &args.image, &args.file)
}

/// The tool on an image that may be written. Its QEMU takes the image's lock.
fn image_tool(name: &'static str, args: &ImageArgs, file: &Path) -> Result<(Tool, Drive), Failure> {
    if args.keep {
        return Err(Failure::usage(format!(
            "--keep is not supported by {name}: it has an appliance of its own"
        )));
    }
    // Checked and locked by us; the tool opens it.
    let drive = Drive::open(args, file, Access::Write, false)?;
    let mut tool = Tool::new(name, &args.settings, drive.size())?;
    tool.args(drive.tool_arguments()).keys(&args.key)?;
    if args.quiet || args.json {
        tool.arg("--quiet");
    }
    Ok((tool, drive))
}

fn finish(mut tool: Tool, args: &ImageArgs, file: &Path) -> Result<Exit, Failure> {
    if args.json {
        tool.process().stdout(std::process::Stdio::null());
    }
    tool.run_well()?;
    if args.json {
        return print_json(&json!({ "image": file.to_string_lossy(), "done": true }));
    }
    Ok(Exit::Done)
}

/// A user's new password, never on a command line.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Password {
    From(KeySource),
    Random,
    Disabled,
    Locked,
}

impl Password {
    /// virt-customize's "USERS AND PASSWORDS".
    fn selector(&self, tool: &mut Tool, user: &str) -> Result<OsString, Failure> {
        Ok(match self {
            Self::From(source) => {
                let mut selector = OsString::from("file:");
                selector.push(tool.secret(source, &format!("the user {user}"))?);
                selector
            }
            Self::Random => "random".into(),
            Self::Disabled => "disabled".into(),
            Self::Locked => "locked:disabled".into(),
        })
    }
}

impl FromStr for Password {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match (text, text.strip_prefix("file:")) {
            ("prompt", _) => Self::From(KeySource::Prompt),
            ("random", _) => Self::Random,
            ("disabled", _) => Self::Disabled,
            ("locked", _) => Self::Locked,
            (_, Some(path)) if !path.is_empty() => Self::From(KeySource::File(path.into())),
            _ => {
                return Err("takes prompt, file:PATH, random, disabled or locked; a password on the command line is not \
                            supported: other users could read it"
                    .to_owned());
            }
        })
    }
}

/// What useradd(8) takes everywhere, and nothing that a shell would.
fn user_name(text: &str) -> Result<String, String> {
    let first = text.starts_with(|char: char| char.is_ascii_lowercase() || char == '_');
    let rest =
        text.chars().all(|char| char.is_ascii_lowercase() || char.is_ascii_digit() || "_-".contains(char));
    if first && rest && text.len() <= 32 {
        return Ok(text.to_owned());
    }
    Err("takes lower-case letters, digits, _ and -, a letter or _ first, at most 32".to_owned())
}

fn user_password(text: &str) -> Result<(String, Password), String> {
    let (user, password) = text.split_once(':').ok_or("takes USER:PASSWORD")?;
    Ok((user_name(user)?, password.parse()?))
}

fn user_file(text: &str) -> Result<(String, PathBuf), String> {
    let (user, file) = text.split_once(':').filter(|(_, file)| !file.is_empty()).ok_or("takes USER:FILE")?;
    Ok((user_name(user)?, file.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_never_given_as_such() {
        assert_eq!("file:/p".parse(), Ok(Password::From(KeySource::File("/p".into()))));
        assert_eq!(user_password("bob:locked"), Ok(("bob".into(), Password::Locked)));
        for wrong in ["secret", "password:secret", "file:", ""] {
            assert!(wrong.parse::<Password>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn user_names_are_plain() {
        for wrong in ["", "-x", "a b", "a;reboot", "Bob", "1a", "$(id)"] {
            assert!(user_name(wrong).is_err(), "{wrong}");
        }
        assert!(user_name("_www-data1").is_ok() && user_file("bob:").is_err());
    }
}
