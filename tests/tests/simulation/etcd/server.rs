//! The services.

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbDeleteRequest, PbDeleteResponse, PbKvService, PbLeaseGrantRequest,
    PbLeaseGrantResponse, PbLeaseKeepAliveRequest, PbLeaseKeepAliveResponse, PbLeaseLeasesRequest, PbLeaseLeasesResponse,
    PbLeaseRevokeRequest, PbLeaseRevokeResponse, PbLeaseService, PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse,
    PbPutRequest, PbPutResponse, PbRangeRequest, PbRangeResponse, PbRangeStreamResponse, PbTxnRequest, PbTxnResponse,
    PbWatchRequest, PbWatchRequestUnion, PbWatchResponse, PbWatchService,
};
use futures::{Stream, StreamExt, stream::BoxStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{Etcd, now};

/// Responses that wait for a slow reader.
const MAX_RESPONSES: usize = 256;
/// The watch of a response that is about all watches of a stream.
const EVERY_WATCH: i64 = -1;

fn unused<T>() -> Result<T, Status> {
    Err(Status::unimplemented("nobody here asks for it"))
}

#[tonic::async_trait]
impl PbKvService for Etcd {
    type RangeStreamStream = BoxStream<'static, Result<PbRangeStreamResponse, Status>>;

    async fn range(&self, request: Request<PbRangeRequest>) -> Result<Response<PbRangeResponse>, Status> {
        Ok(Response::new(self.lock().range(request.get_ref())))
    }

    async fn range_stream(&self, _: Request<PbRangeRequest>) -> Result<Response<Self::RangeStreamStream>, Status> {
        unused()
    }

    async fn put(&self, request: Request<PbPutRequest>) -> Result<Response<PbPutResponse>, Status> {
        let put = self.lock().put(request.into_inner())?;
        self.written.notify_waiters();
        Ok(Response::new(put))
    }

    async fn delete_range(&self, request: Request<PbDeleteRequest>) -> Result<Response<PbDeleteResponse>, Status> {
        let deleted = self.lock().delete(request.get_ref());
        self.written.notify_waiters();
        Ok(Response::new(deleted))
    }

    async fn txn(&self, request: Request<PbTxnRequest>) -> Result<Response<PbTxnResponse>, Status> {
        let done = self.lock().txn(request.into_inner())?;
        self.written.notify_waiters();
        Ok(Response::new(done))
    }

    async fn compact(&self, _: Request<PbCompactionRequest>) -> Result<Response<PbCompactionResponse>, Status> {
        unused()
    }
}

#[tonic::async_trait]
impl PbLeaseService for Etcd {
    type LeaseKeepAliveStream = BoxStream<'static, Result<PbLeaseKeepAliveResponse, Status>>;

    async fn lease_grant(&self, request: Request<PbLeaseGrantRequest>) -> Result<Response<PbLeaseGrantResponse>, Status> {
        let ttl = request.get_ref().ttl;
        let mut keys = self.lock();
        let id = keys.grant(now(), ttl);
        Ok(Response::new(PbLeaseGrantResponse { header: Some(keys.header()), id, ttl, error: String::new() }))
    }

    async fn lease_revoke(&self, request: Request<PbLeaseRevokeRequest>) -> Result<Response<PbLeaseRevokeResponse>, Status> {
        let header = {
            let mut keys = self.lock();
            if !keys.revoke(request.get_ref().id) {
                return Err(Status::not_found("etcdserver: requested lease not found"));
            }
            keys.header()
        };
        self.written.notify_waiters();
        Ok(Response::new(PbLeaseRevokeResponse { header: Some(header) }))
    }

    async fn lease_keep_alive(
        &self,
        request: Request<Streaming<PbLeaseKeepAliveRequest>>,
    ) -> Result<Response<Self::LeaseKeepAliveStream>, Status> {
        let etcd = self.clone();
        let answers = request.into_inner().map(move |asked| {
            let id = asked?.id;
            let mut keys = etcd.lock();
            let ttl = keys.keep_alive(now(), id);
            Ok(PbLeaseKeepAliveResponse { header: Some(keys.header()), id, ttl })
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn lease_time_to_live(
        &self,
        _: Request<PbLeaseTimeToLiveRequest>,
    ) -> Result<Response<PbLeaseTimeToLiveResponse>, Status> {
        unused()
    }

    async fn lease_leases(&self, _: Request<PbLeaseLeasesRequest>) -> Result<Response<PbLeaseLeasesResponse>, Status> {
        unused()
    }
}

#[tonic::async_trait]
impl PbWatchService for Etcd {
    type WatchStream = ReceiverStream<Result<PbWatchResponse, Status>>;

    async fn watch(&self, request: Request<Streaming<PbWatchRequest>>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, responses) = mpsc::channel(MAX_RESPONSES);
        tokio::spawn(self.clone().tell(request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(responses)))
    }
}

/// One watch of a stream.
struct Watch {
    id: i64,
    key: Vec<u8>,
    end: Vec<u8>,
    /// The first revision that it was not told of.
    next: i64,
}

impl Etcd {
    /// A stream of watches, until either end is gone.
    async fn tell(
        self,
        mut requests: impl Stream<Item = Result<PbWatchRequest, Status>> + Unpin,
        sender: mpsc::Sender<Result<PbWatchResponse, Status>>,
    ) {
        let mut watches: Vec<Watch> = Vec::new();
        loop {
            let written = self.written.notified();
            tokio::pin!(written);
            written.as_mut().enable();
            let news: Vec<_> = watches.iter_mut().filter_map(|watch| self.news(watch)).collect();
            for response in news {
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
            let responses = tokio::select! {
                biased;
                request = requests.next() => match request {
                    Some(Ok(request)) => self.asked(request, &mut watches),
                    _ => return,
                },
                () = written => vec![],
            };
            for response in responses {
                if sender.send(Ok(response)).await.is_err() {
                    return;
                }
            }
        }
    }

    fn asked(&self, request: PbWatchRequest, watches: &mut Vec<Watch>) -> Vec<PbWatchResponse> {
        let header = Some(self.lock().header());
        match request.request_union {
            Some(PbWatchRequestUnion::CreateRequest(create)) => {
                let id = watches.len() as i64;
                let current = self.lock().revision();
                let next = if create.start_revision > 0 { create.start_revision } else { current + 1 };
                let mut watch = Watch { id, key: create.key, end: create.range_end, next };
                let created = PbWatchResponse { header, watch_id: id, created: true, ..PbWatchResponse::default() };
                let missed = self.news(&mut watch);
                watches.push(watch);
                std::iter::once(created).chain(missed).collect()
            }
            Some(PbWatchRequestUnion::CancelRequest(cancel)) => {
                watches.retain(|watch| watch.id != cancel.watch_id);
                vec![PbWatchResponse { header, watch_id: cancel.watch_id, canceled: true, ..PbWatchResponse::default() }]
            }
            Some(PbWatchRequestUnion::ProgressRequest(_)) => {
                vec![PbWatchResponse { header, watch_id: EVERY_WATCH, ..PbWatchResponse::default() }]
            }
            None => vec![],
        }
    }

    /// What a watch has not been told.
    fn news(&self, watch: &mut Watch) -> Option<PbWatchResponse> {
        let keys = self.lock();
        let events = keys.events_from(watch.next, &watch.key, &watch.end);
        watch.next = watch.next.max(keys.revision() + 1);
        let response = PbWatchResponse { header: Some(keys.header()), watch_id: watch.id, events, ..PbWatchResponse::default() };
        (!response.events.is_empty()).then_some(response)
    }
}
