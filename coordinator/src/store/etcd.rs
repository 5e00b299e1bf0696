//! The store of several coordinators: one key for each job and each group, written by whoever leads.
//!
//! ```text
//! {prefix}/jobs/{job_id}     = JobRecord, protobuf-encoded
//! {prefix}/groups/{group_id} = GroupRecord, protobuf-encoded
//! ```
//!
//! Batches that wait go into one transaction, one key for each job. It is taken only if the leader's key is still the one
//! that this leader made, and every record's key is as it left it: so nothing of a former leader lands after the takeover,
//! and a transaction whose answer was lost can be sent again without ever landing twice, or late. While etcd is away it
//! is sent again and again, until the lease is lost.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use etcd_client::{Compare, CompareOp, GetOptions, KvClient, Txn, TxnOp, TxnOpResponse, TxnResponse};
use prost::Message;
use proto::v1::{GroupRecord, JobRecord};
use tokio::{sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{error, info, warn};

use super::{Batch, Change, Progress, Recovered, Result, StoreError, StoreHandle};
use crate::{
    config::EtcdConfig,
    leadership::{Fence, Led, RETRY_PAUSE, connect, in_time},
};

/// Most bytes of a job's record in etcd: it is kept in memory there.
pub const MAX_RECORD_BYTES: usize = 72 << 10;
/// Most bytes of the record of a new job: what is left is for how it ends.
pub const MAX_ACCEPTED_BYTES: usize = 64 << 10;
/// Records in one transaction: etcd takes 128 conditions, and one is the fence.
const MAX_RECORDS_PER_WRITE: usize = 120;
/// Bytes of them, beside the record that goes over it: etcd takes 1.5 MiB.
const MAX_BYTES_PER_WRITE: usize = 1 << 20;
/// Records read at once.
const RECORDS_PER_PAGE: i64 = 400;
/// Most bytes of an answer: a page of the largest records.
const MAX_ANSWER_BYTES: usize = RECORDS_PER_PAGE as usize * (MAX_RECORD_BYTES + (1 << 10));

/// How often it is said that etcd refuses what is written.
const SAID_AGAIN: Duration = Duration::from_secs(30);

/// Where jobs are, below the prefix.
const JOBS: &str = "jobs/";
/// Where groups are, below the prefix.
const GROUPS: &str = "groups/";

/// The store of several coordinators.
#[derive(Debug)]
pub struct EtcdStore;

impl EtcdStore {
    /// Reads all jobs and starts the task that writes, for a coordinator that leads. The task ends when the handles are
    /// gone or the lead is lost; the latter is a failure, and final.
    ///
    /// # Errors
    /// [`StoreError::Etcd`], [`StoreError::DamagedKey`].
    pub async fn open(config: &EtcdConfig, led: &Led) -> Result<(StoreHandle, Recovered)> {
        let mut client = keys(config).await.map_err(unavailable)?;
        let found = read_all(&mut client, &format!("{}/{JOBS}", config.prefix), |job: &JobRecord| &job.id).await?;
        let mut revisions: HashMap<_, _> = found.iter().map(|(job, at)| (format!("{JOBS}{}", job.id), *at)).collect();
        let mut jobs: Vec<JobRecord> = found.into_iter().map(|(job, _)| job).collect();
        jobs.sort_by(|a, b| (a.number, &a.id).cmp(&(b.number, &b.id)));
        let found = read_all(&mut client, &format!("{}/{GROUPS}", config.prefix), |group: &GroupRecord| &group.group_id).await?;
        revisions.extend(found.iter().map(|(group, at)| (format!("{GROUPS}{}", group.group_id), *at)));
        let groups = found.into_iter().map(|(group, _)| group).collect();
        let (handle, inbox, progress) = StoreHandle::pair(Some(MAX_ACCEPTED_BYTES));
        let (fence, lost) = (led.fence.clone(), led.lost.clone());
        let writer = Writer { config: config.clone(), client, fence, lost, revisions, waiting: VecDeque::new() };
        tokio::spawn(writer.run(inbox, progress));
        info!(jobs = jobs.len(), term = led.term, "jobs read from etcd");
        Ok((handle, Recovered { jobs, groups, term: led.term }))
    }
}

/// The way to keys, which takes answers as large as may come.
async fn keys(config: &EtcdConfig) -> crate::Result<KvClient> {
    Ok(connect(config).await?.kv_client().max_decoding_message_size(MAX_ANSWER_BYTES))
}

fn unavailable(error: crate::Error) -> StoreError {
    StoreError::Etcd(Box::new(error))
}

/// Every record of a folder with its key's revision, in pages, all as of one moment.
async fn read_all<M: Message + Default>(client: &mut KvClient, folder: &str, id: fn(&M) -> &String) -> Result<Vec<(M, i64)>> {
    let end = format!("{}0", folder.trim_end_matches('/'));
    let (mut from, mut at, mut records) = (folder.as_bytes().to_vec(), 0, Vec::new());
    loop {
        let options = GetOptions::new().with_range(end.clone()).with_limit(RECORDS_PER_PAGE).with_revision(at);
        let page = in_time(client.get(from, Some(options))).await.map_err(unavailable)?;
        at = page.header().map_or(at, |header| if at == 0 { header.revision() } else { at });
        for entry in page.kvs() {
            let key = String::from_utf8_lossy(entry.key()).into_owned();
            let record = M::decode(entry.value());
            let record = record.map_err(|error| StoreError::DamagedKey { key: key.clone(), problem: error.to_string() })?;
            if key.strip_prefix(folder) != Some(id(&record).as_str()) {
                return Err(StoreError::DamagedKey { key, problem: format!("it holds {:?}", id(&record)) });
            }
            records.push((record, entry.mod_revision()));
        }
        let Some(last) = page.kvs().last().filter(|_| page.more()) else { return Ok(records) };
        from = [last.key(), &[0]].concat();
    }
}

/// What a key is to hold; nothing: the key is to be gone.
type Value = Option<Vec<u8>>;

struct Writer {
    config: EtcdConfig,
    client: KvClient,
    fence: Fence,
    lost: CancellationToken,
    /// Of every key below the prefix, as this leader left it; a key that is not here is not in etcd.
    revisions: HashMap<String, i64>,
    waiting: VecDeque<Batch>,
}

impl Writer {
    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Batch>, progress: Progress) {
        let lost = self.lost.clone();
        loop {
            let batch = tokio::select! {
                biased;
                () = lost.cancelled() => return progress.failed(StoreError::Fenced.to_string()),
                batch = inbox.recv() => batch,
            };
            let Some(batch) = batch else { return };
            self.waiting.push_back(batch);
            while let Ok(batch) = inbox.try_recv() {
                self.waiting.push_back(batch);
            }
            while !self.waiting.is_empty() {
                match self.write_some().await {
                    Ok(newest) => progress.durable(newest),
                    Err(failure) => {
                        error!(error = failure.chain(), "nothing more is accepted");
                        return progress.failed(failure.chain());
                    }
                }
            }
        }
    }

    /// Writes the first batch, and those behind it that fit into the same transaction. Gives the newest of them.
    async fn write_some(&mut self) -> Result<u64> {
        let mut values: BTreeMap<String, Value> = BTreeMap::new();
        let (mut newest, mut bytes) = (0, 0);
        while let Some(batch) = self.waiting.front() {
            let is_full = values.len() + batch.changes.len() > MAX_RECORDS_PER_WRITE || bytes > MAX_BYTES_PER_WRITE;
            if newest > 0 && is_full {
                break;
            }
            newest = batch.number;
            let changes = self.waiting.pop_front().map(|batch| batch.changes).unwrap_or_default();
            for change in changes {
                let (name, value) = value_of(change)?;
                bytes += value.as_ref().map_or(0, Vec::len);
                values.insert(name, value);
            }
        }
        // One batch may be more than a transaction takes; it counts when all of it is there.
        let values: Vec<_> = values.into_iter().collect();
        let mut rest = &values[..];
        while !rest.is_empty() {
            let (part, after) = rest.split_at(fitting(rest));
            self.write(part).await?;
            rest = after;
        }
        Ok(newest)
    }

    /// Sends a transaction until it is known what came of it.
    async fn write(&mut self, values: &[(String, Value)]) -> Result<()> {
        let lost = self.lost.clone();
        let (began, mut interrupted, mut said) = (Instant::now(), false, None::<Instant>);
        loop {
            let txn = self.transaction(values);
            let done = tokio::select! {
                biased;
                () = lost.cancelled() => return Err(StoreError::Fenced),
                done = in_time(self.client.txn(txn)) => done,
            };
            match done {
                Ok(done) => return self.learn(values, &done),
                Err(cause) => {
                    let refused = refusal(&cause);
                    match refused {
                        None if interrupted => {}
                        None => warn!(%cause, "writing to etcd was interrupted, it is tried again"),
                        // Such as a store without space, of which leases know nothing: nothing is accepted until it has some.
                        Some(code) if said.is_none_or(|said| said.elapsed() >= SAID_AGAIN) => {
                            let seconds = began.elapsed().as_secs();
                            error!(%cause, ?code, seconds, "etcd refuses what is written, it is tried again");
                            said = Some(Instant::now());
                        }
                        Some(_) => {}
                    }
                    interrupted |= refused.is_none();
                }
            }
            tokio::select! {
                biased;
                () = lost.cancelled() => return Err(StoreError::Fenced),
                () = self.reconnect() => {}
            }
        }
    }

    async fn reconnect(&mut self) {
        tokio::time::sleep(RETRY_PAUSE).await;
        // The old connection may come back by itself; if neither does, the lease ends it.
        if let Ok(client) = keys(&self.config).await {
            self.client = client;
        }
    }

    fn transaction(&self, values: &[(String, Value)]) -> Txn {
        let mut when = vec![self.fence.compare()];
        let mut then = Vec::with_capacity(values.len());
        let mut otherwise = vec![TxnOp::get(self.fence.key.clone(), None)];
        for (name, value) in values {
            let key = self.key(name);
            let revision = self.revisions.get(name).copied().unwrap_or(0);
            when.push(Compare::mod_revision(key.clone(), CompareOp::Equal, revision));
            otherwise.push(TxnOp::get(key.clone(), None));
            then.push(match value {
                Some(value) => TxnOp::put(key, value.clone(), None),
                None => TxnOp::delete(key, None),
            });
        }
        Txn::new().when(when).and_then(then).or_else(otherwise)
    }

    /// Takes in what became of a transaction.
    fn learn(&mut self, values: &[(String, Value)], done: &TxnResponse) -> Result<()> {
        if done.succeeded() {
            let revision = done.header().map_or(0, |header| header.revision());
            for (name, value) in values {
                self.left(name, value.as_ref().map(|_| revision));
            }
            return Ok(());
        }
        // Refused: because somebody else leads, or because it had landed before and only the answer was lost.
        let found = done.op_responses();
        let mut found = found.iter().map(|response| match response {
            TxnOpResponse::Get(found) => found.kvs().first(),
            _ => None,
        });
        let leads = found.next().flatten().is_some_and(|leader| leader.create_revision() == self.fence.revision);
        if !leads {
            return Err(StoreError::Fenced);
        }
        for (name, value) in values {
            let found = found.next().flatten();
            if found.map(|entry| entry.value()) != value.as_deref() {
                return Err(StoreError::DamagedKey {
                    key: self.key(name),
                    problem: "somebody who does not lead has written it".into(),
                });
            }
            self.left(name, found.map(|entry| entry.mod_revision()));
        }
        Ok(())
    }

    fn left(&mut self, name: &str, revision: Option<i64>) {
        match revision {
            Some(revision) => drop(self.revisions.insert(name.to_owned(), revision)),
            None => drop(self.revisions.remove(name)),
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.config.prefix)
    }
}

