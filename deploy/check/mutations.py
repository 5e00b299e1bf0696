"""The checks, checked: manifests are broken in one place at a time, and the problem must be found and named."""

import copy

from . import compose, images, mutations_tls
from .changes import (
    COORDINATOR, DENOISER, ENCODER, Objects, argument, at, boundless, models, of_container, of_pod, opened, put, rename, without,
)
from .render import DEPLOY


def run(overlays, problems):
    """Gives how many of the mutations were not found."""
    missed = 0
    for overlay, what, expected, mutate in MUTATIONS + mutations_tls.MUTATIONS:
        documents = copy.deepcopy(overlays[overlay])
        mutate(Objects(documents))
        if documents == overlays[overlay]:
            raise SystemExit(f"self-test: {what}: changed nothing")
        found = problems(overlay, documents, ("1.33",))
        if not any(expected in problem for problem in found):
            missed += 1
            print(f"  NOT FOUND in {overlay}: {what} (expected {expected!r}, got {found[:3]})")
    for file, what, expected, old, new in TEXTS:
        text = (DEPLOY / file).read_text()
        if old not in text:
            raise SystemExit(f"self-test: {what}: changed nothing")
        of_text = compose.of_text if file == "compose.yaml" else images.of_dockerfile
        found = list(of_text(text.replace(old, new)))
        if not any(expected in problem for problem in found):
            missed += 1
            print(f"  NOT FOUND in {file}: {what} (expected {expected!r}, got {found[:3]})")
    print(f"self-test: {len(MUTATIONS) + len(mutations_tls.MUTATIONS) + len(TEXTS)} mutations, {missed} not found")
    return missed


LWS = ("spec", "leaderWorkerTemplate")
ROLE = ("spec", "roles", 1, "spec", "leaderWorkerTemplate", "workerTemplate", "spec", "containers", 0)

