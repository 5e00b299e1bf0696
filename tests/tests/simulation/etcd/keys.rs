//! Keys, their revisions, and the leases that they live under.

use std::{collections::BTreeMap, time::Duration};

use etcd_client::proto::{
    PbCompare, PbCompareTarget, PbDeleteRequest, PbDeleteResponse, PbEvent, PbKeyValue, PbPutRequest, PbPutResponse,
    PbRangeRequest, PbRangeResponse, PbResponseHeader, PbResponseOp, PbTargetUnion, PbTxnOpRequest, PbTxnOpResponse,
    PbTxnRequest, PbTxnResponse,
};
use tonic::Status;

/// What an event is called that says that a key is gone.
const DELETE: i32 = 1;
/// The only comparison that is asked for.
const EQUAL: i32 = 0;

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Duration,
}

/// All of it.
#[derive(Debug)]
pub(super) struct Keys {
    revision: i64,
    entries: BTreeMap<Vec<u8>, PbKeyValue>,
    /// Every change, by revision.
    events: Vec<(i64, PbEvent)>,
    leases: BTreeMap<i64, Lease>,
    granted: i64,
    /// What a write must show of the leader's key is not looked at.
    careless: bool,
}

impl Keys {
    pub(super) fn new(careless: bool) -> Self {
        Self { revision: 1, entries: BTreeMap::new(), events: Vec::new(), leases: BTreeMap::new(), granted: 0, careless }
    }

    pub(super) fn header(&self) -> PbResponseHeader {
        PbResponseHeader { revision: self.revision, ..PbResponseHeader::default() }
    }

    pub(super) fn revision(&self) -> i64 {
        self.revision
    }

    /// Changes from `revision` on of keys in a range.
    pub(super) fn events_from(&self, revision: i64, key: &[u8], end: &[u8]) -> Vec<PbEvent> {
        let after = self.events.partition_point(|(at, _)| *at < revision);
        let events = self.events[after..].iter().map(|(_, event)| event);
        events.filter(|event| event.kv.as_ref().is_some_and(|kv| is_within(&kv.key, key, end))).cloned().collect()
    }

    pub(super) fn range(&self, request: &PbRangeRequest) -> PbRangeResponse {
        let entries = if request.revision == 0 { self.entries.clone() } else { self.as_of(request.revision) };
        let found: Vec<_> = entries.into_values().filter(|kv| is_within(&kv.key, &request.key, &request.range_end)).collect();
        let count = found.len();
        let limit = usize::try_from(request.limit).ok().filter(|limit| *limit > 0).unwrap_or(count);
        let kvs = found.into_iter().take(limit).collect();
        PbRangeResponse { header: Some(self.header()), kvs, more: count > limit, count: count as i64 }
    }

