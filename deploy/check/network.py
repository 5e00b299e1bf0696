"""Who reaches whom: NetworkPolicies, worked out as a network plugin does, against what must and what must not pass."""

import ipaddress

from .workloads import named, of_kind, selects, workloads

# (from, to, port): the only ways there are. A name is a value of app.kubernetes.io/name.
COORDINATOR, WORKER, ETCD, CLIENT, STRANGER = "atelier-coordinator", "atelier-worker", "atelier-etcd", "client", "stranger"
WAYS = {
    (CLIENT, COORDINATOR, 7700),
    (WORKER, COORDINATOR, 7700),
    (COORDINATOR, WORKER, 7701),
    (WORKER, WORKER, 7701),
    (WORKER, WORKER, 7702),
    (COORDINATOR, ETCD, 2379),
    (WORKER, ETCD, 2379),
    (ETCD, ETCD, 2379),
    (ETCD, ETCD, 2380),
}
# Ports that somebody listens at, and one of those that the system gives to whoever asks for any.
PORTS = (7700, 7701, 7702, 7709, 2379, 2380, 41000)
# The namespace all is in, and one that nothing is known of.
HERE = {"kubernetes.io/metadata.name": "atelier"}
ELSEWHERE = {"kubernetes.io/metadata.name": "elsewhere"}


def problems(documents):
    policies = of_kind(documents, "NetworkPolicy")
    everybody = [p for p in policies if not p["spec"]["podSelector"] and not {"ingress", "egress"} & p["spec"].keys()]
    if not any(set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"} for p in everybody):
        yield "no NetworkPolicy denies all by default"
    pods = {workload.name: workload.labels for workload in workloads(documents)}
    for name, labels in pods.items():
        own = [p for p in policies if p["spec"]["podSelector"] and selects(p["spec"]["podSelector"], labels)]
        for kind in ("Ingress", "Egress"):
            if not any(kind in p["spec"]["policyTypes"] for p in own):
                yield f"{name}: no NetworkPolicy of its own says its {kind}"
        dns = {"peer_labels": {"k8s-app": "kube-dns"}, "namespace": {"kubernetes.io/metadata.name": "kube-system"}, "port": 53}
        if not all(permits(policies, labels, "Egress", **dns, protocol=protocol) for protocol in ("UDP", "TCP")):
            yield f"{name}: cannot look up names"
    ways = ways_of(documents)
    # A stranger in this namespace, without a label.
    pods |= {CLIENT: {"atelier.dev/client": "true"}, STRANGER: {}}
    for source, source_labels in pods.items():
        for target, target_labels in pods.items():
            if target in (CLIENT, STRANGER):
                continue
            for port in PORTS:
                passes = permits(policies, source_labels, "Egress", target_labels, HERE, port) and permits(
                    policies, target_labels, "Ingress", source_labels, HERE, port
                )
                wanted = (kind_of(source_labels), kind_of(target_labels), port) in ways
                if passes != wanted:
                    yield f"{source} {'reaches' if passes else 'does not reach'} {target} at port {port}"
    for name, labels in pods.items():
        yield from from_elsewhere(policies, name, labels)
    # The metadata service of clouds gives credentials away.
    for name, labels in pods.items():
        if permits_address(policies, labels, "169.254.169.254", 80) or permits_address(policies, labels, "169.254.169.254", 443):
            yield f"{name}: reaches the cloud's metadata service"


def ways_of(documents):
    """All ways there are. Workers on GPUs reach each other at every port: NCCL's are not known beforehand."""
    containers = [container for workload in workloads(documents) if workload.is_worker for container in workload.containers]
    on_gpus = any("nvidia.com/gpu" in container.get("resources", {}).get("limits", {}) for container in containers)
    return WAYS | ({(WORKER, WORKER, port) for port in PORTS} if on_gpus else set())


def from_elsewhere(policies, name, labels):
    """Pods of other namespaces, whose own policies we do not make: only clients of a namespace of clients come in."""
    clients = {"kubernetes.io/metadata.name": "shop", "atelier.dev/clients": "true"}
    client = {"atelier.dev/client": "true"}
    for who, peer, namespace in (
        ("anybody elsewhere", {}, ELSEWHERE),
        ("a worker elsewhere", {"app.kubernetes.io/name": WORKER}, ELSEWHERE),
        ("a client of a namespace without the label", client, ELSEWHERE),
        ("anybody in a namespace of clients", {}, clients),
        ("a client in a namespace of clients", client, clients),
    ):
        for port in PORTS:
            passes = permits(policies, labels, "Ingress", peer, namespace, port)
            wanted = peer == client and namespace == clients and (CLIENT, kind_of(labels), port) in WAYS
            if passes != wanted and labels:
                yield f"{who} {'reaches' if passes else 'does not reach'} {name} at port {port}"


def kind_of(labels):
    if "atelier.dev/client" in labels:
        return CLIENT
    return labels.get("app.kubernetes.io/name", STRANGER)


def rules(policies, labels, kind):
    side = kind.lower()
    for policy in policies:
        spec = policy["spec"]
        if kind in spec["policyTypes"] and selects(spec["podSelector"], labels):
            if policy["metadata"].get("namespace") != "atelier":
                raise SystemExit(f"{named(policy)} is in another namespace than the pods")
            yield from spec.get(side) or []


def permits(policies, labels, kind, peer_labels, namespace, port, protocol="TCP"):
    """Whether a pod's policies let it speak (Egress) with such a pod, or such a pod with it (Ingress)."""
    peers = "to" if kind == "Egress" else "from"
    return any(
        at_port(rule, port, protocol) and (peers not in rule or any(is_peer(peer, peer_labels, namespace) for peer in rule[peers]))
        for rule in rules(policies, labels, kind)
    )


def is_peer(peer, labels, namespace):
    if "ipBlock" in peer:
        return False
    # Without a selector of namespaces it is this one.
    in_namespace = selects(peer["namespaceSelector"], namespace) if "namespaceSelector" in peer else namespace == HERE
    return in_namespace and selects(peer.get("podSelector", {}), labels)


def permits_address(policies, labels, address, port):
    address = ipaddress.ip_address(address)

    def inside(block):
        excepted = any(address in ipaddress.ip_network(part) for part in block.get("except", []))
        return address in ipaddress.ip_network(block["cidr"]) and not excepted

    return any(
        at_port(rule, port, "TCP") and ("to" not in rule or any("ipBlock" in peer and inside(peer["ipBlock"]) for peer in rule["to"]))
        for rule in rules(policies, labels, "Egress")
    )


def at_port(rule, port, protocol):
    return "ports" not in rule or any(covers(entry, port, protocol) for entry in rule["ports"])


def covers(entry, port, protocol):
    """An entry without a port is of every port of its protocol."""
    first = entry.get("port")
    if isinstance(first, str):
        raise SystemExit(f"no rule here looks into a port by its name ({first})")
    return entry.get("protocol", "TCP") == protocol and (first is None or first <= port <= entry.get("endPort", first))
