"""What manifests tell the program, against what the program takes: flags, variables, models.toml."""

import functools
import os
import pathlib
import re
import subprocess
import tempfile
import tomllib

from .render import DEPLOY, ROOT
from .workloads import named, of_kind, settings, workloads

ATELIER = pathlib.Path(os.environ.get("ATELIER", ROOT / "target" / "release" / "atelier"))
# Read by the log and by libraries, not by our flags.
OTHER_VARIABLES = {
    "RUST_LOG", "POD_NAME", "POD_NAMESPACE", "POD_IP", "NODE_NAME", "CUDA_CACHE_PATH", "AWS_REGION", "OTEL_EXPORTER_OTLP_ENDPOINT",
}
# Where a coordinator says that it has read all it was given.
SERVES = ("coordinator serves",)


@functools.lru_cache(maxsize=None)
def help_of(command):
    """A command's flags, and the variables that stand for them."""
    text = subprocess.run([ATELIER, command, "--help"], capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"^\s+(?:-\w, )?(--[a-z][a-z-]*)", text, re.MULTILINE))
    return flags, set(re.findall(r"\[env: ([A-Z_]+)=", text))


def problems(documents):
    for workload in workloads(documents):
        if not (workload.is_worker or workload.is_coordinator):
            continue
        command = "worker" if workload.is_worker else "coordinator"
        for container in workload.containers:
            if container.get("args", [None])[0] != command:
                yield f"{workload.name}: its first argument is not {command!r}"
            for problem in of_arguments(command, container.get("args", [])[1:]):
                yield f"{workload.name}: {problem}"
        variables = settings(documents, workload)
        for name in variables.keys() - OTHER_VARIABLES - help_of(command)[1]:
            yield f"{workload.name}: `atelier {command}` reads no variable {name}"
        if workload.is_worker and len({"ATELIER_WORKER_COORDINATOR", "ATELIER_WORKER_ETCD"} & variables.keys()) != 1:
            yield f"{workload.name}: must have a coordinator or etcd, not both"
    yield from of_models(documents)


def of_arguments(command, arguments):
    for argument in arguments:
        flag, given, _ = argument.partition("=")
        if not given:
            yield f"argument {argument!r} is not --flag=value"
        elif flag not in help_of(command)[0]:
            yield f"`atelier {command}` has no flag {flag}"


def of_models(documents):
    (models,) = [item for item in of_kind(documents, "ConfigMap") if "models.toml" in item.get("data", {})]
    text = models["data"]["models.toml"]
    refused = refusal(text)
    if refused:
        yield f"models.toml: {refused}"
        return
    for model in tomllib.loads(text)["model"]:
        for component, cut in model.get("components", {}).items():
            yield from of_component(documents, f"models.toml: {model['name']}.{component}", cut)


def of_component(documents, what, cut):
    """A component's group, against the workers that its selector takes."""
    ranks, most = cut.get("tp", 1) * cut.get("block_ranges", 1), cut.get("replicas", 1)
    fits = [w for w in workloads(documents) if w.is_worker and cut.get("workers", {}).items() <= labels(w).items()]
    # Before an autoscaler has said how many, a Deployment has one.
    if sum(workload.replicas * workload.size for workload in fits) < ranks:
        yield f"{what}: a group needs {ranks} workers with {cut.get('workers')}, and there are not so many"
    for workload in fits:
        if workload.size > 1 and workload.size != ranks:
            yield f"{what}: a group has {ranks} ranks, {workload.name} has sets of {workload.size}"
        if workload.replicas * workload.size > most * ranks:
            yield f"{what}: {workload.name} has more workers than {most} groups of {ranks} can use"
        for scaled in of_kind(documents, "ScaledObject"):
            target = scaled["spec"]["scaleTargetRef"]
            if f"{target['kind']}/{target['name']}" == workload.name and scaled["spec"]["maxReplicaCount"] > most:
                yield f"{what}: replicas = {most}, and {named(scaled)} goes beyond it"


def labels(workload):
    """What a worker registers with."""
    arguments = [argument for container in workload.containers for argument in container.get("args", [])]
    return dict(argument.removeprefix("--label=").split("=", 1) for argument in arguments if argument.startswith("--label="))


@functools.lru_cache(maxsize=None)
def refusal(text):
    """Why the program does not take this models.toml; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "models.toml"
        file.write_text(text)
        command = [ATELIER, "coordinator", "--listen=127.0.0.1:0", f"--models={file}", f"--data-dir={folder}/data"]
        return refusal_of(command, {}, SERVES)


def refusal_of(command, environment, taken):
    """Why the program does not run so; None once it says one of the words of `taken`."""
    environment = {**environment, "RUST_LOG": "info", "NO_COLOR": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment) as process:
        said = ""
        for line in process.stderr:
            if any(words in line for words in taken):
                process.kill()
                return None
            said = line.strip() or said
        return said or f"`{' '.join(map(str, command[:2]))}` ended with {process.wait()}"


def sources():
    """Every models.toml here, so that one that no overlay uses is read too."""
    for file in sorted(DEPLOY.glob("kubernetes/**/models.toml")):
        refused = refusal(file.read_text())
        if refused:
            yield f"{file.relative_to(ROOT)}: {refused}"
