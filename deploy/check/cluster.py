"""Overlays cpu-dev, cpu-dev-tls and ha without Kubernetes: their very commands and variables as processes, each pod at an address of
its own.

Shows that the probes answer as the manifests expect, that a worker joins and leaves without a restart of anything, that SIGTERM
ends one within its grace period, that certificates as the manifests ask for fit each other and etcd's, that renewed ones are
taken up, and that a coordinator follows another one. The network, volumes and limits of pods are not played.
"""

import contextlib
import pathlib
import signal
import ssl
import subprocess
import tempfile
import time

import grpc

from . import authority, etcd
from .certificates import is_etcd, is_plain
from .commands import command, files_of
from .flags import ATELIER
from .forward import forwarded
from .probes import asked
from .render import ROOT
from .workloads import of_kind, workloads

# Longest wait until something is so; the machine may be busy.
PATIENCE = 120
SERVING = b"\x08\x01"
COORDINATOR = "127.0.0.2"


class Pod:
    """A process in place of a pod's container. Pods differ by address, not by port."""

    def __init__(self, documents, workload, name, address, folder, more_places):
        (self.container,) = workload.containers
        self.name, self.address, self.grace = name, address, workload.spec["terminationGracePeriodSeconds"]
        known = {"POD_NAME": name, "POD_NAMESPACE": "atelier", "POD_IP": address, "NODE_NAME": "node"}
        places = {
            r"0\.0\.0\.0": address,
            r"^/etc/atelier": str(folder),
            r"^/data": str(folder / "data"),
            r"//atelier-coordinator:": f"//{COORDINATOR}:",
            r"^s3://.*": f"file://{folder}/objects",
            **more_places,
            **{f"^{path}/": f"{folder}/secrets/{secret}/" for path, secret in files_of(workload).items()},
        }
        arguments, self.variables = command(documents, workload, known, places)
        # The name that the cluster's DNS would know.
        arguments = [f"--advertise={address}:7700" if a.startswith("--advertise=") else a for a in arguments]
        self.log = folder / f"{name}.log"
        with self.log.open("w") as log:
            environment = {**self.variables, "NO_COLOR": "1"}
            self.process = subprocess.Popen([ATELIER, *arguments], env=environment, stderr=log, stdout=log)

    def probe(self, kind):
        """What a kubelet would find."""
        probe = self.container[kind]
        port, service = asked(probe)
        if "exec" in probe:
            words = [word.replace("127.0.0.1", self.address) for word in probe["exec"]["command"][1:]]
            return self.says(*words)
        return self.answers(port, service)

    def says(self, *words):
        """Whether a command in the pod ends well."""
        return subprocess.run([ATELIER, *words], env=self.variables, capture_output=True, check=False).returncode == 0

    def answers(self, port, service=""):
        """Whether it says in plain text that it serves."""
        with grpc.insecure_channel(f"{self.address}:{port}") as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check")
            try:
                return check(b"\x0a" + bytes([len(service)]) + service.encode(), timeout=2) == SERVING
            except grpc.RpcError:
                return False

    def shown(self):
        """The certificate that its port of calls shows."""
        port = self.container["ports"][0]["containerPort"]
        return ssl.get_server_certificate((self.address, port)).strip()

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


def run(overlays):
    """Gives how many claims do not hold."""
    bundled = models_of(overlays["cpu-dev"])
    failed = sum(run_one(overlay, overlays[overlay], bundled) for overlay in ("cpu-dev", "cpu-dev-tls", "ha"))
    # Whoever has no cert-manager leaves its objects out.
    provided = [d for d in overlays["ha"] if d["apiVersion"] != "cert-manager.io/v1"]
    return failed + run_one("ha with deploy/secrets", provided, bundled)


def run_one(overlay, documents, models):
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        cluster = Cluster(documents, pathlib.Path(folder), stack)
        try:
            play = cluster.play_followed if cluster.has_etcd else cluster.play
            print(f"{overlay} as processes: {play(models)}")
        except (TimeoutError, AssertionError) as error:
            print(f"  {overlay} as processes: {error}")
            for log in sorted(pathlib.Path(folder).glob("*.log")):
                print(f"  --- {log.stem}: {log.read_text()[-2000:]}")
            return 1
        finally:
            for pod in cluster.pods:
                pod.process.kill()
                pod.process.wait()
    return 0


def models_of(documents):
    (models,) = [m for m in of_kind(documents, "ConfigMap") if "models.toml" in m["data"]]
    return models["data"]["models.toml"].replace("/usr/share/atelier/bundled", str(ROOT / "bundled"))


