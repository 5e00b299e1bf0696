//! Nobody but the cluster's own processes and its clients gets in, certificates are changed under load, and nothing that is
//! secret is written anywhere: with a cluster of real processes, started by `atelier up --tls`.

#![allow(clippy::unwrap_used)] // helpers of tests are tests

#[path = "identity/cluster.rs"]
mod cluster;
#[path = "identity/strangers.rs"]
mod strangers;

use std::time::Duration;

use cluster::{Keys, PROMPT, Up};
use identity::authority::{self, Authority, Existing};
use identity::{Port, Role};
use proto::v1::membership_service_client::MembershipServiceClient;
use proto::v1::worker_service_client::WorkerServiceClient;
use proto::v1::{
    CancelJobRequest, ControlRequest, DownloadBlobRequest, GetJobRequest, Job, JobSpec, JobState, ListJobsRequest,
    PutPayloadRequest, RegisterRequest, WatchJobRequest, job_event::Kind as EventKind,
};
use strangers::{Kind, Stranger, is_let_in, served_certificate};
use tests::cluster::{atelier, eventually};
use tonic::Code;
use tonic_types::StatusExt;

#[tokio::test]
async fn every_port_refuses_plain_text_other_authorities_expired_certificates_and_other_roles() {
    let up = Up::start(&[]).await;
    up.client().await.wait_ready().await;
    // Those of metrics left out, which are plain and of this machine alone.
    let ports = up.ports();
    let of = |kind: Kind| ports.iter().filter(|(_, port)| *port == kind).count();
    assert_eq!((of(Kind::Coordinator), of(Kind::Worker), of(Kind::Ranks)), (1, 2, 2), "{ports:?}");

    let authority = Authority::open(&up.tls).unwrap();
    for (port, kind) in &ports {
        let allowed = match kind {
            Kind::Coordinator => Port::COORDINATOR,
            Kind::Worker => Port::WORKER,
            Kind::Ranks => Port::RANKS,
        };
        assert!(!strangers::plain_text_is_answered(*port).await, "{kind:?} answers plain text");
        for role in Role::ALL {
            let known = Stranger::by(&authority, &up.tls, role);
            let may = allowed.roles.contains(&role);
            assert_eq!(is_let_in(&known, *kind, *port).await, may, "a {role} at {kind:?}");
            let other = Stranger::by(&Authority::new().unwrap(), &up.tls, role);
            assert!(!is_let_in(&other, *kind, *port).await, "a {role} of another authority at {kind:?}");
            let expired = Stranger::expired(&authority, &up.tls, role);
            assert!(!is_let_in(&expired, *kind, *port).await, "a {role} of yesterday at {kind:?}");
        }
        let nobody = Stranger::nobody(&up.tls);
        assert_eq!(is_let_in(&nobody, *kind, *port).await, allowed.anonymous, "nobody at {kind:?}");
    }
}

#[tokio::test]
async fn a_client_in_plain_text_is_told_that_the_server_speaks_tls() {
    let up = Up::start(&[]).await;
    up.client().await;
    let server = format!("http://127.0.0.1:{}", up.port());
    for words in [["models", "--server", &server].as_slice(), ["health", server.trim_start_matches("http://")].as_slice()] {
        let asked = atelier().args(words).output().unwrap();
        let told = String::from_utf8_lossy(&asked.stderr);
        assert!(!asked.status.success() && told.contains("the server speaks TLS: dial https://"), "{words:?}: {told}");
    }
}

#[tokio::test]
async fn a_role_may_call_only_what_is_for_it() {
    let up = Up::start(&[]).await;
    up.client().await.wait_ready().await;
    let authority = Authority::open(&up.tls).unwrap();
    let coordinator = up.port();
    let worker = up.ports().into_iter().find(|(_, kind)| *kind == Kind::Worker).unwrap().0;
    let as_role = |role| Stranger::by(&authority, &up.tls, role);

    let client = as_role(Role::Client).channel(Role::Coordinator, coordinator).await;
    let register = tokio_stream::iter([RegisterRequest::default()]);
    let refused = MembershipServiceClient::new(client).register(register).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "a client registers as a worker: {refused}");

    let other = as_role(Role::Worker).channel(Role::Worker, worker).await;
    let refused = WorkerServiceClient::new(other).control(tokio_stream::iter([ControlRequest::default()])).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "a worker commands another: {refused}");

    let leader = as_role(Role::Coordinator).channel(Role::Worker, worker).await;
    let payload = tokio_stream::iter([PutPayloadRequest::default()]);
    let refused = WorkerServiceClient::new(leader).put_payload(payload).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "the coordinator hands a tensor in: {refused}");

    let nobody = Stranger::nobody(&up.tls).channel(Role::Coordinator, coordinator).await;
    let mut jobs = proto::v1::job_service_client::JobServiceClient::new(nobody);
    let refused = jobs.list_jobs(ListJobsRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "nobody lists jobs: {refused}");
}

