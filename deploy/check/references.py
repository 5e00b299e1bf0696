"""Objects that name others: Services, monitors, autoscalers, and names that are used twice."""

import collections

from .workloads import named, of_kind, selects, workloads


def problems(documents):
    counted = collections.Counter((document["apiVersion"], named(document)) for document in documents)
    yield from (f"{name} is there {count} times" for (_, name), count in counted.items() if count > 1)
    for document in documents:
        wanted = None if document["kind"] == "Namespace" else "atelier"
        if document["metadata"].get("namespace") != wanted:
            yield f"{named(document)} is in namespace {document['metadata'].get('namespace')}"
    for service in of_kind(documents, "Service"):
        yield from of_service(documents, service)
    for monitor in of_kind(documents, "ServiceMonitor", "PodMonitor"):
        yield from of_monitor(documents, monitor)
    for scaled in of_kind(documents, "ScaledObject"):
        target = scaled["spec"]["scaleTargetRef"]
        found = [d for d in documents if named(d) == f"{target['kind']}/{target['name']}" and d["apiVersion"] == target["apiVersion"]]
        if len(found) != 1:
            yield f"{named(scaled)}: there is no {target['kind']} {target['name']}"
        elif "replicas" in found[0]["spec"]:
            yield f"{named(scaled)}: its target says replicas too, and every apply would set them back"


def ports_of(workload):
    return {port.get("name") for container in workload.containers for port in container.get("ports", [])}


def of_service(documents, service):
    behind = [w for w in workloads(documents) if selects({"matchLabels": service["spec"]["selector"]}, w.labels)]
    if not behind:
        yield f"{named(service)} selects no pod"
    for workload in behind:
        for port in service["spec"]["ports"]:
            if port["targetPort"] not in ports_of(workload):
                yield f"{named(service)}: {workload.name} has no port {port['targetPort']}"


def of_monitor(documents, monitor):
    spec = monitor["spec"]
    if monitor["kind"] == "PodMonitor":
        behind = [w for w in workloads(documents) if selects(spec["selector"], w.labels)]
        offered, asked = [ports_of(workload) for workload in behind], spec["podMetricsEndpoints"]
    else:
        behind = [s for s in of_kind(documents, "Service") if selects(spec["selector"], s["metadata"].get("labels", {}))]
        offered, asked = [{port["name"] for port in service["spec"]["ports"]} for service in behind], spec["endpoints"]
    if not behind:
        yield f"{named(monitor)} selects nothing"
    for ports in offered:
        for endpoint in asked:
            if endpoint["port"] not in ports:
                yield f"{named(monitor)}: what it selects has no port {endpoint['port']}"
