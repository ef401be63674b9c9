"""Keys and certificates of a deployment: one authority, one server, one certificate a hospital."""

import datetime
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

VALID_DAYS = 825


def new_key() -> ec.EllipticCurvePrivateKey:
    """Return a key on the curve that Flower's node authentication uses."""
    return ec.generate_private_key(ec.SECP384R1())


@dataclass(frozen=True)
class Authority:
    """The deployment's own certificate authority; its key stays with the coordinator."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        """Its certificate: public, every handshake shows it."""
        return _pem(self.certificate)

    def server(self, key: ec.EllipticCurvePrivateKey, names: Iterable[str]) -> str:
        """Return a server's certificate (PEM) for names and addresses."""
        wanted = sorted(set(names))
        return _pem(
            self._leaf(key, "FedRx SuperLink", ExtendedKeyUsageOID.SERVER_AUTH)
            .add_extension(
                x509.SubjectAlternativeName([_general_name(one) for one in wanted]), critical=False
            )
            .sign(self.key, hashes.SHA384())
        )

    def client(self, key: ec.EllipticCurvePrivateKey, name: str) -> str:
        """Return a hospital's certificate (PEM): it can serve nobody, and names the hospital."""
        leaf = self._leaf(key, name, ExtendedKeyUsageOID.CLIENT_AUTH)
        return _pem(leaf.sign(self.key, hashes.SHA384()))

    def _leaf(
        self, key: ec.EllipticCurvePrivateKey, name: str, usage: x509.ObjectIdentifier
    ) -> x509.CertificateBuilder:
        return (
            _certificate(_named(name), key.public_key(), self.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )


def new_authority() -> Authority:
    """Return a fresh authority."""
    key, name = new_key(), _named("FedRx deployment authority")
    certificate = (
        _certificate(name, key.public_key(), name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    return Authority(key, certificate)


def private_pem(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a key as nginx and Flower's SuperLink read it."""
    return _private(key, serialization.PrivateFormat.PKCS8)


def private_openssh(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a key as Flower's SuperNode reads it."""
    return _private(key, serialization.PrivateFormat.OpenSSH)


def public_openssh(key: ec.EllipticCurvePrivateKey) -> str:
    """Return a public key as ``flwr supernode register`` reads it."""
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_key().public_bytes(*form).decode() + "\n"


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> str:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, plain).decode()


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _certificate(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
    )


def _general_name(name: str) -> x509.GeneralName:
    if re.fullmatch(r"[\d.]+|[\da-fA-F:]*:[\da-fA-F:]*", name):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)
