"""A pod's container as a process here: its command and its variables, with this machine's places in place of the pod's."""

import functools
import pathlib
import re
import shutil
import subprocess
import tempfile

from .flags import ATELIER, refusal_of
from .workloads import of_kind, settings, workloads

# What a worker and a coordinator say once they have taken all they were told: it listens; it serves; etcd does not answer.
TAKEN = ("listening worker.id", "coordinator serves", "standing for the lead was interrupted")


def files_of(workload):
    """Where a pod has Secrets: path -> name."""
    secrets = {v["name"]: v["secret"]["secretName"] for v in workload.spec.get("volumes", []) if "secret" in v}
    return {m["mountPath"]: secrets[m["name"]] for c in workload.containers for m in c.get("volumeMounts", []) if m["name"] in secrets}


def moved(variables, places):
    """Variables with this machine's places in them. `places`: here -> there, as patterns."""
    found = {}
    for key, value in variables.items():
        for here, there in places.items():
            value = re.sub(here, there, value)
        found[key] = value
    return found


def command(documents, workload, known, places):
    """Arguments and variables of a workload's only container. `known`: what the cluster tells a pod; `places`: here -> there."""
    (container,) = workload.containers
    variables = moved({key: known.get(key, value) for key, value in settings(documents, workload).items()}, places)
    arguments = [re.sub(r"\$\((\w+)\)", lambda found: variables.get(found[1]) or found[0], argument) for argument in container["args"]]
    return arguments, variables


def problems(documents):
    """What the program itself says of each workload's settings, all together."""
    (models,) = [item for item in of_kind(documents, "ConfigMap") if "models.toml" in item.get("data", {})]
    for workload in workloads(documents):
        if not (workload.is_worker or workload.is_coordinator):
            continue
        folder = pathlib.Path(made())
        role = "worker" if workload.is_worker else "coordinator"
        places = {
            r"0\.0\.0\.0:\d+": "0.0.0.0:0",
            r"^/etc/atelier/models\.toml$": f"{folder}/models.toml",
            r"^/data": f"{folder}/data",
            # Nobody is there; what is looked at comes before that.
            r"https://atelier-etcd-\d\.atelier-etcd:2379": "https://127.0.0.1:1",
            # What only a build for GPUs takes, and every pod has: its one GPU. Any other name of a device is for the program to refuse.
            r"^cuda:0$": "cpu",
            **{f"^{path}/": f"{folder}/{role}/" for path in files_of(workload)},
        }
        known = {"POD_NAME": "pod", "POD_NAMESPACE": "atelier", "POD_IP": "127.0.0.1", "NODE_NAME": "node"}
        arguments, variables = command(documents, workload, known, places)
        variables.pop("OTEL_EXPORTER_OTLP_ENDPOINT", None)
        said = refused(tuple(arguments), tuple(sorted(variables.items())), models["data"]["models.toml"])
        if said:
            yield f"{workload.name}: `atelier {role}` does not take its settings: {said}"


@functools.lru_cache(maxsize=None)
def refused(arguments, variables, models):
    (pathlib.Path(made()) / "models.toml").write_text(models)
    secrets = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none"}
    return refusal_of([ATELIER, *arguments], {**secrets, **dict(variables)}, TAKEN)


_folders = []


@functools.lru_cache(maxsize=None)
def made():
    """A folder with what Secrets hold: tls.crt, tls.key and ca.crt, below each role."""
    _folders.append(tempfile.TemporaryDirectory())
    folder = pathlib.Path(_folders[0].name)
    subprocess.run([ATELIER, "certs", "--dir", folder / "certs"], check=True, capture_output=True)
    for role in ("coordinator", "worker"):
        (folder / role).mkdir()
        for file, name in ((f"{role}.crt", "tls.crt"), (f"{role}.key", "tls.key"), ("ca.crt", "ca.crt")):
            shutil.copy(folder / "certs" / file, folder / role / name)
    return folder
