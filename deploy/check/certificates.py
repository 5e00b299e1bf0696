"""TLS: that it is on, whose certificates pods hold, what these say, and that whoever dials will take them."""

from urllib.parse import urlsplit

from .workloads import named, of_kind, selects, settings, workloads

# Made by whoever installs it; the component that needs it says so. Those of TLS are, where no Certificate makes them.
PROVIDED = {"object-store"}
PROVIDED_TLS = {
    "atelier-coordinator-tls", "atelier-worker-tls", "atelier-etcd-tls", "atelier-coordinator-etcd-tls", "atelier-worker-etcd-tls",
}
# The variables that name a process's own files, and those for etcd; and the keys of a Secret of cert-manager.
OWN = {"ATELIER_TLS_CERT": "tls.crt", "ATELIER_TLS_KEY": "tls.key", "ATELIER_TLS_CA": "ca.crt"}
TO_ETCD = {"ATELIER_ETCD_CERT": "tls.crt", "ATELIER_ETCD_KEY": "tls.key", "ATELIER_ETCD_CA": "ca.crt"}
# etcd's flags for the same, to clients and to members.
OF_ETCD = {
    "--cert-file": "tls.crt", "--key-file": "tls.key", "--trusted-ca-file": "ca.crt",
    "--peer-cert-file": "tls.crt", "--peer-key-file": "tls.key", "--peer-trusted-ca-file": "ca.crt",
}
ROLES = {f"spiffe://atelier/{role}" for role in ("coordinator", "worker", "client")}
# Hours: as many as a month has are left to notice that renewal fails.
LEAST_LEFT = 30 * 24


def secrets(documents):
    """Secrets that are there though no object of kind Secret is."""
    made = set(by_secret(documents))
    return PROVIDED | (made or PROVIDED_TLS)


def by_secret(documents):
    """Certificates by the Secret they fill."""
    return {certificate["spec"]["secretName"]: certificate for certificate in of_kind(documents, "Certificate")}


def problems(documents):
    plain = is_plain(documents)
    for workload in workloads(documents):
        found = without_tls(documents, workload) if plain else with_tls(documents, workload)
        yield from (f"{workload.name}: {problem}" for problem in found)
    for service in of_kind(documents, "Service"):
        cleartext = any(port.get("appProtocol") == "kubernetes.io/h2c" for port in service["spec"]["ports"])
        if cleartext != (plain and any(w.is_coordinator and selects_it(service, w) for w in workloads(documents))):
            yield f"{named(service)}: appProtocol does not say whether it is cleartext"
    for certificate in of_kind(documents, "Certificate"):
        yield from (f"{named(certificate)}: {problem}" for problem in of_certificate(documents, certificate))
    yield from of_names(documents)


def selects_it(service, workload):
    return selects({"matchLabels": service["spec"]["selector"]}, workload.labels)


def is_plain(documents):
    """Whether all of an overlay does without TLS, and says so."""
    members = [workload for workload in workloads(documents) if workload.is_worker or workload.is_coordinator]
    return all("ATELIER_INSECURE" in settings(documents, workload) for workload in members)


def without_tls(documents, workload):
    """Nothing by halves."""
    if settings(documents, workload).keys() & OWN.keys() or any("secret" in volume for volume in workload.spec.get("volumes", [])):
        yield "has certificates, and says that it is insecure"
    yield from of_commands(workload, False)


def with_tls(documents, workload):
    found = settings(documents, workload)
    if "ATELIER_INSECURE" in found:
        yield "sets ATELIER_INSECURE"
    yield from of_volumes(documents, workload)
    if not (workload.is_worker or workload.is_coordinator):
        yield from of_etcd(documents, workload)
        return
    role = f"spiffe://atelier/{'worker' if workload.is_worker else 'coordinator'}"
    secret = yield from of_files(workload, found, OWN)
    certificate = by_secret(documents).get(secret)
    if certificate and certificate["spec"].get("uris") != [role]:
        yield f"{secret} is of {certificate['spec'].get('uris')}, not of {role}"
    yield from of_commands(workload, True)
    at_coordinator = found.get("ATELIER_WORKER_COORDINATOR", "https:")
    if not at_coordinator.startswith("https:"):
        yield f"dials {at_coordinator}"
    endpoints = found.get("ATELIER_ETCD") or found.get("ATELIER_WORKER_ETCD")
    if endpoints:
        yield from of_client_of_etcd(documents, workload, found, endpoints)


