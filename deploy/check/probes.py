"""What a kubelet asks: by gRPC where connections are plain, by the program's own command where they are TLS, by HTTP of others."""

from .flags import help_of
from .render import ROOT

# Service names of gRPC health, and the source that answers for each.
HEALTH = {
    "": None,
    "atelier.v1.JobService": "coordinator/src/runtime.rs",
    "atelier.worker.Ready": "worker/src/health.rs",
}
# The least time for a command: its process shares the processors of a pod that computes on all of them.
LEAST_TIMEOUT = 5


def of_probes(workload, container):
    ports = {port["containerPort"] for port in container.get("ports", [])}
    names = {port.get("name") for port in container.get("ports", [])}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind)
        if probe is None:
            yield f"has no {kind}"
            continue
        if "exec" in probe:
            yield from (f"{kind} {problem}" for problem in of_command(workload, probe))
        elif not {"grpc", "httpGet"} & probe.keys():
            yield f"{kind} asks neither by gRPC nor by HTTP nor by a command"
            continue
        port, service = asked(probe)
        if port not in ports | names:
            yield f"{kind} asks port {port}, which it does not have"
        if "httpGet" not in probe:
            source = HEALTH.get(service, "")
            if source == "" or (source and f'"{service}"' not in (ROOT / source).read_text()):
                yield f"{kind} asks for health of {service!r}, which nothing answers"
            if kind == "livenessProbe" and service:
                yield "livenessProbe looks at more than the process"


def asked(probe):
    """The port that a probe asks, and the service of gRPC health."""
    if "exec" in probe:
        words = probe["exec"]["command"]
        port = next((word.rpartition(":")[2] for word in words[2:] if not word.startswith("-")), "7700")
        service = next((word.partition("=")[2] for word in words if word.startswith("--service=")), "")
        return int(port) if port.isdecimal() else port, service
    if "grpc" in probe:
        return probe["grpc"]["port"], probe["grpc"].get("service", "")
    return probe["httpGet"]["port"], ""


def of_command(workload, probe):
    """`atelier health`: it finds certificates by the container's own variables."""
    words = probe["exec"]["command"]
    if words[:2] != ["atelier", "health"]:
        yield f"runs {words[:2]}, not `atelier health`"
        return
    for word in words[2:]:
        if word.startswith("-") and word.partition("=")[0] not in help_of("health")[0]:
            yield f"`atelier health` has no flag {word}"
        if not word.startswith("-") and word.partition(":")[0] != "127.0.0.1":
            yield f"asks {word}, not its own pod"
    if workload.is_worker != ("--worker" in words):
        yield "shows a worker's certificate at a worker, and at no other: --worker"
    if probe.get("timeoutSeconds", 1) < LEAST_TIMEOUT:
        yield f"gives its command less than {LEAST_TIMEOUT} s"