/// The code of an answer, where waiting alone makes nothing better.
fn refusal(cause: &crate::Error) -> Option<Code> {
    match cause {
        crate::Error::Etcd(etcd_client::Error::GRpcStatus(status)) => Some(status.code())
            .filter(|code| !matches!(code, Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown)),
        _ => None,
    }
}

/// How many of them, from the first, go into one transaction; at least one.
fn fitting(values: &[(String, Value)]) -> usize {
    let mut bytes = 0;
    let within = values.iter().take(MAX_RECORDS_PER_WRITE).take_while(|(_, value)| {
        let fits = bytes <= MAX_BYTES_PER_WRITE;
        bytes += value.as_ref().map_or(0, Vec::len);
        fits
    });
    within.count()
}

/// The key below the prefix, and what it is to hold.
fn value_of(change: Change) -> Result<(String, Value)> {
    match change {
        Change::Forget { job_id } => Ok((format!("{JOBS}{job_id}"), None)),
        Change::Group(record) => Ok((format!("{GROUPS}{}", record.group_id), Some(record.encode_to_vec()))),
        Change::Put(record) => {
            let bytes = record.encoded_len();
            if bytes > MAX_RECORD_BYTES {
                return Err(StoreError::TooLarge { job_id: record.id, bytes, limit: MAX_RECORD_BYTES });
            }
            Ok((format!("{JOBS}{}", record.id), Some(record.encode_to_vec())))
        }
    }
}
