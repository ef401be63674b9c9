"""What a deployed hospital is: its name, its tables, and where its SuperLink is (``site.toml``)."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from client.policy import Typed, read_model
from common.wire.handshake import NAME_PATTERN

SITE = "site.toml"
NAME = "hospital"
"""Key of the node configuration: a deployed hospital's name."""
KEYS = frozenset({NAME, "data", "folder", "backbone", "worker"})
"""All keys that a deployed hospital's node configuration may have."""
SOCKET = "worker.sock"
Port = Annotated[int, Field(ge=1, le=65535)]


class Site(Typed):
    """One hospital's own settings; ``fedrx deploy`` writes them."""

    hospital: str = Field(pattern=f"^{NAME_PATTERN.pattern}$")
    """Public name."""
    data: str = Field(min_length=1)
    """Folder of the hospital's tables."""
    backbone: str = ""
    """Folder of the backbone on this machine; empty: what the run names."""
    node_port: Port
    """Loopback port of the SuperNode's Runtime API."""
    tunnel_port: Port
    """Loopback port that nginx forwards to the SuperLink, with the hospital's certificate."""

    def node_config(self, folder: Path) -> dict[str, str]:
        """Return Flower's node configuration (see ``client.node.local_config``)."""
        values = {NAME: self.hospital, "data": self.data, "folder": str(folder)}
        return values | ({"backbone": self.backbone} if self.backbone else {})


def read_site(folder: Path) -> Site:
    """Read a hospital's ``site.toml``.

    Raises:
        UserError: if there is none, or it says something that is not allowed.
    """
    missing = "name the hospital's folder that `fedrx deploy` wrote"
    return read_model(folder / SITE, Site, missing=missing)
