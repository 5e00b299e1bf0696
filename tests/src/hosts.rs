//! Hosts of their own on this machine: a network namespace each, on one switch. What runs on one has its own loopback and addresses, and
//! reaches the others by a cable that can be pulled.

use std::process::{Command, Stdio};

use crate::cluster::Process;

/// The first three numbers of every address: of no network that this machine is in, since hosts see no other.
const NET: &str = "10.77.0";

/// A switch and hosts on it; all gone when this goes out of sight.
#[derive(Debug)]
pub struct Hosts {
    /// What the names of all of them begin with.
    prefix: String,
    /// The switch's first.
    namespaces: Vec<String>,
}

impl Hosts {
    /// A switch without hosts.
    ///
    /// # Errors
    /// What this machine says if it permits no namespaces to this user.
    pub fn new() -> Result<Self, String> {
        let prefix = format!("at{}", std::process::id());
        let mut hosts = Self { namespaces: Vec::new(), prefix };
        let switch = hosts.namespace("s")?;
        ip(&["-n", &switch, "link", "add", "switch", "type", "bridge"])?;
        ip(&["-n", &switch, "link", "set", "switch", "up"])?;
        Ok(hosts)
    }

    fn namespace(&mut self, name: &str) -> Result<String, String> {
        let namespace = format!("{}{name}", self.prefix);
        ip(&["netns", "add", &namespace])?;
        self.namespaces.push(namespace.clone());
        ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// One more host, with a cable to the switch.
    ///
    /// # Errors
    /// What `ip` says.
    pub fn add(&mut self) -> Result<Host, String> {
        let number = self.namespaces.len();
        let address = format!("{NET}.{number}");
        let (namespace, switch) = (self.namespace(&format!("h{number}"))?, self.namespaces[0].clone());
        let plug = format!("port{number}");
        ip(&["-n", &namespace, "link", "add", "cable", "type", "veth", "peer", "name", &plug, "netns", &switch])?;
        ip(&["-n", &switch, "link", "set", &plug, "master", "switch", "up"])?;
        ip(&["-n", &namespace, "addr", "add", &format!("{address}/24"), "dev", "cable"])?;
        ip(&["-n", &namespace, "link", "set", "cable", "up"])?;
        Ok(Host { namespace, address, switch, plug })
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for namespace in &self.namespaces {
            drop(ip(&["netns", "del", namespace]));
        }
    }
}

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    namespace: String,
    /// By which the others reach it.
    pub address: String,
    switch: String,
    /// Where its cable ends at the switch.
    plug: String,
}

impl Host {
    /// In words that [`Self::from_words`] takes, for another process.
    pub fn to_words(&self) -> String {
        [&self.namespace, &self.address, &self.switch, &self.plug].map(String::as_str).join(" ")
    }

    /// A host that another process made, and keeps.
    pub fn from_words(words: &str) -> Option<Self> {
        let mut words = words.split(' ').map(str::to_owned);
        Some(Self { namespace: words.next()?, address: words.next()?, switch: words.next()?, plug: words.next()? })
    }

    /// A program there, not started.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace]).arg(program).stdin(Stdio::null());
        command
    }

    /// Starts a program there.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self, command: &mut Command) -> Process {
        Process(command.spawn().unwrap_or_else(|error| panic!("on {}: {error}", self.address)))
    }

    /// Pulls the cable out at the switch, or puts it back: neither end is told.
    ///
    /// # Panics
    /// When `ip` cannot.
    pub fn connect(&self, connected: bool) {
        // Out of the bridge, not down: a link that is down tells both ends.
        let of = ["-n", &self.switch, "link", "set", &self.plug];
        let to: &[&str] = if connected { &["master", "switch"] } else { &["nomaster"] };
        ip(&[&of, to].concat()).unwrap_or_else(|error| panic!("{error}"));
    }
}

fn ip(args: &[&str]) -> Result<(), String> {
    let output = Command::new("ip").args(args).stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("`ip` cannot be run ({error}); Debian has it in iproute2"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("`ip {}`: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim()))
}