# Overlay, what is done to it, words of the problem, how.
MUTATIONS = [
    # Shapes.
    ("cpu-dev", "a misspelt field of a container", "readinesProbe", of_container(ENCODER, rename("readinessProbe", "readinesProbe"))),
    ("cpu-dev", "a misspelt field of a policy", "policyTipes", at("NetworkPolicy/worker", lambda d: rename("policyTypes", "policyTipes")(d["spec"]))),
    ("cpu-dev", "a word where a number belongs", "replicas", at(DENOISER, put("four", "spec", "replicas"))),
    ("cpu-dev", "an API version that is gone", "no schema for", at("PodDisruptionBudget/atelier-encoder", put("policy/v1beta1", "apiVersion"))),
    ("lws", "a restart policy that does not exist", "restartPolicy", at("LeaderWorkerSet/atelier-denoiser", put("Sometimes", *LWS, "restartPolicy"))),
    ("lws", "a misspelt field of a custom resource", "sise", at("LeaderWorkerSet/atelier-denoiser", lambda d: rename("size", "sise")(d["spec"]["leaderWorkerTemplate"]))),
    ("disaggregatedset", "a misspelt field deep in a custom resource", "imagePulPolicy", at("DisaggregatedSet/atelier", put("Always", *ROLE, "imagePulPolicy"))),
    ("keda", "a trigger without a type", "type", at("ScaledObject/atelier-denoiser", without("spec", "triggers", 0, "type"))),
    ("monitoring", "a misspelt field of a monitor", "endpoint", at("ServiceMonitor/atelier-coordinator", lambda d: rename("endpoints", "endpoint")(d["spec"]))),
    ("monitoring", "an alert without an expression", "expr", at("PrometheusRule/atelier", without("spec", "groups", 0, "rules", 0, "expr"))),
    # Pods.
    ("cpu-dev", "no readiness probe", "no readinessProbe", of_container(ENCODER, without("readinessProbe"))),
    ("cpu-dev", "no start-up probe", "no startupProbe", of_container(COORDINATOR, without("startupProbe"))),
    ("cpu-dev", "a probe of a service that is not there", "nothing answers", of_container(ENCODER, put("worker.Reddy", "readinessProbe", "grpc", "service"))),
    ("cpu-dev", "a liveness probe that depends on the cluster", "more than the process", of_container(ENCODER, put("atelier.worker.Ready", "livenessProbe", "grpc", "service"))),
    ("cpu-dev", "a probe at another port", "does not have", of_container(ENCODER, put(7799, "livenessProbe", "grpc", "port"))),
    ("cpu-dev", "a pod that counts as a host", "as `host`", of_container(DENOISER, argument("host=$(NODE_NAME)", "host=$(POD_NAME)"))),
    ("lws", "a node's name from elsewhere", "name of its node", at("LeaderWorkerSet/atelier-denoiser", put([], *LWS, "workerTemplate", "spec", "containers", 0, "env"))),
    ("cpu-dev", "root", "not root", of_pod(ENCODER, put(0, "securityContext", "runAsUser"))),
    ("cpu-dev", "a writable root", "readOnlyRootFilesystem", of_container(ENCODER, put(False, "securityContext", "readOnlyRootFilesystem"))),
    ("cpu-dev", "privileges gained", "allowPrivilegeEscalation", of_container(ENCODER, without("securityContext", "allowPrivilegeEscalation"))),
    ("cpu-dev", "capabilities", "capabilities", of_container(ENCODER, put({"drop": ["ALL"], "add": ["NET_ADMIN"]}, "securityContext", "capabilities"))),
    ("cpu-dev", "no seccomp", "seccompProfile", of_pod(COORDINATOR, without("securityContext", "seccompProfile"))),
    ("cpu-dev", "the host's network", "hostNetwork", of_pod(ENCODER, put(True, "hostNetwork"))),
    ("cpu-dev", "the host's files", "hostPath", of_pod(COORDINATOR, lambda p: p["volumes"].append({"name": "h", "hostPath": {"path": "/"}}))),
    ("cpu-dev", "a host's port", "hostPort", of_container(ENCODER, put(7701, "ports", 0, "hostPort"))),
    ("cpu-dev", "a mounted token", "automountServiceAccountToken", of_pod(ENCODER, without("automountServiceAccountToken"))),
    ("cpu-dev", "an account with a token", "mounts a token", at("ServiceAccount/atelier-worker", without("automountServiceAccountToken"))),
    ("cpu-dev", "an account that is not there", "no ServiceAccount", lambda objects: objects.remove("ServiceAccount/atelier-worker")),
    ("cpu-dev", "service links", "enableServiceLinks", of_pod(ENCODER, without("enableServiceLinks"))),
    ("cpu-dev", "latest", "no fixed tag", of_container(ENCODER, put("atelier/worker:latest", "image"))),
    ("cpu-dev", "no tag", "no fixed tag", of_container(ENCODER, put("atelier/worker", "image"))),
    ("cpu-dev", "no limit of memory", "limits.memory", of_container(DENOISER, without("resources", "limits", "memory"))),
    ("cpu-dev", "no request", "requests.cpu", of_container(DENOISER, without("resources", "requests", "cpu"))),
    ("cpu-dev", "too little grace", "less than the drain", of_pod(DENOISER, put(30, "terminationGracePeriodSeconds"))),
    ("gpu", "weights that can be written", "not mounted read-only", of_container(DENOISER, lambda c: [m.pop("readOnly", None) for m in c["volumeMounts"]])),
    ("gpu", "no claim", "no PersistentVolumeClaim", lambda objects: objects.remove("PersistentVolumeClaim/atelier-weights")),
    ("gpu-weights-image", "weights by tag", "not pinned", of_pod(DENOISER, lambda p: [v["image"].__setitem__("reference", "a/b:1") for v in p["volumes"] if "image" in v])),
    ("ha", "an etcd that loses writes", "older than 3.5.26", of_container("StatefulSet/atelier-etcd", put("quay.io/coreos/etcd:v3.5.1", "image"))),
    ("ha", "an unknown secret", "there is no Secret", of_container(COORDINATOR, put("keys", "envFrom", 1, "secretRef", "name"))),
    ("cpu-dev", "no disruption budget", "0 PodDisruptionBudgets", lambda objects: objects.remove("PodDisruptionBudget/atelier-denoiser")),
    ("cpu-dev", "a budget that blocks every drain", "exactly one pod", at("PodDisruptionBudget/atelier-denoiser", put(0, "spec", "maxUnavailable"))),
    # Ways.
    ("cpu-dev", "no denial by default", "denies all", lambda objects: objects.remove("NetworkPolicy/nothing-by-default")),
    ("cpu-dev", "workers without a policy", "of its own", lambda objects: objects.remove("NetworkPolicy/worker")),
    ("cpu-dev", "ranks' port open to the coordinator", "reaches Deployment/atelier-denoiser at port 7702", opened),
    ("cpu-dev", "every port of a worker open to workers", "reaches Deployment/atelier-denoiser at port 41000", boundless),
    ("gpu", "ranks on GPUs without a way", "does not reach Deployment/atelier-denoiser at port 41000", lambda objects: objects.remove("NetworkPolicy/ranks-exchange-by-nccl")),
    ("production", "ranks on GPUs with a way out alone", "LeaderWorkerSet/atelier-denoiser does not reach LeaderWorkerSet/atelier-denoiser at port 41000", at("NetworkPolicy/ranks-exchange-by-nccl", put([], "spec", "ingress"))),
    ("production", "NCCL's ports for anybody", "anybody elsewhere reaches LeaderWorkerSet/atelier-denoiser at port 41000", at("NetworkPolicy/ranks-exchange-by-nccl", lambda d: d["spec"]["ingress"][0].pop("from"))),
    ("cpu-dev", "names by TCP alone", "look up names", at("NetworkPolicy/names-are-looked-up", without("spec", "egress", 0, "ports", 0))),
    ("cpu-dev", "anybody may be a client", "anybody elsewhere reaches StatefulSet/atelier-coordinator", at("NetworkPolicy/coordinator", lambda d: d["spec"]["ingress"][0].pop("from"))),
    ("cpu-dev", "workers that do not reach the coordinator", "does not reach StatefulSet/atelier-coordinator", at("NetworkPolicy/worker", lambda d: d["spec"]["egress"].pop(0))),
    ("cpu-dev", "no names", "look up names", lambda objects: objects.remove("NetworkPolicy/names-are-looked-up")),
    ("ha", "etcd open to all", "reaches StatefulSet/atelier-etcd at port 2379", at("NetworkPolicy/etcd", lambda d: d["spec"]["ingress"][0].pop("from"))),
    ("ha", "the cloud's metadata", "metadata service", at("NetworkPolicy/coordinator-reaches-object-store", lambda d: d["spec"]["egress"][0]["to"][0]["ipBlock"]["except"].remove("169.254.0.0/16"))),
    # The program.
    ("cpu-dev", "a flag that does not exist", "no flag --lable", of_container(ENCODER, argument("--label=pod", "--lable=pod"))),
    ("cpu-dev", "a variable that does not exist", "reads no variable ATELIER_LISTN", at("ConfigMap/coordinator-settings", lambda m: rename("ATELIER_LISTEN", "ATELIER_LISTN")(m["data"]))),
    ("gpu", "a device without its number", "cannot compute on `cuda`:", at("ConfigMap/worker-settings", put("cuda", "data", "ATELIER_WORKER_DEVICE"))),
    ("gpu", "a GPU that a pod does not have", "cannot compute on `cuda:1`:", at("ConfigMap/worker-settings", put("cuda:1", "data", "ATELIER_WORKER_DEVICE"))),
    ("cpu-dev", "a coordinator and etcd", "not both", at("ConfigMap/worker-settings", put("http://e:2379", "data", "ATELIER_WORKER_ETCD"))),
    ("cpu-dev", "a field that models.toml does not have", "unknown field", models("max_jobs", "max_jbos")),
    ("cpu-dev", "a degree that does not exist", "tp = 3", models("tp = 2", "tp = 3")),
    ("cpu-dev", "a role that nobody has", "not so many", models('"decoder"', '"painter"')),
    ("cpu-dev", "fewer workers than a group has ranks", "not so many", at(DENOISER, put(3, "spec", "replicas"))),
    ("lws", "sets of another size than groups", "sets of 2", at("LeaderWorkerSet/atelier-denoiser", put(2, *LWS, "size"))),
    ("keda", "more workers than replicas", "goes beyond", at("ScaledObject/atelier-denoiser", put(20, "spec", "maxReplicaCount"))),
    # References.
    ("cpu-dev", "a Service of nobody", "selects no pod", at("Service/atelier-coordinator", put("nobody", "spec", "selector", "app.kubernetes.io/name"))),
    ("cpu-dev", "a port that is not there", "has no port", at("Service/atelier-coordinator", put("gprc", "spec", "ports", 0, "targetPort"))),
    ("monitoring", "a monitor of a port that is not there", "has no port", at("PodMonitor/atelier-worker", put("metriks", "spec", "podMetricsEndpoints", 0, "port"))),
    ("keda", "an autoscaler of nothing", "there is no Deployment", at("ScaledObject/atelier-denoiser", put("atelier-painter", "spec", "scaleTargetRef", "name"))),
    ("keda", "replicas beside an autoscaler", "replicas too", at(DENOISER, put(2, "spec", "replicas"))),
    ("lws", "a setting that kustomize did not follow", "no ConfigMap", at("LeaderWorkerSet/atelier-denoiser", put("worker-settings", *LWS, "workerTemplate", "spec", "containers", 0, "envFrom", 0, "configMapRef", "name"))),
    ("ha", "another namespace", "is in namespace", at("Service/atelier-etcd", put("default", "metadata", "namespace"))),
]

