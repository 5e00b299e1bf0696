"""Dockerfiles, read as text: no Docker engine is needed, so nothing is built."""

import re
import tomllib

from .render import DEPLOY, ROOT

USER = "65532:65532"
# Words in ARG or ENV that would leave a secret in an image.
SECRET = re.compile(r"(?i)(passw|secret|token|api_?key|credential)")


def problems():
    for file in sorted(DEPLOY.glob("Dockerfile.*")):
        for problem in of_dockerfile(file.read_text()):
            yield f"{file.name}: {problem}"


def instructions(text):
    """(word, rest) of each instruction, continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in lines.replace("\\\n", " ").splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            yield word.upper(), " ".join(rest.split())


def members():
    return tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["members"]


def of_dockerfile(text):
    known = {"FROM", "ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}
    stages, last = [], []
    for word, rest in instructions(text):
        if word not in known:
            yield f"{word} is not used here"
        if word == "FROM":
            image, _, name = rest.partition(" AS ")
            if image not in stages and (":" not in image or image.endswith(":latest")):
                yield f"image {image!r} has no fixed tag"
            stages.append(name)
            last = []
        last.append((word, rest))
        if word == "COPY":
            yield from of_copy(rest, stages)
        if word in ("ARG", "ENV") and SECRET.search(rest):
            yield f"{word} {rest}: an image keeps what it is built with"
    users = [rest for word, rest in last if word == "USER"]
    if not users or users[-1] != USER:
        yield f"the last stage does not end as user {USER}"
    copied = {path for word, rest in instructions(text) if word == "COPY" and "--from" not in rest for path in rest.split()[:-1]}
    for member in members():
        if not any(member == path or member.startswith(f"{path}/") for path in copied):
            yield f"{member} is a member of the workspace and is not copied: cargo could not build"
    if len(stages) < 2:
        yield "has one stage: what builds would be shipped"
    if any(word == "RUN" and "compile" in rest for word, rest in last):
        yield "the last stage compiles"
    entry = [rest for word, rest in last if word == "ENTRYPOINT"]
    if entry != ['["/usr/local/bin/atelier"]']:
        yield "ENTRYPOINT is not the program, as a list"


def of_copy(rest, stages):
    words = rest.split()
    source = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), None)
    if source is not None:
        if source not in stages:
            yield f"COPY --from={source}: there is no such stage"
        return
    for path in [word for word in words if not word.startswith("--")][:-1]:
        if not (ROOT / path).exists():
            yield f"COPY {path}: is not in the repository"