#[tokio::test]
async fn every_certificate_and_the_authority_are_changed_under_load_and_no_job_fails() {
    let mut up = Up::start(&[]).await;
    let client = up.client().await;
    client.clone().wait_ready().await;
    let expected = client.clone().picture(4).await;
    let load = cluster::Load::start(client.clone());

    // New certificates by the same authority.
    authority::write(&up.tls, &cluster::hosts(), Existing::Renew).unwrap();
    up.all_serve_what_is_in_the_folder().await;
    load.goes_on().await;

    // A new authority: believed first, then used, then the only one.
    let old = Authority::open(&up.tls).unwrap();
    let new = Authority::new().unwrap();
    up.believe(&format!("{}{}", old.certificate, new.certificate));
    up.wait_until_all(|stranger_kind, port| {
        let known = Stranger::trusting(&new, &old.certificate, strangers::role_for(stranger_kind));
        async move { is_let_in(&known, stranger_kind, port).await }
    })
    .await;
    up.replace_certificates(&new);
    up.all_serve_what_is_in_the_folder().await;
    load.goes_on().await;
    up.believe(&new.certificate);
    up.wait_until_all(|stranger_kind, port| {
        let known = Stranger::trusting(&old, &new.certificate, strangers::role_for(stranger_kind));
        async move { !is_let_in(&known, stranger_kind, port).await }
    })
    .await;

    // Ranks meet anew, by the new certificates alone.
    up.kill_a_worker();
    load.goes_on().await;
    let pictures = load.stop().await;
    assert!(pictures.len() >= 3 && pictures.iter().all(|picture| *picture == expected), "{pictures:?}");
}

#[tokio::test]
async fn a_tenant_is_known_by_its_key_sees_its_own_jobs_alone_and_is_told_when_to_come_back() {
    let keys = Keys::new();
    let (studio, other) = (keys.add("studio"), keys.add("other"));
    keys.limit("studio", "pixel_steps_per_second = 1\nburst_pixel_steps = 100\n");
    let up = Up::start(&[&format!("--api-keys={}", keys.file().display())]).await;
    up.client().await.wait_ready().await;
    let (mut mine, mut theirs) = (up.client_with(&studio).await, up.client_with(&other).await);

    let job = mine.create(cluster::spec(2)).await.unwrap();
    let done = mine.finish(&job.id).await;
    let blob_id = done.images[0].blob_id.clone();
    let not_found = |status: tonic::Status| assert_eq!(status.code(), Code::NotFound, "{status}");
    not_found(theirs.jobs.get_job(GetJobRequest { job_id: job.id.clone() }).await.unwrap_err());
    not_found(theirs.jobs.cancel_job(CancelJobRequest { job_id: job.id.clone() }).await.unwrap_err());
    not_found(theirs.jobs.watch_job(WatchJobRequest { job_id: job.id.clone(), after_sequence: 0 }).await.unwrap_err());
    not_found(theirs.blobs.download_blob(DownloadBlobRequest { blob_id: blob_id.clone() }).await.unwrap_err());
    assert!(theirs.jobs.list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs.is_empty());
    assert!(mine.blobs.download_blob(DownloadBlobRequest { blob_id }).await.is_ok());
    assert_eq!(mine.jobs.list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs.len(), 1);

    let refused = mine.create(cluster::spec(2)).await.unwrap_err();
    let details = refused.get_error_details();
    let info = details.error_info().unwrap();
    assert_eq!((refused.code(), info.reason.as_str()), (Code::ResourceExhausted, "TENANT_QUOTA"), "{refused}");
    assert_eq!(info.metadata["tenant"], "studio");
    assert!(details.retry_info().and_then(|info| info.retry_delay).is_some_and(|delay| delay > Duration::from_secs(60)));
    assert!(theirs.create(cluster::spec(2)).await.is_ok(), "another's quota is its own");

    let drawn = up.generate(&other);
    assert!(drawn.status.success(), "{}", String::from_utf8_lossy(&drawn.stderr));

    // A certificate alone is no tenant, and a key that nobody has is nobody's.
    let reason = |status: tonic::Status| {
        assert_eq!(status.code(), Code::Unauthenticated, "{status}");
        status.get_error_details().error_info().unwrap().reason.clone()
    };
    let certificate = up.client().await.0.create(cluster::spec(2)).await.unwrap_err();
    assert_eq!(reason(certificate), "NO_CREDENTIALS");
    let guess =
        up.client_with("atl_0000000000000000000000000000000000000000000").await.create(cluster::spec(2)).await.unwrap_err();
    assert_eq!(reason(guess), "UNKNOWN_KEY");

    // A key that is added is good without a restart, one that is taken away is not.
    let late = keys.add("late");
    let mut late = up.client_with(&late).await;
    eventually("the new key is known", async || late.jobs.list_jobs(ListJobsRequest::default()).await.ok()).await;
    std::fs::write(keys.file(), "").unwrap();
    eventually("the keys are gone", async || mine.jobs.list_jobs(ListJobsRequest::default()).await.err()).await;
    for (path, bytes) in up.written() {
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains(&studio) && !text.contains(&other), "{} holds a key", path.display());
    }
}

