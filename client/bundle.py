"""A hospital runs its own installed code, and nothing that a server sends.

Flower sends every app as a bundle (a zip of sources), and its own executor would install and import
it. Here a bundle is only read: if its sources are not those of this installation, byte for byte,
its message is refused.
"""

import io
import zipfile

from client.policy import Policy
from common.errors import RunFailed
from common.provenance import PACKAGES, source_digest, sources_digest

MOST_BYTES = 64 * 2**20
"""Of all sources in a bundle, unpacked."""


class ForeignCode(RunFailed):
    """A bundle or an installation that this hospital has not agreed to; holds digests alone."""


def bundle_digest(content: bytes) -> str:
    """Return the source digest of a bundle, by reading it; nothing is written or imported.

    Raises:
        ForeignCode: if it is no bundle, holds a name twice, or is too large.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            entries = [
                entry
                for entry in bundle.infolist()
                if entry.filename.endswith(".py") and entry.filename.split("/")[0] in PACKAGES
            ]
            names = {entry.filename for entry in entries}
            if len(names) < len(entries) or sum(one.file_size for one in entries) > MOST_BYTES:
                raise ForeignCode("the bundle is not one of FedRx: nothing of it was run")
            return sources_digest((entry.filename, bundle.read(entry)) for entry in entries)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError) as error:
        if isinstance(error, ForeignCode):
            raise
        raise ForeignCode("the bundle cannot be read: nothing of it was run") from None


def check_bundle(content: bytes) -> str:
    """Hold a bundle to this installation.

    Returns:
        The digest of both.

    Raises:
        ForeignCode: if its sources differ.
    """
    found, own = bundle_digest(content), source_digest()
    if found != own:
        raise ForeignCode(
            f"the bundle's source digest is {found}, this hospital's installation has {own}: "
            "nothing of the bundle was run; fix: give both sides the same FedRx version"
        )
    return found


def check_installation(policy: Policy) -> str:
    """Hold this installation to the hospital's policy.

    Returns:
        Its source digest.

    Raises:
        ForeignCode: if the policy names other digests.
    """
    own = source_digest()
    if policy.allowed_digests and own not in policy.allowed_digests:
        raise ForeignCode(
            f"this installation of FedRx has source digest {own}, which allowed-digests does not "
            "name; fix: install the version that was agreed to, or agree to this one"
        )
    return own
