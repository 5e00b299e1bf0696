"""Ways to break an overlay's objects, in one place each."""

from .workloads import named


class Objects:
    """The objects of an overlay, by Kind/name; names that kustomize made are found by their beginning."""

    def __init__(self, documents):
        self.documents = documents

    def __getitem__(self, name):
        (found,) = [d for d in self.documents if named(d) == name or named(d).startswith(name + "-") and d["kind"] == "ConfigMap"]
        return found

    def remove(self, name):
        self.documents.remove(self[name])

    def pod(self, name):
        return self[name]["spec"]["template"]["spec"]

    def container(self, name):
        return self.pod(name)["containers"][0]


ENCODER, DENOISER, COORDINATOR = "Deployment/atelier-encoder", "Deployment/atelier-denoiser", "StatefulSet/atelier-coordinator"


def of_container(name, change):
    return lambda objects: change(objects.container(name))


def of_pod(name, change):
    return lambda objects: change(objects.pod(name))


def rename(key, new):
    return lambda holder: holder.__setitem__(new, holder.pop(key))


def without(*path):
    def change(holder):
        for key in path[:-1]:
            holder = holder[key]
        del holder[path[-1]]

    return change


def put(value, *path):
    def change(holder):
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value

    return change


def at(name, change):
    return lambda objects: change(objects[name])


def argument(old, new):
    return lambda container: container.__setitem__("args", [a.replace(old, new) for a in container["args"]])


def models(old, new):
    return at("ConfigMap/models", lambda m: m["data"].__setitem__("models.toml", m["data"]["models.toml"].replace(old, new)))


def opened(objects):
    """Whoever may reach the coordinator may reach the ranks' port too."""
    rule = objects["NetworkPolicy/worker"]["spec"]["ingress"][0]
    rule["ports"].append({"protocol": "TCP", "port": 7702})
    objects["NetworkPolicy/coordinator"]["spec"]["egress"][0]["ports"].append({"protocol": "TCP", "port": 7702})


def boundless(objects):
    """Workers reach each other at every port."""
    spec = objects["NetworkPolicy/worker"]["spec"]
    for rule in (spec["ingress"][1], spec["egress"][1]):
        rule["ports"] = [{"protocol": "TCP"}]