    fn as_of(&self, revision: i64) -> BTreeMap<Vec<u8>, PbKeyValue> {
        let mut entries = BTreeMap::new();
        for (_, event) in self.events.iter().take_while(|(at, _)| *at <= revision) {
            let kv = event.kv.clone().unwrap_or_default();
            if event.r#type == DELETE {
                entries.remove(&kv.key);
            } else {
                entries.insert(kv.key.clone(), kv);
            }
        }
        entries
    }

    pub(super) fn put(&mut self, request: PbPutRequest) -> Result<PbPutResponse, Status> {
        let at = self.revision + 1;
        self.write(at, request)?;
        self.revision = at;
        Ok(PbPutResponse { header: Some(self.header()), prev_kv: None })
    }

    pub(super) fn delete(&mut self, request: &PbDeleteRequest) -> PbDeleteResponse {
        let at = self.revision + 1;
        let deleted = self.remove(at, &request.key, &request.range_end);
        if deleted > 0 {
            self.revision = at;
        }
        PbDeleteResponse { header: Some(self.header()), deleted, prev_kvs: vec![] }
    }

    /// All of it at one revision, or nothing.
    pub(super) fn txn(&mut self, request: PbTxnRequest) -> Result<PbTxnResponse, Status> {
        let mut holds = true;
        for compare in &request.compare {
            holds &= self.compare(compare)?;
        }
        let at = self.revision + 1;
        let mut written = false;
        let mut responses = Vec::new();
        for op in if holds { request.success } else { request.failure } {
            let response = match op.request {
                Some(PbTxnOpRequest::RequestRange(range)) => PbTxnOpResponse::ResponseRange(self.range(&range)),
                Some(PbTxnOpRequest::RequestPut(put)) => {
                    self.write(at, put)?;
                    written = true;
                    PbTxnOpResponse::ResponsePut(PbPutResponse::default())
                }
                Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                    let deleted = self.remove(at, &delete.key, &delete.range_end);
                    written |= deleted > 0;
                    PbTxnOpResponse::ResponseDeleteRange(PbDeleteResponse { deleted, ..PbDeleteResponse::default() })
                }
                _ => return Err(Status::unimplemented("a transaction in a transaction")),
            };
            responses.push(PbResponseOp { response: Some(response) });
        }
        if written {
            self.revision = at;
        }
        Ok(PbTxnResponse { header: Some(self.header()), succeeded: holds, responses })
    }

    fn compare(&self, compare: &PbCompare) -> Result<bool, Status> {
        if compare.result != EQUAL || !compare.range_end.is_empty() {
            return Err(Status::unimplemented("only equality of one key is compared"));
        }
        let entry = self.entries.get(&compare.key);
        match (&compare.target_union, compare.target()) {
            (Some(PbTargetUnion::CreateRevision(wanted)), PbCompareTarget::Create) => {
                Ok(entry.map_or(0, |kv| kv.create_revision) == *wanted || (self.careless && *wanted > 0))
            }
            (Some(PbTargetUnion::ModRevision(wanted)), PbCompareTarget::Mod) => {
                Ok(entry.map_or(0, |kv| kv.mod_revision) == *wanted)
            }
            other => Err(Status::unimplemented(format!("comparing {other:?}"))),
        }
    }

    fn write(&mut self, at: i64, request: PbPutRequest) -> Result<(), Status> {
        if request.lease != 0 && !self.leases.contains_key(&request.lease) {
            return Err(Status::not_found("etcdserver: requested lease not found"));
        }
        let before = self.entries.get(&request.key);
        let kv = PbKeyValue {
            create_revision: before.map_or(at, |kv| kv.create_revision),
            version: before.map_or(1, |kv| kv.version + 1),
            mod_revision: at,
            key: request.key.clone(),
            value: request.value,
            lease: request.lease,
        };
        self.entries.insert(request.key, kv.clone());
        self.events.push((at, PbEvent { r#type: 0, kv: Some(kv), prev_kv: None }));
        Ok(())
    }

    fn remove(&mut self, at: i64, key: &[u8], end: &[u8]) -> i64 {
        let gone: Vec<Vec<u8>> = self.entries.keys().filter(|found| is_within(found, key, end)).cloned().collect();
        for key in &gone {
            self.entries.remove(key);
            let kv = PbKeyValue { key: key.clone(), mod_revision: at, ..PbKeyValue::default() };
            self.events.push((at, PbEvent { r#type: DELETE, kv: Some(kv), prev_kv: None }));
        }
        gone.len() as i64
    }

    pub(super) fn grant(&mut self, now: Duration, seconds: i64) -> i64 {
        self.granted += 1;
        let ttl = Duration::from_secs(u64::try_from(seconds).unwrap_or(1).max(1));
        self.leases.insert(self.granted, Lease { ttl, ends: now + ttl });
        self.granted
    }

    /// The seconds that it lives from now; 0: it is over.
    pub(super) fn keep_alive(&mut self, now: Duration, id: i64) -> i64 {
        self.leases.get_mut(&id).map_or(0, |lease| {
            lease.ends = now + lease.ttl;
            lease.ttl.as_secs() as i64
        })
    }

    pub(super) fn revoke(&mut self, id: i64) -> bool {
        let known = self.leases.remove(&id).is_some();
        let at = self.revision + 1;
        let keys: Vec<Vec<u8>> = self.entries.values().filter(|kv| kv.lease == id).map(|kv| kv.key.clone()).collect();
        for key in &keys {
            self.remove(at, key, &[]);
            self.revision = at;
        }
        known
    }

    /// Leases that are over take their keys with them.
    pub(super) fn expire(&mut self, now: Duration) {
        let over: Vec<i64> = self.leases.iter().filter(|(_, lease)| lease.ends <= now).map(|(id, _)| *id).collect();
        for id in over {
            self.revoke(id);
        }
    }

    pub(super) fn renew_all(&mut self, now: Duration) {
        self.leases.values_mut().for_each(|lease| lease.ends = now + lease.ttl);
    }
}

/// As etcd names ranges: no end is one key, an end of `\0` is all from `key` on.
fn is_within(found: &[u8], key: &[u8], end: &[u8]) -> bool {
    match end {
        [] => found == key,
        [0] => found >= key,
        _ => found >= key && found < end,
    }
}
