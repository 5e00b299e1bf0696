"""Makes the schemas of this folder from published CustomResourceDefinitions: reduce.py CRD.yaml...

Kept of each served version: types, required fields, enums, bounds and patterns. Left out: descriptions, defaults, and rules
in CEL, which nothing here evaluates. Made strict: a field that a schema does not name is refused, as an API server refuses
it with --validate=strict.
"""

import gzip
import json
import pathlib
import sys

import yaml

KEPT = (
    "type", "enum", "required", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "minProperties", "maxProperties", "nullable",
)


def reduced(schema):
    """`schema` without what is not checked, and strict."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    out = {key: schema[key] for key in KEPT if key in schema}
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    for key in ("allOf", "anyOf", "oneOf"):
        if key in schema:
            # Parts of a whole that is strict already: what they name is said there.
            out[key] = [{k: v for k, v in part.items() if k in KEPT} for part in schema[key]]
    if "items" in schema:
        out["items"] = reduced(schema["items"])
    if "properties" in schema:
        out["properties"] = {name: reduced(part) for name, part in schema["properties"].items()}
    more = schema.get("additionalProperties")
    if isinstance(more, dict):
        out["additionalProperties"] = reduced(more)
    elif "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def main():
    here = pathlib.Path(__file__).parent
    for path in sys.argv[1:]:
        crd = yaml.safe_load(pathlib.Path(path).read_text())
        group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
        for version in crd["spec"]["versions"]:
            schema = reduced(version["schema"]["openAPIV3Schema"])
            for meta in ("apiVersion", "kind"):
                schema["properties"][meta] = {"type": "string"}
            # An API server knows ObjectMeta better than a CRD says.
            schema["properties"]["metadata"] = {"type": "object", "required": ["name"]}
            target = here / f"{group}-{version['name']}-{kind.lower()}.json.gz"
            text = json.dumps(schema, separators=(",", ":"), sort_keys=True).encode()
            target.write_bytes(gzip.compress(text, 9, mtime=0))
            print(f"{target.name}: {len(text)} bytes, {target.stat().st_size} packed")


if __name__ == "__main__":
    main()
