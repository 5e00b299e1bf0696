//! Ranks on GPUs, without a GPU: real processes with the real `NcclLink`, over stand-ins for libnccl and libcuda
//! (tests/fake-nccl) that the loader finds in the place of the real ones.
//!
//! `NCCL_RUNS=2000` disturbs as many groups as that. `NCCL_REAL=1` runs what needs no fault over the machine's own libraries, on as many
//! GPUs as there are ranks.
#![allow(clippy::unwrap_used)] // clippy.toml allows it in tests, and takes only functions marked #[test] for tests

use std::collections::BTreeSet;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use models::blocks::{Layout, RankGroup};
use models::model_dir::ModelDir;
use models::registry::{self, Limits, LoadSpec, Rank};
use parallel::mesh::{Link, Mesh};
use parallel::nccl::NcclLink;
use parallel::tcp::Tcp;
use parallel::{Device, InProcess};
use tests::cluster::Process;
use tests::nccl::{self, PATIENCE};

/// For an exchange where a rank is not to come in time.
const SHORT: Duration = Duration::from_millis(400);

/// A folder with stand-ins, and the ranks that find them.
struct Group {
    folder: tempfile::TempDir,
    libraries: PathBuf,
    real: bool,
    ranks: Vec<Process>,
}

/// What a rank said, and how it ended.
#[derive(Debug)]
struct Said {
    out: String,
    err: String,
    ended: bool,
}

impl Group {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let libraries = folder.path().join("lib");
        std::fs::create_dir(&libraries).unwrap();
        let real = std::env::var("NCCL_REAL").is_ok_and(|real| real == "1");
        if !real {
            for name in ["libnccl.so", "libcuda.so"] {
                symlink(stand_in(), libraries.join(name)).unwrap();
            }
        }
        Self { folder, libraries, real, ranks: Vec::new() }
    }

    /// With stand-ins, whatever is asked for: real libraries do not fail on demand.
    fn with_stand_ins() -> Option<Self> {
        Some(Self::new()).filter(|group| !group.real)
    }

    /// Starts a rank.
    fn start(&mut self, [rank, size]: [usize; 2], limit: Duration, task: &str, env: &[(&str, &str)]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nccl-rank"));
        command.arg(self.folder.path());
        command.args([rank.to_string(), size.to_string(), limit.as_millis().to_string(), task.to_owned()]);
        command.env("RAYON_NUM_THREADS", "1").envs(env.iter().copied());
        if !self.real {
            command.env("LD_LIBRARY_PATH", &self.libraries).env("FAKE_NCCL_DIR", self.folder.path());
        }
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        self.ranks.push(Process(child));
    }

    /// Starts all ranks; `env` goes to the one it names.
    fn run(mut self, size: usize, limit: Duration, task: &str, env: &[(usize, &str, &str)]) -> Vec<Said> {
        for rank in 0..size {
            let env: Vec<_> = env.iter().filter(|(to, ..)| *to == rank).map(|(_, key, value)| (*key, *value)).collect();
            self.start([rank, size], limit, task, &env);
        }
        self.end()
    }

    /// Starts all ranks, and returns when the last says that it has joined.
    fn run_until_joined(&mut self, size: usize, limit: Duration, task: &str) {
        (0..size).for_each(|rank| self.start([rank, size], limit, task, &[]));
        let mut said = [0; 7];
        self.ranks[size - 1].0.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        assert_eq!(said, *b"joined\n");
    }

    /// Waits for every rank; one that has not ended by itself in time hangs.
    fn end(&mut self) -> Vec<Said> {
        let readers: Vec<_> =
            self.ranks.iter_mut().map(|rank| (read(rank.0.stdout.take()), read(rank.0.stderr.take()))).collect();
        let deadline = Instant::now() + PATIENCE;
        let ended: Vec<bool> =
            self.ranks.iter_mut().map(|rank| rank.wait(deadline.saturating_duration_since(Instant::now())).is_some()).collect();
        self.ranks.iter_mut().for_each(Process::kill);
        let said = readers.into_iter().zip(ended);
        said.map(|((out, err), ended)| Said { out: out.join().unwrap(), err: err.join().unwrap(), ended }).collect()
    }
}

fn read(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        pipe.unwrap().read_to_string(&mut text).unwrap();
        text
    })
}

impl Said {
    /// The kind of the first error.
    fn error(&self) -> &str {
        let line = self.out.lines().find_map(|line| line.strip_prefix("error "));
        line.and_then(|line| line.split(':').next()).unwrap_or_default()
    }
}

