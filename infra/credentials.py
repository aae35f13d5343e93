"""Secrets of the embedded services: made on first start, kept in one file of mode 0600."""

import datetime
import ipaddress
import json
import secrets
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from infra.files import write_private
from infra.stack import ServiceError

VALID_DAYS = 36500


@dataclass(frozen=True)
class Credentials:
    """Every secret; none of them is shown by repr."""

    s3_access_key: str
    s3_secret_key: str = field(repr=False)
    volume_write_key: str = field(repr=False)
    volume_read_key: str = field(repr=False)
    filer_write_key: str = field(repr=False)
    filer_read_key: str = field(repr=False)
    prefect_auth: str = field(repr=False)
    """User and password, as in ``eqm:password``, with which Prefect lets in."""
    grpc_key: str = field(repr=False)
    """Private key, PEM, of the TLS that SeaweedFS speaks with itself."""
    grpc_certificate: str = field(repr=False)


def read_credentials(root: Path) -> Credentials | None:
    """Secrets of this home; None before the first start. Raises ServiceError."""
    path = root / "credentials.json"
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ServiceError(f"{path} is not JSON ({error}): restore it from a copy") from error
    if path.stat().st_mode & 0o077:
        raise ServiceError(f"{path} can be read by other users: chmod 600 {path}")
    missing = {f.name for f in fields(Credentials)} ^ set(data)
    if missing:
        raise ServiceError(f"{path}: {sorted(missing)} missing or unknown: restore it from a copy")
    return Credentials(**data)


def make_credentials(root: Path) -> Credentials:
    """Secrets of this home, made if there are none yet. Call it under the lock of the home."""
    known = read_credentials(root)
    if known is not None:
        return known
    key, certificate = _self_signed()
    made = Credentials(
        s3_access_key=f"eqm{secrets.token_hex(8)}",
        s3_secret_key=secrets.token_urlsafe(30),
        volume_write_key=secrets.token_urlsafe(30),
        volume_read_key=secrets.token_urlsafe(30),
        filer_write_key=secrets.token_urlsafe(30),
        filer_read_key=secrets.token_urlsafe(30),
        prefect_auth=f"eqm:{secrets.token_urlsafe(18)}",
        grpc_key=key,
        grpc_certificate=certificate,
    )
    write_private(root / "credentials.json", json.dumps(asdict(made), indent=1).encode())
    return made


def environment_file() -> str:
    """Fresh passwords of an installation of servers, as ``NAME=value`` lines.

    compose.yaml reads it, and `kubectl create secret --from-env-file`. Values hold no character
    that a shell, a URL or a line of either would take for something else.
    """
    told = {
        "AWS_ACCESS_KEY_ID": f"eqm{secrets.token_hex(8)}",
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(24),
        "POSTGRES_PASSWORD": secrets.token_hex(24),
        "MLFLOW_DB_PASSWORD": secrets.token_hex(24),
        "PREFECT_DB_PASSWORD": secrets.token_hex(24),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
        "MLFLOW_TRACKING_USERNAME": "eqm",
        "MLFLOW_TRACKING_PASSWORD": secrets.token_hex(24),
        "PREFECT_API_AUTH_STRING": f"eqm:{secrets.token_hex(24)}",
    }
    return "".join(f"{name}={value}\n" for name, value in told.items())


def _self_signed() -> tuple[str, str]:
    """Key and certificate, PEM: its own authority, so only who holds the key is let in."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "eqm")])
    now = datetime.datetime.now(datetime.UTC)
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()
