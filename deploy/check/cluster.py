"""Overlay cpu-dev without Kubernetes: its very commands and variables as processes, each pod at an address of its own.

Shows that the probes' health services answer as the manifests expect, that a worker joins and leaves without a restart of
anything, and that SIGTERM ends one within its grace period. The network, volumes and limits of pods are not played.
"""

import os
import pathlib
import re
import signal
import subprocess
import tempfile
import time

import grpc

from .flags import ATELIER
from .render import ROOT
from .workloads import of_kind, settings, workloads

# Longest wait until something is so; the machine may be busy.
PATIENCE = 120
SERVING = b"\x08\x01"


class Pod:
    """A process in place of a pod's container. Pods differ by address, not by port."""

    def __init__(self, documents, workload, name, address, folder, coordinator):
        (self.container,) = workload.containers
        self.name, self.address, self.grace = name, address, workload.spec["terminationGracePeriodSeconds"]
        known = {"POD_NAME": name, "POD_NAMESPACE": "atelier", "POD_IP": address, "NODE_NAME": "node"}
        variables = {key: known.get(key, value) for key, value in settings(documents, workload).items()}
        places = {
            "0.0.0.0": address,
            "/etc/atelier": str(folder),
            "/data": str(folder / "data"),
            "http://atelier-coordinator:7700": f"http://{coordinator}:7700",
        }
        for key, value in variables.items():
            for here, there in places.items():
                value = value.replace(here, there)
            variables[key] = value
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], argument) for argument in self.container["args"]]
        # The name that the cluster's DNS would know.
        arguments = [re.sub(r"^--advertise=[^:]+", f"--advertise={coordinator}", argument) for argument in arguments]
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            environment = {"PATH": os.environ["PATH"], **variables}
            self.process = subprocess.Popen([ATELIER, *arguments], env=environment, stderr=log, stdout=log)

    def probe(self, kind):
        """What a kubelet would find."""
        asked = self.container[kind]["grpc"]
        service = asked.get("service", "").encode()
        with grpc.insecure_channel(f"{self.address}:{asked['port']}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            try:
                return check(b"\x0a" + bytes([len(service)]) + service, timeout=2) == SERVING
            except grpc.RpcError:
                return False

    def stop(self):
        """SIGTERM, as a kubelet; gives how long it took, None if SIGKILL would have come."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(self.grace)
        except subprocess.TimeoutExpired:
            return None
        return time.monotonic() - began if code == 0 else None


def until(what, is_so):
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.1)


def run(documents):
    """Gives how many of its claims do not hold."""
    with tempfile.TemporaryDirectory() as folder:
        folder, pods = pathlib.Path(folder), []
        try:
            play(documents, folder, pods)
        except (TimeoutError, AssertionError) as error:
            print(f"  cpu-dev as processes: {error}")
            for pod in pods:
                print(f"  --- {pod.name}: {pod.log.read_text()[-2000:]}")
            return 1
        finally:
            for pod in pods:
                pod.process.kill()
                pod.process.wait()
    return 0


def play(documents, folder, pods):
    (models,) = [m for m in of_kind(documents, "ConfigMap") if "models.toml" in m["data"]]
    bundled = str(ROOT / "bundled")
    (folder / "models.toml").write_text(models["data"]["models.toml"].replace("/usr/share/atelier/bundled", bundled))
    made = {workload.name: workload for workload in workloads(documents)}
    coordinator = "127.0.0.2"

    def start(name, number):
        workload = made[name]
        pod = Pod(documents, workload, f"{name.split('/')[1]}-{number}", f"127.0.0.{2 + len(pods)}", folder, coordinator)
        pods.append(pod)
        return pod

    lead = start("StatefulSet/atelier-coordinator", 0)
    until("the coordinator starts up", lambda: lead.probe("startupProbe"))
    until("the coordinator is ready", lambda: lead.probe("readinessProbe"))
    workers = [start(name, n) for name, w in made.items() if w.is_worker for n in range(w.replicas)]
    until("every worker is ready", lambda: all(pod.probe("startupProbe") and pod.probe("readinessProbe") for pod in workers))
    draw(lead, folder, "first")
    assert all(pod.probe("livenessProbe") for pod in pods), "a liveness probe fails"

    # One more: it registers and is ready, and nobody was restarted.
    more = start("Deployment/atelier-denoiser", 4)
    until("one more worker is ready", lambda: more.probe("readinessProbe"))
    assert f"pod={more.name}" in atelier(lead, "workers"), "the new worker is not shown"
    # One less: a denoiser is told to stop, and the new one takes its rank.
    gone = next(pod for pod in workers if "denoiser" in pod.name)
    took = gone.stop()
    assert took is not None, "a worker did not end in its grace period"
    until("its rank is taken over", lambda: "/transformer/" in line_of(atelier(lead, "workers"), more.name))
    draw(lead, folder, "second")
    assert (folder / "first.png").read_bytes() == (folder / "second.png").read_bytes(), "the pictures differ"
    others = [pod for pod in pods if pod is not gone]
    assert all(pod.process.poll() is None for pod in others), "something else was restarted"
    print(f"cpu-dev as processes: {len(pods)} pods, probes answer, a worker joined, one left in {took:.1f} s, the picture is the same")


def line_of(text, name):
    return next((line for line in text.splitlines() if name in line), "")


def draw(lead, folder, name):
    atelier(lead, "generate", "red heart", "--seed", "0", "--timeout", str(PATIENCE), "--out", str(folder / f"{name}.png"))


def atelier(lead, *arguments):
    command = [ATELIER, *arguments, "--server", f"http://{lead.address}:7700"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, f"atelier {arguments[0]}: {done.stderr.strip()}"
    return done.stdout
