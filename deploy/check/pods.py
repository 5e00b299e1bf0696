"""What every pod must be: locked down, probed, bounded, stopped in time, and made of things that are there."""

import re

from .certificates import secrets
from .probes import of_probes
from .workloads import of_kind, selects, settings, workloads

# From the end of a worker's drain to its exit: it signs off (1 s) and ends its calls (2 s).
AFTER_DRAIN = 5
NOT_ALLOWED_IN_PODS = ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace")


def problems(documents):
    for workload in workloads(documents):
        for problem in of_pod(documents, workload):
            yield f"{workload.name}: {problem}"
        for container in workload.containers:
            for problem in of_container(workload, container):
                yield f"{workload.name}: container {container['name']}: {problem}"


def of_pod(documents, workload):
    spec = workload.spec
    for field in NOT_ALLOWED_IN_PODS:
        if field in spec:
            yield f"{field} is set"
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken is not false"
    if spec.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false: variables of Services could be taken for ours"
    accounts = {account["metadata"]["name"]: account for account in of_kind(documents, "ServiceAccount")}
    account = accounts.get(spec.get("serviceAccountName"))
    if account is None:
        yield f"serviceAccountName {spec.get('serviceAccountName')!r} is no ServiceAccount here"
    elif account.get("automountServiceAccountToken") is not False:
        yield "its ServiceAccount mounts a token"
    security = spec.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser", 0) >= 10000:
        yield "does not run as a numeric user that is not root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "seccompProfile is not RuntimeDefault"
    yield from of_volumes(documents, workload)
    yield from of_grace(documents, workload)
    yield from of_disruption(documents, workload)


def of_volumes(documents, workload):
    there = {(kind, item["metadata"]["name"]) for kind in ("ConfigMap", "Secret", "PersistentVolumeClaim") for item in of_kind(documents, kind)}
    there |= {("Secret", name) for name in secrets(documents)}
    volumes = {volume["name"]: volume for volume in workload.spec.get("volumes", [])}
    for volume in volumes.values():
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a hostPath"
        wanted = [
            ("ConfigMap", volume.get("configMap", {}).get("name")),
            ("Secret", volume.get("secret", {}).get("secretName")),
            ("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")),
        ]
        for reference in wanted:
            if reference[1] and reference not in there:
                yield f"volume {volume['name']}: there is no {reference[0]} {reference[1]}"
        image = volume.get("image", {}).get("reference")
        if image and "@sha256:" not in image:
            yield f"volume {volume['name']}: image {image} is not pinned by digest"
    for container in workload.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes and mount["name"] not in workload.claims:
                yield f"mount {mount['mountPath']}: there is no volume {mount['name']}"
            if mount["mountPath"] == "/models" and mount.get("readOnly") is not True:
                yield "weights are not mounted read-only"
        for source in container.get("envFrom", []):
            for kind, field in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
                name = source.get(field, {}).get("name")
                if name and (kind, name) not in there:
                    yield f"envFrom: there is no {kind} {name}"


def of_grace(documents, workload):
    grace = workload.spec.get("terminationGracePeriodSeconds")
    if grace is None:
        yield "terminationGracePeriodSeconds is left to the default"
    elif workload.is_worker:
        drain = settings(documents, workload).get("ATELIER_WORKER_DRAIN_TIMEOUT")
        if drain is None:
            yield "ATELIER_WORKER_DRAIN_TIMEOUT is not set"
        elif grace < int(drain) + AFTER_DRAIN:
            yield f"terminationGracePeriodSeconds {grace} is less than the drain's {drain} + {AFTER_DRAIN}"


def of_disruption(documents, workload):
    budgets = [budget for budget in of_kind(documents, "PodDisruptionBudget") if selects(budget["spec"]["selector"], workload.labels)]
    if len(budgets) != 1:
        yield f"{len(budgets)} PodDisruptionBudgets select it, not one"
    for budget in budgets:
        if budget["spec"].get("maxUnavailable") != 1:
            yield "its PodDisruptionBudget does not let exactly one pod go at a time"


def of_container(workload, container):
    security = container.get("securityContext", {})
    for field, wanted in (("readOnlyRootFilesystem", True), ("allowPrivilegeEscalation", False)):
        if security.get(field) is not wanted:
            yield f"{field} is not {str(wanted).lower()}"
    if security.get("privileged"):
        yield "is privileged"
    capabilities = security.get("capabilities", {})
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield "does not drop ALL capabilities"
    image = container.get("image", "")
    name = image.rsplit("/", 1)[-1]
    if "@sha256:" not in image and (":" not in name or name.endswith(":latest")):
        yield f"image {image!r} has no fixed tag"
    if name.startswith("etcd:") and version(name) < (3, 5, 26):
        yield f"image {image!r} is older than 3.5.26"
    resources = container.get("resources", {})
    for side in ("requests", "limits"):
        for what in ("cpu", "memory"):
            if what not in resources.get(side, {}):
                yield f"resources.{side}.{what} is missing"
    for port in container.get("ports", []):
        if "hostPort" in port:
            yield f"port {port.get('name')} is a hostPort"
    if workload.is_worker:
        yield from of_host(container)
    yield from of_probes(workload, container)


def of_host(container):
    """Ranks are kept together by node: inside a pod the machine's own name is the pod's, which would make each a host of its own."""
    if "--label=host=$(NODE_NAME)" not in container.get("args", []):
        yield "does not register with its node as `host`"
    sources = {variable["name"]: variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") for variable in container.get("env", [])}
    if sources.get("NODE_NAME") != "spec.nodeName":
        yield "NODE_NAME is not the name of its node"


def version(name):
    return tuple(int(number) for number in re.findall(r"\d+", name.split(":")[1])[:3])
