"""Mutations of what concerns TLS: certificates, who mounts them, probes, etcd."""

from .changes import COORDINATOR, DENOISER, ENCODER, at, of_container, of_pod, put, without

WORKERS, COORDINATORS = "ConfigMap/worker-settings", "ConfigMap/coordinator-settings"
WORKER, SERVER, AUTHORITY = "Certificate/atelier-worker", "Certificate/atelier-coordinator", "Certificate/atelier-ca"
ETCD = "StatefulSet/atelier-etcd"
PROBE = ("exec", "command")


def plain(*names):
    """These say that they are insecure."""

    def change(objects):
        for name in names:
            objects[name]["data"]["ATELIER_INSECURE"] = "true"

    return change


def variable(name, value):
    """Another value of a container's variable; None takes it away."""

    def change(container):
        others = [entry for entry in container["env"] if entry["name"] != name]
        container["env"] = others + ([] if value is None else [{"name": name, "value": value}])

    return change


def secret(volume, **fields):
    """Other fields of the Secret that is mounted as `volume`."""
    return lambda pod: [entry["secret"].update(fields) for entry in pod["volumes"] if entry["name"] == volume]


def mount(volume, **fields):
    return lambda container: [entry.update(fields) for entry in container["volumeMounts"] if entry["name"] == volume]


def of_spec(name, *path_and_value):
    *path, value = path_and_value
    return at(name, put(value, "spec", *path))


def words(old, new):
    """One word in place of another among those of etcd's command; None takes it away."""

    def change(container):
        changed = [word.replace(old, new or "") for word in container["command"] if new is not None or old not in word]
        container["command"] = changed

    return change


def of_list(name, field, old):
    """One entry less in a list."""
    return at(name, lambda document: document["spec"][field].remove(old))


