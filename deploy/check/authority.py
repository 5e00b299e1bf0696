"""What cert-manager makes of Certificates, by openssl, as a kubelet mounts it: so that a cluster of processes shows whether they fit."""

import base64
import os
import secrets
import subprocess

import yaml

from . import render
from .certificates import hours
from .flags import ATELIER
from .workloads import of_kind

WORDS = {
    "cert sign": "keyCertSign", "crl sign": "cRLSign", "digital signature": "digitalSignature",
    "server auth": "serverAuth", "client auth": "clientAuth",
}


def openssl(*arguments):
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"openssl {arguments[0]}: {done.stderr.strip()}"


def issue(documents, folder, renewed=None):
    """Fills folder/NAME for each Secret of a Certificate; with `renewed`, for that one anew."""
    certificates = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "Certificate")}
    issuers = {d["metadata"]["name"]: d["spec"] for d in of_kind(documents, "Issuer")}
    # Authorities first.
    for name, spec in sorted(certificates.items(), key=lambda entry: not entry[1].get("isCA")):
        if renewed is None or name == renewed:
            authority = issuers[spec["issuerRef"]["name"]].get("ca", {}).get("secretName")
            mount(folder / spec["secretName"], lambda new, spec=spec, by=authority: make(new, spec, by and folder / by))


def provided(folder, authorities):
    """As `issue`, by deploy/secrets."""
    environment = {**os.environ, "ATELIER": str(ATELIER), "KUBECTL": render.kubectl()}
    done = subprocess.run([render.DEPLOY / "secrets", authorities], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"deploy/secrets: {done.stderr.strip()}"
    for document in yaml.safe_load_all(done.stdout):
        files = {name: base64.b64decode(data) for name, data in document["data"].items()}
        mount(folder / document["metadata"]["name"], lambda new, files=files: [(new / n).write_bytes(f) for n, f in files.items()])


def mount(secret, fill):
    """A folder of links to what is there now, which is changed whole by turning one link."""
    version = f"..{secrets.token_hex(4)}"
    (secret / version).mkdir(parents=True)
    fill(secret / version)
    (secret / "..next").symlink_to(version)
    os.replace(secret / "..next", secret / "..data")
    for file in ("tls.crt", "tls.key", "ca.crt"):
        if not (secret / file).is_symlink():
            (secret / file).symlink_to(f"..data/{file}")


def make(new, spec, authority):
    """A key, a certificate with all that `spec` says, and the certificate of the authority that signed it."""
    key, request, certificate = new / "tls.key", new / "request", new / "tls.crt"
    openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", str(key))
    openssl("req", "-new", "-key", str(key), "-subj", f"/CN={spec['commonName']}", "-out", str(request))
    (new / "extensions").write_text("\n".join(extensions(spec)))
    signed_by = ("-CA", str(authority / "tls.crt"), "-CAkey", str(authority / "tls.key")) if authority else ("-signkey", str(key))
    days = ("-days", str(hours(spec["duration"]) // 24), "-set_serial", str(secrets.randbits(64)))
    openssl("x509", "-req", "-in", str(request), *signed_by, *days, "-extfile", str(new / "extensions"), "-out", str(certificate))
    (new / "ca.crt").write_bytes((authority / "tls.crt" if authority else certificate).read_bytes())


def extensions(spec):
    usages = [WORDS[usage] for usage in spec["usages"]]
    names = [f"DNS:{name}" for name in spec.get("dnsNames", [])] + [f"IP:{name}" for name in spec.get("ipAddresses", [])]
    names += [f"URI:{name}" for name in spec.get("uris", [])]
    extended = [usage for usage in usages if usage.endswith("Auth")]
    yield f"basicConstraints=critical,CA:{'TRUE' if spec.get('isCA') else 'FALSE'}"
    yield f"keyUsage=critical,{','.join(usage for usage in usages if usage not in extended)}"
    yield "subjectKeyIdentifier=hash"
    if extended:
        yield f"extendedKeyUsage={','.join(extended)}"
    if names:
        yield f"subjectAltName={','.join(names)}"