#[tokio::test]
async fn an_operators_key_shows_and_cancels_everybodys_jobs_without_their_prompts_and_pictures() {
    let keys = Keys::new();
    let (studio, operations) = (keys.add("studio"), keys.add("operations"));
    keys.limit("operations", "operator = true\n");
    let up = Up::start(&[&format!("--api-keys={}", keys.file().display())]).await;
    up.client().await.wait_ready().await;
    let (mut owner, mut operator) = (up.client_with(&studio).await, up.client_with(&operations).await);
    let job = owner.create(cluster::spec(2)).await.unwrap();
    let done = owner.finish(&job.id).await;

    let theirs = |job: &Job| {
        assert_eq!((job.id.as_str(), job.tenant.as_str()), (done.id.as_str(), "studio"));
        assert!(!format!("{job:?}").contains(PROMPT), "the operator is told the prompt");
    };
    let listed = operator.jobs.list_jobs(ListJobsRequest::default()).await.unwrap().into_inner().jobs;
    assert_eq!(listed.len(), 1);
    theirs(&listed[0]);
    let got = operator.jobs.get_job(GetJobRequest { job_id: job.id.clone() }).await.unwrap().into_inner();
    theirs(&got.job.unwrap());
    let mut watched =
        operator.jobs.watch_job(WatchJobRequest { job_id: job.id.clone(), after_sequence: 0 }).await.unwrap().into_inner();
    let mut states = 0;
    while let Some(message) = watched.message().await.unwrap() {
        if let Some(EventKind::StateChanged(job)) = message.event.unwrap().kind {
            theirs(&job);
            states += 1;
        }
    }
    assert_eq!(states, 3, "queued, running, succeeded");
    let picture = DownloadBlobRequest { blob_id: done.images[0].blob_id.clone() };
    assert_eq!(operator.blobs.download_blob(picture).await.unwrap_err().code(), Code::NotFound, "pictures are their owner's");

    let long = JobSpec { width: Some(512), height: Some(512), ..cluster::spec(500) };
    let running = owner.create(long).await.unwrap();
    operator.jobs.cancel_job(CancelJobRequest { job_id: running.id.clone() }).await.unwrap();
    assert_eq!(owner.finish(&running.id).await.state(), JobState::Cancelled);
    assert_eq!(owner.jobs.get_job(GetJobRequest { job_id: job.id }).await.unwrap().into_inner().job.unwrap().spec, done.spec);
}

#[tokio::test]
async fn a_probe_is_answered_over_tls() {
    let up = Up::start(&[]).await;
    up.client().await.wait_ready().await;
    let worker = up.ports().into_iter().find(|(_, kind)| *kind == Kind::Worker).unwrap().0;
    let healthy = async || up.health(worker, "worker", &["--worker", "--service", "atelier.worker.Ready"]).then_some(());
    eventually("the worker is ready", healthy).await;
    assert!(up.health(up.port(), "coordinator", &["--service", "atelier.v1.JobService"]));
    assert!(!up.health(up.port(), "coordinator", &["--service", "model/nobody"]));
    assert!(!up.health(worker, "coordinator", &[]), "it is no coordinator");
}

#[tokio::test]
async fn bad_new_files_keep_the_old_ones_in_use() {
    let up = Up::start(&[]).await;
    up.client().await.wait_ready().await;
    let before = served_certificate(&up.tls, Kind::Coordinator, up.port()).await.unwrap();
    std::fs::write(up.tls.join("coordinator.crt"), "-----BEGIN NOTHING-----").unwrap();
    eventually("it warns", async || up.log().contains("new certificates cannot be used").then_some(())).await;
    assert_eq!(served_certificate(&up.tls, Kind::Coordinator, up.port()).await.unwrap(), before);
}

#[tokio::test]
async fn no_prompt_and_no_secret_is_in_what_a_run_writes() {
    let up = Up::start(&[]).await;
    let mut client = up.client().await;
    client.wait_ready().await;
    client.picture(3).await;
    let log = up.log();
    assert!(log.contains("job accepted") && log.contains("registered"), "the log is there: {log}");
    for secret in [PROMPT, "PRIVATE KEY", "secret: b\"", "unique_id"] {
        assert!(!log.contains(secret), "the log holds {secret:?}");
    }
    let keys: Vec<String> = Role::ALL.iter().map(|role| cluster::key_material(&up.tls, *role)).collect();
    for (path, bytes) in up.written() {
        let text = String::from_utf8_lossy(&bytes);
        for key in &keys {
            assert!(!text.contains(key.as_str()), "{} holds a private key", path.display());
        }
    }
}
