"""Certificates and keys for trying a secured deployment out: a certificate authority, a SuperLink, and its nodes.

They are for development. In production the certificates come from one's own authority, and every site makes its own
key pair and hands out the public half only.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CURVE = ec.SECP384R1()


def write_credentials(folder: Path, *, clients: int, hosts: Sequence[str], days: int) -> dict[str, str]:
    """Write all files to `folder` and return what each is for, by name.

    `ca.crt` and `ca.key` are the authority, `server.pem` and `server.key` the SuperLink's, valid for `hosts` (names and
    addresses); `client_N` and `client_N.pub` are the key pair of a node. Raises ValueError for a folder that is not
    empty, and for numbers that make no sense.
    """
    if clients < 0 or days < 1 or not hosts:
        raise ValueError(
            f"clients={clients} must not be negative, days={days} at least 1, hosts={list(hosts)} not empty"
        )
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; name a new folder, so that no key is overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    authority_key, server_key = ec.generate_private_key(CURVE), ec.generate_private_key(CURVE)
    authority = _authority(authority_key, days)
    server = _server(authority, authority_key, server_key, hosts, days)
    _write(folder / "ca.crt", authority.public_bytes(serialization.Encoding.PEM))
    _write(folder / "ca.key", _pem(authority_key))
    _write(folder / "server.pem", server.public_bytes(serialization.Encoding.PEM))
    _write(folder / "server.key", _pem(server_key))
    for client in range(clients):
        _write_node_key(folder / f"client_{client}")
    return {
        "ca.crt": "give it to everyone who connects: --root-certificates",
        "ca.key": "makes further certificates; keep it away from all machines that run",
        "server.pem, server.key": "the SuperLink's: --ssl-certfile, --ssl-keyfile",
        "client_N": "the private key of node N, for its machine only: --auth-supernode-private-key",
        "client_N.pub": "its public key, to be registered: flwr supernode register client_N.pub",
    }


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))  # clocks differ
        .not_valid_after(now + timedelta(days=days))
    )


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name, public = _name("fedraclora development authority"), key.public_key()
    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, crl_sign=True, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    return (
        _builder(name, name, public, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    days: int,
) -> x509.Certificate:
    public = key.public_key()
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(_name(hosts[0]), authority.subject, public, days)
        .add_extension(x509.SubjectAlternativeName([_alternative(host) for host in hosts]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_node_key(path: Path) -> None:
    """Write a key pair as `ssh-keygen -t ecdsa -b 384` does, which is what Flower reads."""
    key = ec.generate_private_key(CURVE)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(path, private)
    _write(path.with_suffix(".pub"), public + b"\n")


def _write(path: Path, content: bytes) -> None:
    is_public = path.suffix in (".crt", ".pem", ".pub")
    path.touch(mode=0o644 if is_public else 0o600)
    path.write_bytes(content)