def of_volumes(documents, workload):
    authorities = {c["spec"]["secretName"] for c in of_kind(documents, "Certificate") if c["spec"].get("isCA")}
    pod = workload.spec.get("securityContext", {})
    volumes = {volume["name"]: volume["secret"] for volume in workload.spec.get("volumes", []) if "secret" in volume}
    for volume in volumes.values():
        name, mode = volume["secretName"], volume.get("defaultMode", 0o644)
        if name in authorities:
            yield f"mounts {name}, the key of an authority"
        if mode & 0o007:
            yield f"{name} can be read by anybody in the pod (defaultMode {mode:04o})"
        if not mode & 0o040 or pod.get("fsGroup") is None or pod.get("fsGroup") != pod.get("runAsGroup"):
            yield f"{name} cannot be read by the pod's user: defaultMode {mode:04o}, fsGroup {pod.get('fsGroup')}"
    for container in workload.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] in volumes and ("subPath" in mount or mount.get("readOnly") is not True):
                yield f"mount {mount['mountPath']}: a Secret is mounted read-only and whole, or a renewed one is not seen"


def of_files(workload, given, wanted):
    """Problems with the files that variables or flags name; returns the Secret they are in."""
    secret_of = {v["name"]: v["secret"]["secretName"] for v in workload.spec.get("volumes", []) if "secret" in v}
    mounts = {m["mountPath"]: secret_of[m["name"]] for c in workload.containers for m in c.get("volumeMounts", []) if m["name"] in secret_of}
    found = set()
    for variable, file in wanted.items():
        folder, _, name = (given.get(variable) or "").rpartition("/")
        if variable not in given:
            yield f"{variable} is not set"
        elif folder not in mounts or name != file:
            yield f"{variable} is {given[variable]}, which is no {file} of a mounted Secret"
        else:
            found.add(mounts[folder])
    if len(found) > 1:
        yield f"{', '.join(wanted)} are of several Secrets: {', '.join(sorted(found))}"
    return min(found, default=None)


def of_commands(workload, wanted):
    for container in workload.containers:
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if ("exec" in container.get(kind, {})) != wanted and (workload.is_worker or workload.is_coordinator):
                yield f"{kind} is {'not ' if wanted else ''}a command: a kubelet's own speak no TLS"


def of_client_of_etcd(documents, workload, found, endpoints):
    secret = yield from of_files(workload, found, TO_ETCD)
    made = by_secret(documents)
    servers = {name for w in workloads(documents) if is_etcd(w) for name in [secret_at(w, "/tls")]}
    for server in filter(None, map(made.get, servers)):
        for endpoint in endpoints.split(","):
            if urlsplit(endpoint).hostname not in server["spec"].get("dnsNames", []):
                yield f"dials {endpoint}, whose name {named(server)} does not have"
    if any(urlsplit(endpoint).scheme != "https" for endpoint in endpoints.split(",")):
        yield "talks to etcd in plain text"
    certificate = made.get(secret)
    if certificate:
        spec = certificate["spec"]
        for server in filter(None, map(made.get, servers)):
            if spec["issuerRef"] != server["spec"]["issuerRef"]:
                yield f"{named(certificate)} is by {spec['issuerRef']['name']}, which etcd does not believe"
        if spec.get("dnsNames") or spec.get("ipAddresses"):
            yield f"{named(certificate)} names hosts: etcd would look whether it comes from there"


def is_etcd(workload):
    return workload.labels.get("app.kubernetes.io/name") == "atelier-etcd"


def secret_at(workload, path):
    names = [m["name"] for c in workload.containers for m in c.get("volumeMounts", []) if m["mountPath"] == path]
    return next((v["secret"]["secretName"] for v in workload.spec.get("volumes", []) if v["name"] in names and "secret" in v), None)


