"""Certificates of a private server and its client, signed by an authority of their own."""

import datetime
import ipaddress
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from entropy_gpt.conversion.early_checks import expanded
from entropy_gpt.conversion.errors import UserError
from entropy_gpt.training.storage import check_folder

from .options import check_positive, with_argument_names


SERVER, CLIENT, AUTHORITY = "server", "client", "ca"
MOST_DAYS = 36_500
# A clock that is a little behind would take a new certificate for one that is not valid yet.
CLOCK = datetime.timedelta(hours=1)
HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
PUBLIC, SECRET = 0o644, 0o600


@dataclass(frozen=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@with_argument_names
def make_certificates(
    names: Sequence[str], output: str | Path, *, clients: Sequence[str] = (CLIENT,), days: int = 365
) -> list[Path]:
    """
    Makes an authority, a certificate of the server and one of each client. Together they are what both sides need.

    Args:
        names (`Sequence[str]`): Names and addresses by which clients reach the server.
        output (`str` or `Path`): Folder for `ca.pem`, `ca.key`, `server.pem`, `server.key`, `client.pem` ...
        clients (`Sequence[str]`): A name of each client. The server counts the requests of each by itself.
        days (`int`): For which they are valid.

    Returns:
        `list[Path]`: The files. Only their owner can read the keys.

    Raises:
        `UserError`: If a name can't be used, or one of the files is there already; then none is written.

    Example:

    ```python
    from entropy_gpt.workflows.certificates import make_certificates

    make_certificates(["models.example.org", "192.0.2.7"], "certificates", clients=["ada", "grace"])
    ```
    """
    check_positive(days=days)
    if days > MOST_DAYS:
        raise UserError(f"--days {days} is too many: {MOST_DAYS:,} is the most.")
    hosts = [_read_host(name) for name in names]
    _check_clients(clients)
    if not hosts:
        raise UserError("give the name by which clients reach the server: --name example.org.")
    folder = Path(expanded(output))
    check_folder(folder)
    until = datetime.timedelta(days=days)
    authority = _issue("entropy-gpt private authority", None, until)
    usual = x509.SubjectAlternativeName
    pairs = {AUTHORITY: authority}
    pairs[SERVER] = _issue(names[0], authority, until, usual(hosts), ExtendedKeyUsageOID.SERVER_AUTH)
    for client in clients:
        pairs[client] = _issue(
            client, authority, until, usual([x509.DNSName(client)]), ExtendedKeyUsageOID.CLIENT_AUTH
        )
    contents = {}
    for name, pair in pairs.items():
        contents[folder / f"{name}.pem"] = (pair.certificate.public_bytes(serialization.Encoding.PEM), PUBLIC)
        contents[folder / f"{name}.key"] = (_write_key(pair.key), SECRET)
    if there := [path for path in contents if path.exists() or path.is_symlink()]:
        raise UserError(f"{there[0]} is there already, and is not overwritten: give another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    _write(contents)
    return list(contents)


def _write(contents: dict[Path, tuple[bytes, int]]):
    """All files, or none."""
    written = []
    try:
        for path, (content, mode) in contents.items():
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
            written.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _read_host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    if not HOST.fullmatch(name) or len(name) > 253 or name.rpartition(".")[2].isdigit():
        raise UserError(f"--name {name} is neither a host's name nor an address: give example.org or 192.0.2.7.")
    return x509.DNSName(name)


def _check_clients(clients: Sequence[str]):
    for client in clients:
        if not HOST.fullmatch(client) or client in (SERVER, AUTHORITY):
            raise UserError(
                f"--client {client} can't be the name of a client: give letters, digits and hyphens, but not "
                f"{SERVER} or {AUTHORITY}."
            )
    if len(set(clients)) < len(clients):
        raise UserError("two clients have the same name: give each its own --client.")


def _issue(
    name: str,
    authority: Pair | None,
    valid: datetime.timedelta,
    identities: Sequence[x509.GeneralName] = (),
    purpose: x509.ObjectIdentifier | None = None,
) -> Pair:
    """A new key with its certificate, signed by the authority, or by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])])
    signer = authority or Pair(None, key)
    issuer = authority.certificate.subject if authority else subject
    now = datetime.datetime.now(datetime.UTC)
    is_authority = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK)
        .not_valid_after(now + valid)
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(_usage(is_authority), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.key.public_key()), critical=False)
    )
    if identities:
        builder = builder.add_extension(x509.SubjectAlternativeName(identities), critical=False)
    if purpose is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    return Pair(builder.sign(signer.key, hashes.SHA256()), key)


def _usage(is_authority: bool) -> x509.KeyUsage:
    others = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    return x509.KeyUsage(
        digital_signature=not is_authority, key_cert_sign=is_authority, crl_sign=is_authority, **others
    )


def _write_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
