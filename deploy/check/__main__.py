"""deploy/validate: see there."""

import sys
import time

from . import certificates, commands, compose, flags, images, mutations, network, pods, references, render, schemas

PARTS = (references, pods, certificates, network, flags, commands)
# Overlays without TLS: for a laptop. Every other one has it.
PLAIN = {"cpu-dev"}


def problems(overlay, documents, versions=schemas.VERSIONS):
    """Everything that is wrong with an overlay's objects. The schemas first: the rest relies on their shapes."""
    found = list(schemas.problems(documents, versions))
    if not found and certificates.is_plain(documents) and overlay not in PLAIN:
        found = [f"{overlay} is without TLS"]
    return found or [problem for part in PARTS for problem in part.problems(documents)]


def main():
    arguments = sys.argv[1:]
    unknown = set(arguments) - {"--self-test", "--run"}
    if unknown:
        raise SystemExit(f"no such argument: {' '.join(sorted(unknown))}")
    began = time.monotonic()
    overlays = render.overlays()
    failed = 0
    for name, documents in overlays.items():
        found = problems(name, documents)
        failed += len(found)
        print(f"{name}: {len(documents)} objects, {len(found)} problems")
        for problem in found:
            print(f"  {problem}")
    others = [*images.problems(), *compose.problems(), *flags.sources()]
    failed += len(others)
    print(f"images, compose, models.toml: {len(others)} problems")
    for problem in others:
        print(f"  {problem}")
    if "--self-test" in arguments and not failed:
        failed += mutations.run(overlays, problems)
    if "--run" in arguments and not failed:
        from . import cluster

        failed += cluster.run(overlays) + compose.run()
    print(f"{len(overlays)} overlays, Kubernetes {schemas.VERSIONS[0]} to {schemas.VERSIONS[-1]}: "
          f"{failed} problems, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


sys.exit(main())