# Dockerfile or compose.yaml, what is done to it, words of the problem, old text, new text.
TEXTS = [
    ("Dockerfile.worker", "root", "does not end as user", "USER 65532:65532", "USER root"),
    ("Dockerfile.worker", "latest", "no fixed tag", "debian:bookworm-slim", "debian:latest"),
    ("Dockerfile.worker", "a folder that is not there", "not in the repository", "COPY proto proto", "COPY protocol proto"),
    ("Dockerfile.worker", "a stage that is not there", "no such stage", "--from=build", "--from=builder"),
    ("Dockerfile.worker", "a secret", "keeps what it is built with", "WORKDIR /src", "ARG REGISTRY_TOKEN\nWORKDIR /src"),
    ("Dockerfile.coordinator", "a shell around the program", "ENTRYPOINT", 'ENTRYPOINT ["/usr/local/bin/atelier"]', "ENTRYPOINT atelier"),
    ("compose.yaml", "workers without TLS", "sets ATELIER_INSECURE", "    ATELIER_WORKER_THREADS:", "    ATELIER_INSECURE: 'true'\n    ATELIER_WORKER_THREADS:"),
    ("compose.yaml", "a device that there is not", "cannot compute on `gpu`", "    ATELIER_WORKER_THREADS:", "    ATELIER_WORKER_DEVICE: gpu\n    ATELIER_WORKER_THREADS:"),
    ("compose.yaml", "a time that is none", "does not take its settings", 'DRAIN_TIMEOUT: "50"', 'DRAIN_TIMEOUT: 50s'),
    ("compose.yaml", "another's certificate", "ATELIER_TLS_CERT is", "/tls/worker/worker.crt", "/tls/client/client.crt"),
    ("compose.yaml", "the authority for all", "not the files of a worker", "tls-worker:/tls/worker:ro", "authority:/tls/worker:ro"),
    ("compose.yaml", "a volume that is not there", "no volume tls-client", "  tls-client:\n", ""),
    ("compose.yaml", "a worker that dials in plain text", "dials http:", "COORDINATOR: https", "COORDINATOR: http"),
    ("compose.yaml", "a worker that is not asked by TLS", "by `atelier health`", ", --worker,", ","),
    ("compose.yaml", "a certificate for another host", "does not say its name", "--host=coordinator", "--host=lead"),
    ("compose.yaml", "a maker that never ends", "again and again", 'restart: "no"', "restart: always"),
    ("compose.yaml", "a port for everybody", "open to other machines", "127.0.0.1:7700:7700", "7700:7700"),
]
