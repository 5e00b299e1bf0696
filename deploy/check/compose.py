"""compose.yaml, read as text: no Docker engine is needed, so nothing is started."""

import functools
import os
import pathlib
import re
import subprocess
import tempfile

import yaml

from .commands import TAKEN, made, moved
from .flags import ATELIER, help_of, of_arguments, refusal_of
from .images import USER
from .render import DEPLOY, ROOT

# The one-shot service that makes the others' certificates.
MAKER = "certificates"
FILES = {"ATELIER_TLS_CERT": "{role}.crt", "ATELIER_TLS_KEY": "{role}.key", "ATELIER_TLS_CA": "ca.crt"}


def problems():
    yield from (f"compose.yaml: {problem}" for problem in of_text((DEPLOY / "compose.yaml").read_text()))


def of_text(text):
    compose = yaml.safe_load(text)
    for name, service in compose["services"].items():
        for problem in of_service(name, service):
            yield f"{name}: {problem}"
        for volume in service.get("volumes", []):
            if volume.partition(":")[0] not in compose["volumes"]:
                yield f"{name}: there is no volume {volume.partition(':')[0]}"


def of_service(name, service):
    if service.get("user") != USER or service.get("read_only") is not True or service.get("cap_drop") != ["ALL"]:
        yield "is not locked down (user, read_only, cap_drop)"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "may gain privileges"
    if "mem_limit" not in service:
        yield "has no limit of memory"
    if ":" not in service["image"] or service["image"].endswith(":latest"):
        yield f"image {service['image']!r} has no fixed tag"
    if not (DEPLOY.parent / service["build"]["dockerfile"]).is_file():
        yield f"there is no {service['build']['dockerfile']}"
    if any(not str(port).startswith("127.0.0.1:") for port in service.get("ports", [])):
        yield "is open to other machines"
    if name == MAKER:
        yield from of_maker(service)
    else:
        yield from of_command(name, service)
        yield from of_tls(service)


def of_command(name, service):
    command, *arguments = service["command"]
    yield from of_arguments(command, arguments)
    for variable in service.get("environment", {}).keys() - help_of(command)[1]:
        yield f"`atelier {command}` reads no variable {variable}"
    for argument in arguments:
        host = argument.partition("=")[2].partition(":")[0]
        if argument.startswith("--advertise") and host != name:
            yield f"says that it is reached at {host}"
    if command in ("coordinator", "worker"):
        said = refused(tuple(service["command"]), tuple((key, str(value)) for key, value in service.get("environment", {}).items()))
        if said:
            yield f"`atelier {command}` does not take its settings: {said}"


@functools.lru_cache(maxsize=None)
def refused(command, variables):
    """What the program itself says of a service's settings, all together."""
    with tempfile.TemporaryDirectory() as folder:
        places = {
            r"0\.0\.0\.0:\d+": "0.0.0.0:0",
            r"^/usr/share/atelier/": f"{ROOT}/",
            r"^/data": f"{folder}/data",
            r"^/tls/\w+/": f"{made()}/certs/",
        }
        return refusal_of([ATELIER, *command], moved(dict(variables), places), TAKEN)


def of_tls(service):
    """It has the certificate of its role, and no other's."""
    variables = service.get("environment", {})
    role = service["command"][0] if service["command"][0] in ("coordinator", "worker") else "client"
    if "ATELIER_INSECURE" in variables:
        yield "sets ATELIER_INSECURE"
    for variable, file in FILES.items():
        if variables.get(variable) != f"/tls/{role}/{file.format(role=role)}":
            yield f"{variable} is {variables.get(variable)}"
    mounts = [volume for volume in service.get("volumes", []) if "tls" in volume or "authority" in volume]
    if mounts != [f"tls-{role}:/tls/{role}:ro"]:
        yield f"mounts {mounts}, not the files of a {role}, read-only"
    if service.get("depends_on", {}).get(MAKER) != {"condition": "service_completed_successfully"}:
        yield "does not wait for its certificate"
    for variable in ("ATELIER_SERVER", "ATELIER_WORKER_COORDINATOR"):
        if not variables.get(variable, "https:").startswith("https:"):
            yield f"dials {variables[variable]}"
    test = service.get("healthcheck", {}).get("test")
    if role != "client" and (test is None or test[:3] != ["CMD", "atelier", "health"] or ("--worker" in test) != (role == "worker")):
        yield "is not asked for its health by `atelier health`"
    for word in test or []:
        if word.startswith("--") and word.partition("=")[0] not in help_of("health")[0]:
            yield f"`atelier health` has no flag {word}"


def of_maker(service):
    (script,) = service["command"]
    calls = re.findall(r"^atelier certs (.*)$", script, re.MULTILINE)
    if len(calls) != 1:
        yield "makes no certificates"
    for call in calls:
        yield from of_arguments("certs", [word for word in call.split() if not word.startswith("$")])
        if "--host=coordinator" not in call.split():
            yield "the coordinator's certificate does not say its name"
    if service.get("restart") != "no":
        yield "is started again and again"


def run():
    """The service that makes certificates, here: twice, as for two `up`. Gives how many of its claims do not hold."""
    (script,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][MAKER]["command"]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        for role in ("coordinator", "worker", "client"):
            (folder / "tls" / role).mkdir(parents=True)
        script = script.replace("$$", "$").replace("/authority", f"{folder}/authority").replace(" /tls", f" {folder}/tls")
        environment = {"PATH": f"{pathlib.Path(ATELIER).parent}:{os.environ['PATH']}"}
        seen = []
        for _ in range(2):
            done = subprocess.run(["sh", "-ec", script], env=environment, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                print(f"  compose.yaml: {MAKER}: {done.stderr.strip()}")
                return 1
            seen.append({file.relative_to(folder / "tls"): file.read_text() for file in (folder / "tls").glob("*/*")})
    made = {pathlib.Path(role, file) for role in ("coordinator", "worker", "client") for file in (f"{role}.crt", f"{role}.key", "ca.crt")}
    changed = {file for file in made if seen[0].get(file) != seen[1].get(file)}
    kept = {file for file in made if file.name == "ca.crt"}
    if set(seen[0]) != made or changed != made - kept:
        print(f"  compose.yaml: {MAKER}: made {sorted(map(str, seen[0]))}, and anew {sorted(map(str, changed))}")
        return 1
    print(f"compose.yaml: {MAKER} makes files for three roles, and keeps its authority when it makes them anew")
    return 0