/// The library that cargo built beside this test.
fn stand_in() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libfake_nccl.so")
}

/// A copy of the stand-in in which nobody finds `symbol`.
fn without(symbol: &str, to: &Path) {
    let mut library = std::fs::read(stand_in()).unwrap();
    let name = [symbol.as_bytes(), &[0]].concat();
    let places: Vec<usize> = (0..library.len() - name.len()).filter(|at| library[*at..].starts_with(&name)).collect();
    assert!(!places.is_empty(), "the stand-in has no {symbol}");
    places.into_iter().for_each(|at| library[at] = b'X');
    std::fs::write(to, library).unwrap();
}

/// No rank hangs or panics.
fn assert_orderly(said: &[Said], case: &str) {
    for (rank, said) in said.iter().enumerate() {
        assert!(said.ended, "{case}: rank {rank} hangs: {said:?}");
        assert!(!said.err.contains("panicked"), "{case}: rank {rank}: {said:?}");
    }
}

/// Runs `f` on every rank of a group of threads.
fn in_threads<T: Send>(size: usize, f: impl Fn(InProcess) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let f = &f;
        let ranks: Vec<_> = InProcess::group(size).into_iter().map(|link| scope.spawn(move || f(link))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

#[test]
fn every_collective_has_the_bits_of_ranks_that_are_threads() {
    for size in [2, 4] {
        let expected = in_threads(size, |link| nccl::collectives(&Mesh::whole(Arc::new(link))).unwrap());
        let said = Group::new().run(size, PATIENCE, "collectives", &[]);
        assert_orderly(&said, "collectives");
        for (rank, (said, expected)) in said.iter().zip(expected).enumerate() {
            let lines: Vec<&str> = said.out.lines().collect();
            let expected: Vec<String> = expected.into_iter().map(|(name, value)| format!("{name} {value}")).collect();
            assert_eq!(lines[..expected.len().min(lines.len())], expected, "rank {rank} of {size}: {}", said.err);
            let before = parallel::Tensor::full(((rank + size - 1) % size) as f32, (3, 5), &Device::Cpu).unwrap();
            let ring = format!("ring {}", nccl::show(&before).unwrap());
            assert_eq!(lines[expected.len()..], [ring.as_str(), "done"], "rank {rank} of {size}");
        }
    }
}

#[test]
fn a_model_held_over_nccl_gives_the_bits_of_one_held_by_threads() {
    let layout = Layout::new(2, 1);
    let expected = in_threads(2, |link| {
        let dir = ModelDir::open(&nccl::bundled()).unwrap();
        let group = RankGroup::new(Arc::new(link), layout).unwrap();
        let spec = LoadSpec { dir: &dir, component: nccl::ENCODER, group, device: Device::Cpu, limits: Limits::default() };
        match registry::load(spec, &mut |_| ()).unwrap() {
            Rank::Leader(mut stage) => Some(nccl::encode(&mut *stage).unwrap()),
            Rank::Follower(follower) => {
                drop(follower.run());
                None
            }
        }
    });
    let said = Group::new().run(2, PATIENCE, "model", &[]);
    assert_orderly(&said, "model");
    assert_eq!(said[0].out, format!("embeds {}\ndone\n", expected[0].as_ref().unwrap()), "{}", said[0].err);
}

#[test]
fn a_library_that_cannot_be_used_is_a_typed_error_on_every_rank() {
    let check = |case: &str, spoil: &dyn Fn(&Group), env: &[(usize, &str, &str)], expected: [&str; 2], word: &str| {
        let Some(group) = Group::with_stand_ins() else { return };
        spoil(&group);
        let said = group.run(2, PATIENCE, "exchange", env);
        assert_orderly(&said, case);
        assert_eq!([said[0].error(), said[1].error()], expected, "{case}: {said:?}");
        assert!(said[0].out.contains(word), "{case}: {said:?}");
    };
    for (library, missing) in [("libnccl.so", "libnccl.so cannot be opened"), ("libcuda.so", "libcuda.so cannot be opened")] {
        let spoil = |group: &Group| std::fs::remove_file(group.libraries.join(library)).unwrap();
        check(library, &spoil, &[], ["LibraryMissing"; 2], missing);
    }
    for (library, symbol) in
        [("libnccl.so", "ncclCommInitRankConfig"), ("libnccl.so", "ncclRecv"), ("libcuda.so", "cuStreamQuery")]
    {
        let spoil = |group: &Group| {
            let path = group.libraries.join(library);
            std::fs::remove_file(&path).unwrap();
            without(symbol, &path);
        };
        check(symbol, &spoil, &[], ["SymbolMissing"; 2], symbol);
    }
    let old = [(0, "FAKE_NCCL_VERSION", "21600"), (1, "FAKE_NCCL_VERSION", "2804")];
    check("old", &|_| (), &old, ["LibraryTooOld"; 2], "21600; at least 21700");
    // On one rank alone: the other learns that it is gone.
    check("old leader", &|_| (), &old[..1], ["LibraryTooOld", "PeerLost"], "21600; at least 21700");
    let blocking = [(0, "NCCL_COMM_BLOCKING", "1"), (1, "NCCL_COMM_BLOCKING", "1")];
    check("blocking", &|_| (), &blocking, ["Gpu"; 2], "NCCL_COMM_BLOCKING is \"1\"");
}

/// One rank does `fault`; what it says itself, if it lives, and the others.
fn disturb(size: usize, fault: &str) -> Option<Vec<Said>> {
    let said = Group::with_stand_ins()?.run(size, SHORT, "exchange", &[(size - 1, "FAKE_NCCL_FAULT", fault)]);
    assert_orderly(&said, fault);
    for (rank, said) in said[..size - 1].iter().enumerate() {
        assert!(matches!(said.error(), "PeerLost" | "Stalled"), "{fault}: rank {rank} of {size}: {said:?}");
    }
    Some(said)
}

/// What every link is, whatever it is made of; asked of the compiler.
fn contract<L: Link + std::fmt::Debug + 'static>() -> &'static str {
    std::any::type_name::<L>()
}

#[test]
fn the_nccl_link_is_a_twin_of_the_others_joins_without_blocking_and_is_dropped_without_a_panic() {
    let twins = [contract::<InProcess>(), contract::<Tcp>(), contract::<NcclLink>()];
    assert_eq!(twins.iter().collect::<BTreeSet<_>>().len(), 3);
    // The same contract to the bit.
    let expected = in_threads(2, |link| nccl::collectives(&Mesh::whole(Arc::new(link))).unwrap());
    let said = Group::new().run(2, PATIENCE, "collectives", &[]);
    assert_orderly(&said, "contract");
    for (rank, expected) in expected.iter().enumerate() {
        let expected: Vec<String> = expected.iter().map(|(name, value)| format!("{name} {value}")).collect();
        let got: Vec<&str> = said[rank].out.lines().take(expected.len()).collect();
        assert_eq!(got, expected, "rank {rank}: {}", said[rank].err);
    }
    // A rank that never comes back from joining: the others are told in time, and so is it.
    let Some(said) = disturb(2, "hang") else { return };
    assert!(said.iter().all(|said| matches!(said.error(), "PeerLost" | "Stalled")), "{said:?}");
    // A library that cannot even give a communicator up: told, and not a panic on the way out.
    let Some(said) = disturb(2, "abort:1") else { return };
    assert_eq!(said[1].error(), "Gpu", "{said:?}");
    assert!(said[1].err.contains("could not abort a communicator"), "{said:?}");
    // A function that is not there.
    let Some(group) = Group::with_stand_ins() else { return };
    let library = group.libraries.join("libnccl.so");
    std::fs::remove_file(&library).unwrap();
    without("ncclCommAbort", &library);
    let said = group.run(2, PATIENCE, "exchange", &[]);
    assert_orderly(&said, "a function that is not there");
    assert!(said.iter().all(|said| said.error() == "SymbolMissing"), "{said:?}");
}

#[test]
fn whatever_a_rank_does_every_other_has_a_typed_error_in_time() {
    for size in [2, 4] {
        for fault in ["die", "die:3"] {
            let Some(said) = disturb(size, fault) else { return };
            assert_eq!(said[size - 1].error(), "", "it died: {said:?}");
        }
        for fault in ["error", "error:2", "refuse", "refuse:2", "unknown", "unknown:1", "abort:1"] {
            let Some(said) = disturb(size, fault) else { return };
            assert_eq!(said[size - 1].error(), "Gpu", "{fault}: {said:?}");
        }
        // Who waits longest is told by who leaves first.
        for fault in ["hang", "hang:2"] {
            let Some(said) = disturb(size, fault) else { return };
            assert!(said.iter().any(|said| said.error() == "Stalled"), "{fault}: {said:?}");
            assert!(said.iter().all(|said| matches!(said.error(), "PeerLost" | "Stalled")), "{fault}: {said:?}");
        }
    }
}

#[test]
fn a_rank_that_is_stopped_is_missed_by_its_heartbeat_long_before_an_exchange_gives_up() {
    let Some(mut group) = Group::with_stand_ins() else { return };
    group.run_until_joined(2, PATIENCE * 10, "exchange");
    group.ranks[1].signal("STOP");
    let mut stopped = group.ranks.pop().unwrap();
    let said = group.end();
    stopped.kill();
    assert_orderly(&said, "stopped");
    assert_eq!(said[0].error(), "PeerLost", "{said:?}");
}

#[test]
fn a_group_is_built_again_under_another_epoch_and_id() {
    for (fault, size) in [("die:3", 2), ("error:9", 4)] {
        let Some(mut group) = Group::with_stand_ins() else { return };
        let last = size - 1;
        for rank in 0..size {
            let env = [("FAKE_NCCL_FAULT", fault)];
            group.start([rank, size], PATIENCE, "recover", if rank == last { &env } else { &[] });
        }
        if fault.starts_with("die") {
            group.ranks[last].wait(PATIENCE).unwrap();
            group.ranks.truncate(last);
            group.start([last, size], PATIENCE, "return", &[]);
        }
        let said = group.end();
        assert_orderly(&said, fault);
        let sum = parallel::Tensor::new(&[(size * (size + 1) / 2) as u32], &Device::Cpu).unwrap();
        let sum = format!("sum {}\ndone\n", nccl::show(&sum).unwrap());
        assert!(said.iter().all(|said| said.out.ends_with(&sum)), "{fault}: {said:?}");
        assert!(said[..last].iter().all(|said| said.error() == "PeerLost"), "{fault}: {said:?}");
        let ids = std::fs::read_to_string(group.folder.path().join("ids")).unwrap();
        assert_eq!(ids.lines().collect::<BTreeSet<_>>().len(), 2, "an id an epoch");
    }
}

#[test]
fn no_run_of_many_hangs() {
    let runs = std::env::var("NCCL_RUNS").ok().and_then(|runs| runs.parse().ok()).unwrap_or(200);
    let started = Instant::now();
    for run in 0..runs {
        let size = if run % 4 == 3 { 4 } else { 2 };
        if run % 2 == 0 {
            let kind = ["die", "error", "refuse", "unknown", "abort"][run / 2 % 5];
            if disturb(size, &format!("{kind}:{}", run % 13)).is_none() {
                return;
            }
            continue;
        }
        // From outside, wherever it is.
        let Some(mut group) = Group::with_stand_ins() else { return };
        group.run_until_joined(size, PATIENCE, "exchange");
        group.ranks[run % size].kill();
        let said = group.end();
        assert_orderly(&said, "killed");
        for (rank, said) in said.iter().enumerate().filter(|(rank, _)| *rank != run % size) {
            assert_eq!(said.error(), "PeerLost", "run {run}, rank {rank} of {size}: {said:?}");
        }
    }
    println!("{runs} groups were disturbed in {:.1} s, and none hung", started.elapsed().as_secs_f64());
}

#[test]
fn the_id_of_a_communicator_is_nowhere_in_what_is_said() {
    let Some(mut group) = Group::with_stand_ins() else { return };
    for rank in 0..2 {
        group.start([rank, 2], PATIENCE, "collectives", &[]);
    }
    let said = group.end();
    assert_orderly(&said, "id");
    let ids = std::fs::read_to_string(group.folder.path().join("ids")).unwrap();
    let id: Vec<u8> =
        ids.trim().as_bytes().chunks(2).map(|pair| u8::from_str_radix(&String::from_utf8_lossy(pair), 16).unwrap()).collect();
    assert_eq!(id.len(), 128);
    let text: String = said.iter().flat_map(|said| [said.out.as_str(), said.err.as_str()]).collect();
    assert!(text.contains("NcclLink"), "the link is shown, so that there is something to look at: {text}");
    // Any nine bytes of it, however they are written.
    for part in id.chunks(9).filter(|part| part.len() == 9) {
        let each = |f: &dyn Fn(&u8) -> String, between: &str| part.iter().map(f).collect::<Vec<_>>().join(between);
        for written in [
            each(&|byte| format!("{byte:02x}"), ""),
            each(&|byte| format!("{byte:02X}"), ""),
            each(&|byte| format!("{byte:#04x}"), ", "),
            each(&|byte| byte.to_string(), ", "),
            each(&|byte| (*byte as i8).to_string(), ", "),
            base64(part),
        ] {
            assert!(!text.contains(&written), "the id is in what was said");
        }
    }
}

/// Of a length that divides by three, from a place that does.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = |three: &[u8]| {
        let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(DIGITS[(bits >> shift & 63) as usize]))
    };
    bytes.chunks(3).flat_map(digits).collect()
}