class Cluster:
    """An overlay's pods, and a client of theirs."""

    def __init__(self, documents, folder, stack):
        self.documents, self.folder, self.pods = documents, folder, []
        self.stack, self.places = stack, {}
        self.has_tls = not is_plain(documents)
        self.has_etcd = any(is_etcd(workload) for workload in workloads(documents))
        if of_kind(documents, "Certificate"):
            authority.issue(documents, folder / "secrets")
        elif self.has_tls:
            # Twice: the second time by the authorities that are there.
            authority.provided(folder / "secrets", folder / "authorities")
            authority.provided(folder / "secrets", folder / "authorities")

    def forward(self, pod):
        """An operator's way to a coordinator: by localhost, with the files of the Secret atelier-client-tls."""
        port = self.stack.enter_context(forwarded(pod.address, 7700))
        self.client = ["--server", f"http://localhost:{port}"]
        if self.has_tls:
            files = self.folder / "secrets" / "atelier-client-tls"
            own = ["--tls-ca", files / "ca.crt", "--tls-cert", files / "tls.crt", "--tls-key", files / "tls.key"]
            self.client = ["--server", f"https://localhost:{port}", *own]

    def start(self, name, number):
        workload = next(workload for workload in workloads(self.documents) if workload.name == name)
        pod_name, address = f"{name.split('/')[1]}-{number}", f"127.0.0.{2 + len(self.pods)}"
        pod = Pod(self.documents, workload, pod_name, address, self.folder, self.places)
        self.pods.append(pod)
        return pod

    def play_followed(self, models):
        """Two coordinators and etcd: the one that stands by leads when the other ends, and workers follow it."""
        (self.folder / "models.toml").write_text(models)
        ports = etcd.free_ports()
        self.places = etcd.endpoint(ports)
        with (self.folder / "etcd.log").open("w") as log:
            member = etcd.start(self.documents, self.folder, ports, log)
        self.stack.callback(member.wait)
        self.stack.callback(member.kill)
        lead = self.start("StatefulSet/atelier-coordinator", 0)
        leads = ["health", f"{lead.address}:7700", "--service=atelier.v1.JobService"]
        until("a coordinator leads", lambda: lead.says(*leads))
        other = self.start("StatefulSet/atelier-coordinator", 1)
        until("one that stands by is ready", lambda: other.probe("startupProbe") and other.probe("readinessProbe"))
        counts = {"encoder": 1, "denoiser": 4, "decoder": 1}
        workers = [self.start(f"Deployment/atelier-{role}", n) for role, count in counts.items() for n in range(count)]
        until("every worker is ready", lambda: all(pod.probe("readinessProbe") for pod in workers))
        self.forward(lead)
        first = self.draw("first")
        assert lead.stop() is not None, "a coordinator did not end in its grace period"
        leads[1] = f"{other.address}:7700"
        until("the other one leads", lambda: other.says(*leads))
        until("every worker follows it", lambda: all(pod.probe("readinessProbe") for pod in workers))
        self.forward(other)
        assert first == self.draw("second"), "the pictures differ"
        return f"{len(self.pods)} pods and etcd by TLS, the coordinator that stood by leads, the picture is the same"

    def play(self, models):
        (self.folder / "models.toml").write_text(models)
        lead = self.start("StatefulSet/atelier-coordinator", 0)
        until("the coordinator starts up", lambda: lead.probe("startupProbe"))
        until("the coordinator is ready", lambda: lead.probe("readinessProbe"))
        workers = [self.start(w.name, n) for w in workloads(self.documents) if w.is_worker for n in range(w.replicas)]
        until("every worker is ready", lambda: all(pod.probe("startupProbe") and pod.probe("readinessProbe") for pod in workers))
        self.forward(lead)
        first = self.draw("first")
        assert all(pod.probe("livenessProbe") for pod in self.pods), "a liveness probe fails"
        renewed = self.renew(lead, workers) if self.has_tls else ""

        # One more: it registers and is ready, and nobody was restarted.
        more = self.start("Deployment/atelier-denoiser", 4)
        until("one more worker is ready", lambda: more.probe("readinessProbe"))
        assert f"pod={more.name}" in self.atelier("workers"), "the new worker is not shown"
        # One less: a denoiser is told to stop, and the new one takes its rank.
        gone = next(pod for pod in workers if "denoiser" in pod.name)
        took = gone.stop()
        assert took is not None, "a worker did not end in its grace period"
        until("its rank is taken over", lambda: "/transformer/" in line_of(self.atelier("workers"), more.name))
        assert first == self.draw("second"), "the pictures differ"
        others = [pod for pod in self.pods if pod is not gone]
        assert all(pod.process.poll() is None for pod in others), "something else was restarted"
        return f"{len(self.pods)} pods, probes answer, {renewed}a worker joined, one left in {took:.1f} s, the picture is the same"

    def renew(self, lead, workers):
        """What cert-manager does a month before the end: new keys, by the same authority, while all run."""
        assert not lead.answers(7700) and not workers[0].answers(7701), "a port answers in plain text"
        for name in ("atelier-coordinator", "atelier-worker", "atelier-client"):
            authority.issue(self.documents, self.folder / "secrets", name)
        for pod in (lead, *workers):
            file = pathlib.Path(pod.variables["ATELIER_TLS_CERT"])
            until(f"{pod.name} shows its new certificate", lambda pod=pod, file=file: pod.shown() == file.read_text().strip())
        assert all(pod.probe("readinessProbe") for pod in (lead, *workers)), "a probe fails once certificates are renewed"
        return "certificates fit and were renewed, "

    def draw(self, name):
        """The picture's bytes."""
        picture = self.folder / f"{name}.png"
        self.atelier("generate", "red heart", "--seed", "0", "--timeout", str(PATIENCE), "--out", str(picture))
        return picture.read_bytes()

    def atelier(self, *arguments):
        done = subprocess.run([ATELIER, *arguments, *self.client], capture_output=True, text=True, timeout=PATIENCE, check=False)
        assert done.returncode == 0, f"atelier {arguments[0]}: {done.stderr.strip()}"
        return done.stdout


def line_of(text, name):
    return next((line for line in text.splitlines() if name in line), "")
