"""Whatever runs pods, seen alike."""

import dataclasses


@dataclasses.dataclass
class Workload:
    kind: str
    name: str
    template: dict
    # Sets of pods, and pods in each.
    replicas: int
    size: int
    # Volumes that the workload itself makes.
    claims: list

    @property
    def labels(self):
        return self.template["metadata"]["labels"]

    @property
    def spec(self):
        return self.template["spec"]

    @property
    def containers(self):
        return self.spec.get("initContainers", []) + self.spec["containers"]

    @property
    def is_worker(self):
        return self.labels.get("app.kubernetes.io/name") == "atelier-worker"

    @property
    def is_coordinator(self):
        return self.labels.get("app.kubernetes.io/name") == "atelier-coordinator"


def workloads(documents):
    return [workload for document in documents for workload in of(document)]


def of(document):
    kind, spec = document["kind"], document.get("spec", {})
    if kind in ("Deployment", "StatefulSet", "DaemonSet"):
        claims = [claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])]
        yield Workload(kind, named(document), spec["template"], spec.get("replicas", 1), 1, claims)
    elif kind == "LeaderWorkerSet":
        yield from leader_worker(kind, named(document), spec, 1)
    elif kind == "DisaggregatedSet":
        for role in spec["roles"]:
            yield from leader_worker(kind, f"{named(document)}/{role['name']}", role["spec"], spec.get("slices", 1))
    elif kind in ("Pod", "Job", "CronJob", "ReplicaSet"):
        raise SystemExit(f"{named(document)}: no rule here looks into a {kind}")


def leader_worker(kind, name, spec, slices):
    template = spec["leaderWorkerTemplate"]
    if "leaderTemplate" in template:
        raise SystemExit(f"{name}: no rule here looks into a leaderTemplate")
    yield Workload(kind, name, template["workerTemplate"], spec.get("replicas", 1) * slices, template.get("size", 1), [])


def named(document):
    return f"{document['kind']}/{document['metadata']['name']}"


def of_kind(documents, *kinds):
    return [document for document in documents if document["kind"] in kinds]


def selects(selector, labels):
    """Whether a label selector takes a pod with `labels`. An empty one takes every pod."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions") or []:
        value, operator = labels.get(rule["key"]), rule["operator"]
        if operator == "In" and value not in rule["values"]:
            return False
        if operator == "NotIn" and value in rule["values"]:
            return False
        if operator == "Exists" and value is None:
            return False
        if operator == "DoesNotExist" and value is not None:
            return False
    return True


def settings(documents, workload):
    """A workload's environment as far as the manifests say it: name -> value, None for what is known when it runs."""
    maps = {document["metadata"]["name"]: document.get("data", {}) for document in of_kind(documents, "ConfigMap")}
    found = {}
    for container in workload.containers:
        for source in container.get("envFrom", []):
            found.update(maps.get(source.get("configMapRef", {}).get("name"), {}))
        for variable in container.get("env", []):
            found[variable["name"]] = variable.get("value")
    return found
