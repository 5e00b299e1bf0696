"""Objects against the published schemas: Kubernetes' own by kubernetes-validate, custom ones from deploy/schemas."""

import functools
import gzip
import json

import jsonschema
import kubernetes_validate
from kubernetes_validate import utils

from .render import DEPLOY
from .workloads import named, workloads

VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")

# It reads its files anew for every object.
utils.schema_contents = functools.lru_cache(maxsize=None)(utils.schema_contents)

# Objects are the same in most overlays: text and version -> problem.
_seen = {}


def problems(documents, versions=VERSIONS):
    for document in documents:
        custom = custom_schema(document)
        if custom is not None:
            for error in custom.iter_errors(document):
                yield f"{named(document)}: {path(error)}: {error.message[:300]}"
            continue
        yield from kubernetes(document, named(document), versions)
    # A custom resource's pods, by every version's own words.
    for workload in workloads(documents):
        if workload.kind not in ("Deployment", "StatefulSet"):
            name = f"{workload.name}'s pods"
            template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": workload.template}
            yield from kubernetes(template, name, versions)


def kubernetes(document, name, versions):
    text = json.dumps(document, sort_keys=True)
    for version in versions:
        if (text, version) not in _seen:
            _seen[text, version] = kubernetes_problem(document, version)
        if _seen[text, version]:
            yield f"{name}: Kubernetes {version}: {_seen[text, version]}"


def kubernetes_problem(document, version):
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{path(error)}: {error.message[:300]}"
    except kubernetes_validate.SchemaNotFoundError:
        return f"no schema for {document['apiVersion']} {document['kind']}"
    return None


def custom_schema(document):
    group, _, version = document["apiVersion"].partition("/")
    name = f"{group}-{version}-{document['kind'].lower()}.json"
    files = [DEPLOY / "schemas" / name, DEPLOY / "schemas" / f"{name}.gz"]
    return next((load(file) for file in files if file.is_file()), None)


@functools.lru_cache(maxsize=None)
def load(file):
    text = file.read_bytes()
    return jsonschema.Draft202012Validator(json.loads(gzip.decompress(text) if file.suffix == ".gz" else text))


def path(error):
    return ".".join(map(str, error.absolute_path)) or "(root)"