# Overlay, what is done to it, words of the problem, how.
MUTATIONS = [
    # TLS is on.
    ("gpu", "all of it without TLS", "gpu is without TLS", plain(WORKERS, COORDINATORS)),
    ("gpu", "workers without TLS", "sets ATELIER_INSECURE", plain(WORKERS)),
    ("gpu", "a coordinator without TLS", "sets ATELIER_INSECURE", plain(COORDINATORS)),
    ("gpu", "workers that dial in plain text", "dials http:", at(WORKERS, put("http://atelier-coordinator:7700", "data", "ATELIER_WORKER_COORDINATOR"))),
    ("gpu", "a Service that says it is cleartext", "appProtocol", of_spec("Service/atelier-coordinator", "ports", 0, "appProtocol", "kubernetes.io/h2c")),
    ("cpu-dev", "TLS by halves", "says that it is insecure", of_container(ENCODER, variable("ATELIER_TLS_CA", "/tls/ca.crt"))),
    ("cpu-dev", "one that is not plain among those that are", "ATELIER_TLS_CERT is not set", at(WORKERS, without("data", "ATELIER_INSECURE"))),
    ("monitoring", "metrics without leave", "does not take its settings: error: --metrics-listen", at(WORKERS, without("data", "ATELIER_METRICS_INSECURE"))),
    # Whose certificates.
    ("gpu", "no certificate", "ATELIER_TLS_CERT is not set", of_container(DENOISER, variable("ATELIER_TLS_CERT", None))),
    ("gpu", "a key that is not mounted", "no tls.key of a mounted Secret", of_container(DENOISER, variable("ATELIER_TLS_KEY", "/keys/tls.key"))),
    ("gpu", "a file that no Secret has", "no ca.crt of a mounted Secret", of_container(COORDINATOR, variable("ATELIER_TLS_CA", "/tls/root.crt"))),
    ("gpu", "a client's certificate", "not of spiffe://atelier/worker", of_pod(DENOISER, secret("tls", secretName="atelier-client-tls"))),
    ("gpu", "a worker that is a coordinator", "not of spiffe://atelier/worker", of_pod(DENOISER, secret("tls", secretName="atelier-coordinator-tls"))),
    ("gpu", "the authority's key", "the key of an authority", of_pod(COORDINATOR, secret("tls", secretName="atelier-ca"))),
    ("gpu", "a Secret that nobody makes", "there is no Secret atelier-worker-tls", lambda objects: objects.remove(WORKER)),
    ("base", "a Secret that nobody is told to make", "there is no Secret tls", of_pod(COORDINATOR, secret("tls", secretName="tls"))),
    ("lws", "a Secret that a copied pod does not find", "there is no Secret tls", of_spec("LeaderWorkerSet/atelier-denoiser", "leaderWorkerTemplate", "workerTemplate", "spec", "volumes", 0, {"name": "tls", "secret": {"secretName": "tls"}})),
    ("ha", "etcd's certificate to the cluster", "not of spiffe://atelier/coordinator", of_pod(COORDINATOR, secret("tls", secretName="atelier-coordinator-etcd-tls"))),
    # Who can read them.
    ("gpu", "a key that the user cannot read", "cannot be read", of_pod(DENOISER, secret("tls", defaultMode=0o400))),
    ("gpu", "a key of another group", "cannot be read", of_pod(DENOISER, without("securityContext", "fsGroup"))),
    ("gpu", "a key that anybody can read", "by anybody", of_pod(COORDINATOR, secret("tls", defaultMode=0o444))),
    ("gpu", "a file that is never renewed", "a renewed one is not seen", of_container(COORDINATOR, mount("tls", subPath="tls.crt"))),
    ("gpu", "keys that can be written", "mounted read-only", of_container(DENOISER, mount("tls", readOnly=False))),
    # Probes.
    ("gpu", "a probe in plain text", "is not a command", of_container(DENOISER, put({"grpc": {"port": 7701}}, "livenessProbe"))),
    ("gpu", "a coordinator's probe in plain text", "is not a command", of_container(COORDINATOR, put({"grpc": {"port": 7700}}, "startupProbe"))),
    ("cpu-dev", "a probe by TLS where there is none", "is a command", of_container(ENCODER, put({"exec": {"command": ["atelier", "health", "127.0.0.1:7701", "--worker"]}, "timeoutSeconds": 5}, "livenessProbe"))),
    ("gpu", "a probe that shows no certificate", "--worker", of_container(DENOISER, put(["atelier", "health", "127.0.0.1:7701"], "livenessProbe", *PROBE))),
    ("gpu", "a coordinator probed as a worker", "--worker", of_container(COORDINATOR, put(["atelier", "health", "--worker"], "livenessProbe", *PROBE))),
    ("gpu", "a probe of another pod", "not its own pod", of_container(DENOISER, put(["atelier", "health", "atelier-coordinator:7701", "--worker"], "livenessProbe", *PROBE))),
    ("gpu", "a command's port that is not there", "does not have", of_container(DENOISER, put(["atelier", "health", "127.0.0.1:7700", "--worker"], "livenessProbe", *PROBE))),
    ("gpu", "a flag that probes do not have", "no flag --sevice", of_container(COORDINATOR, put(["atelier", "health", "--sevice=x"], "readinessProbe", *PROBE))),
    ("gpu", "a command for a service that is not there", "nothing answers", of_container(COORDINATOR, put(["atelier", "health", "--service=atelier.v1.Jobs"], "readinessProbe", *PROBE))),
    ("gpu", "a liveness command that depends on the cluster", "more than the process", of_container(COORDINATOR, put(["atelier", "health", "--service=atelier.v1.JobService"], "livenessProbe", *PROBE))),
    ("gpu", "another program", "not `atelier health`", of_container(COORDINATOR, put(["grpc_health_probe"], "livenessProbe", *PROBE))),
    ("gpu", "a command without time", "less than 5 s", of_container(DENOISER, without("readinessProbe", "timeoutSeconds"))),
    # Certificates.
    ("gpu", "a misspelt field of a certificate", "renewBfore", of_spec(WORKER, "renewBfore", "720h")),
    ("gpu", "a misspelt field of an issuer", "secretNam", of_spec("Issuer/atelier-ca", "ca", {"secretNam": "atelier-ca"})),
    ("gpu", "a usage that does not exist", "usages", of_spec(WORKER, "usages", ["server"])),
    ("gpu", "a role that does not exist", "are not one role", of_spec(WORKER, "uris", ["spiffe://atelier/painter"])),
    ("gpu", "two roles", "are not one role", of_spec(WORKER, "uris", ["spiffe://atelier/worker", "spiffe://atelier/coordinator"])),
    ("gpu", "no role", "not of spiffe://atelier/worker", at(WORKER, without("spec", "uris"))),
    ("gpu", "a worker that may not dial", "is for", of_list(WORKER, "usages", "client auth")),
    ("gpu", "a client that may serve", "is for", of_spec("Certificate/atelier-client", "usages", ["digital signature", "client auth", "server auth"])),
    ("gpu", "an authority that is a client", "and more than that", of_spec(AUTHORITY, "uris", ["spiffe://atelier/client"])),
    ("gpu", "renewal at the last moment", "before its end", of_spec(WORKER, "renewBefore", "1h")),
    ("gpu", "a key that is kept", "keeps its key", of_spec(WORKER, "privateKey", "rotationPolicy", "Never")),
    ("gpu", "an authority that changes its key", "is an authority and does not", of_spec(AUTHORITY, "privateKey", "rotationPolicy", "Always")),
    ("gpu", "a key of another kind", "of another kind", of_spec(WORKER, "privateKey", {"algorithm": "RSA", "rotationPolicy": "Always"})),
    ("gpu", "no issuer", "there is no Issuer atelier-ca", lambda objects: objects.remove("Issuer/atelier-ca")),
    ("gpu", "a certificate that signed itself", "is self-signed", of_spec(WORKER, "issuerRef", "name", "atelier-self-signed")),
    ("gpu", "an authority without a certificate", "no Certificate that is an authority", lambda objects: objects.remove(AUTHORITY)),
    ("gpu", "one Secret for two", "filled by another one too", of_spec(WORKER, "secretName", "atelier-client-tls")),
    ("gpu", "a Service whose name nobody has", "does not name atelier-coordinator.atelier.svc", of_list(SERVER, "dnsNames", "atelier-coordinator.atelier.svc")),
    ("gpu", "coordinators without names", "does not name *.atelier-coordinators", of_list(SERVER, "dnsNames", "*.atelier-coordinators.atelier.svc")),
    ("gpu", "no name for a forwarded port", "does not name localhost", of_list(SERVER, "dnsNames", "localhost")),
    # etcd.
    ("ha", "etcd in plain text", "--listen-client-urls is plain", of_container(ETCD, words("--listen-client-urls=https", "--listen-client-urls=http"))),
    ("ha", "members in plain text", "--initial-cluster is plain", of_container(ETCD, words("0=https", "0=http"))),
    ("ha", "etcd for anybody", "--client-cert-auth is not set", of_container(ETCD, words("--client-cert-auth", None))),
    ("ha", "members of another name", "members take", of_container(ETCD, words("cn=atelier-etcd", "cn=etcd"))),
    ("ha", "etcd without its authority", "--trusted-ca-file is not set", of_container(ETCD, words("--trusted-ca-file", None))),
    ("ha", "a member whose name nobody has", "does not name atelier-etcd-2", of_list("Certificate/atelier-etcd", "dnsNames", "atelier-etcd-2.atelier-etcd")),
    ("ha", "an authority for etcd and for clients", "could write to etcd", of_spec("Certificate/atelier-etcd", "issuerRef", "name", "atelier-ca")),
    ("ha", "a certificate that etcd does not know", "which etcd does not believe", of_spec("Certificate/atelier-worker-etcd", "issuerRef", "name", "atelier-ca")),
    ("ha", "a client of etcd that names a host", "etcd would look", of_spec("Certificate/atelier-worker-etcd", "dnsNames", ["atelier-worker"])),
    ("ha", "a coordinator that talks to etcd in plain text", "plain text", at(COORDINATORS, lambda m: m["data"].__setitem__("ATELIER_ETCD", m["data"]["ATELIER_ETCD"].replace("https", "http")))),
    ("ha", "workers that do not know etcd's authority", "ATELIER_ETCD_CA is not set", of_container(DENOISER, variable("ATELIER_ETCD_CA", None))),
    ("ha", "an etcd of another name", "whose name Certificate/atelier-etcd does not have", at(WORKERS, put("https://etcd:2379", "data", "ATELIER_WORKER_ETCD"))),
]