def of_etcd(documents, workload):
    flags = dict(word.partition("=")[::2] for container in workload.containers for word in container.get("command", []))
    secret = yield from of_files(workload, flags, OF_ETCD)
    for flag in ("--client-cert-auth", "--peer-client-cert-auth"):
        if flags.get(flag) not in ("", "true"):
            yield f"{flag} is not set: anybody could write"
    for flag, value in flags.items():
        # A member's list is name=url; the port of health and metrics is plain.
        if "urls" in flag and flag != "--listen-metrics-urls" and "http:" in value:
            yield f"{flag} is plain"
    if "http:" in flags.get("--initial-cluster", ""):
        yield "--initial-cluster is plain"
    certificate = by_secret(documents).get(secret)
    if certificate is None:
        return
    spec = certificate["spec"]
    if flags.get("--peer-cert-allowed-cn") != spec.get("commonName"):
        yield f"members take {flags.get('--peer-cert-allowed-cn')!r}, and are {spec.get('commonName')!r}"
    for member in flags.get("--initial-cluster", "").split(","):
        if urlsplit(member.partition("=")[2]).hostname not in spec.get("dnsNames", []):
            yield f"{named(certificate)} does not name {member}"
    of_cluster = [c["spec"]["issuerRef"] for c in of_kind(documents, "Certificate") if set(c["spec"].get("uris", [])) & ROLES]
    if spec["issuerRef"] in of_cluster:
        yield f"believes {spec['issuerRef']['name']}, by whom clients are: they could write to etcd"


def of_certificate(documents, certificate):
    spec, key = certificate["spec"], certificate["spec"].get("privateKey", {})
    if [c["spec"]["secretName"] for c in of_kind(documents, "Certificate")].count(spec["secretName"]) > 1:
        yield f"{spec['secretName']} is filled by another one too"
    duration, left = hours(spec.get("duration", "2160h")), hours(spec.get("renewBefore", "0h"))
    if not LEAST_LEFT <= left < duration:
        yield f"is renewed {left} h before its end, of {duration} h"
    if (key.get("algorithm"), key.get("size"), key.get("encoding")) != ("ECDSA", 256, "PKCS8"):
        yield "has a key of another kind than those of `atelier certs`"
    if key.get("rotationPolicy") != ("Never" if spec.get("isCA") else "Always"):
        yield "keeps its key, or is an authority and does not"
    issuer = next((i for i in of_kind(documents, "Issuer") if i["metadata"]["name"] == spec["issuerRef"]["name"]), None)
    if issuer is None or spec["issuerRef"].get("kind") != "Issuer":
        yield f"there is no Issuer {spec['issuerRef']['name']}"
    elif ("selfSigned" in issuer["spec"]) != bool(spec.get("isCA")):
        yield "is self-signed, or is an authority and is not"
    elif "ca" in issuer["spec"] and not by_secret(documents).get(issuer["spec"]["ca"]["secretName"], {}).get("spec", {}).get("isCA"):
        yield f"{named(issuer)} has no Certificate that is an authority"
    usages, roles = set(spec.get("usages", [])), [uri for uri in spec.get("uris", []) if uri in ROLES]
    if spec.get("isCA"):
        if roles or usages != {"cert sign", "crl sign"}:
            yield "is an authority, and more than that"
        return
    serves = bool(spec.get("dnsNames")) or bool(roles and not roles[0].endswith("client"))
    if usages != {"digital signature", "client auth"} | ({"server auth"} if serves else set()):
        yield f"is for {sorted(usages)}, and {'serves' if serves else 'does not serve'}"
    if len(spec.get("uris", [])) != len(roles) or len(roles) > 1:
        yield f"its URIs are not one role: {spec.get('uris')}"


def of_names(documents):
    """Clients look for the name they dialled: each Service of coordinators, and each coordinator."""
    for certificate in of_kind(documents, "Certificate"):
        if "spiffe://atelier/coordinator" not in certificate["spec"].get("uris", []):
            continue
        names = set(certificate["spec"].get("dnsNames", []))
        wanted = {"localhost"}
        for service in of_kind(documents, "Service"):
            if any(w.is_coordinator and selects_it(service, w) for w in workloads(documents)):
                name = f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc"
                wanted |= {name, f"*.{name}"} if service["spec"].get("clusterIP") == "None" else {name, service["metadata"]["name"]}
        for name in sorted(wanted - names):
            yield f"{named(certificate)} does not name {name}"


def hours(text):
    return int(text.removesuffix("h"))
