"""The first of an overlay's etcd members as a process: its own flags, its Secret, and ports of localhost, which its certificate names."""

import re
import socket
import subprocess

from .commands import files_of
from .workloads import workloads


def endpoint(ports):
    """What stands for the members' addresses: pattern -> address."""
    return {r"https://atelier-etcd-\d\.atelier-etcd:2379": f"https://localhost:{ports[0]}"}


def free_ports():
    """For clients, for members, and for health."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def start(documents, folder, ports, log):
    (member,) = [workload for workload in workloads(documents) if workload.name == "StatefulSet/atelier-etcd"]
    (container,) = member.containers
    places = {
        r"^--initial-cluster=.*": f"--initial-cluster=atelier-etcd-0=https://localhost:{ports[1]}",
        r"\$\(POD_NAME\)\.atelier-etcd": "localhost",
        r"\$\(POD_NAME\)": "atelier-etcd-0",
        r"0\.0\.0\.0": "127.0.0.1",
        r"=/data/": f"={folder}/",
        **{f"={path}/": f"={folder}/secrets/{secret}/" for path, secret in files_of(member).items()},
        **{f":{port}$": f":{free}" for port, free in zip((2379, 2380, 2381), ports)},
    }
    words = list(container["command"])
    for here, there in places.items():
        words = [re.sub(here, there, word) for word in words]
    return subprocess.Popen(words, stderr=log, stdout=log)
