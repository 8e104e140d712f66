"""Networks of a drill's nodes: namespaces on one bridge, so that a node can be cut off.

See ip-netns(8). Needs root.
"""

import os
import secrets
import shutil
import subprocess
from dataclasses import dataclass, field

from llava_ray.errors import ResourceError

INTERFACE = "eth0"
"""Of every node, inside its namespace."""


@dataclass
class Network:
    """A bridge with one namespace per node; `remove` takes all of it away."""

    tag: str = field(default_factory=lambda: f"lr{secrets.token_hex(2)}")
    subnet: str = field(default_factory=lambda: f"10.213.{secrets.randbelow(256)}")
    names: list[str] = field(default_factory=list)

    @property
    def head_ip(self) -> str:
        """The bridge's own address, which this machine has."""
        return f"{self.subnet}.1"

    def create(self) -> None:
        """Make the bridge.

        Raises ResourceError with ip's own words.
        """
        _ip("link", "add", self.tag, "type", "bridge")
        _ip("addr", "add", f"{self.head_ip}/24", "dev", self.tag)
        _ip("link", "set", self.tag, "up")

    def add(self, name: str) -> str:
        """Make a node's namespace and plug it in; return its address."""
        self.names.append(name)
        space, address = self.space(name), f"{self.subnet}.{len(self.names) + 1}"
        _ip("netns", "add", space)
        inside = f"{self.tag}i{name}"
        _ip("link", "add", self._cable(name), "type", "veth", "peer", "name", inside)
        _ip("link", "set", inside, "netns", space, "name", INTERFACE)
        _ip("link", "set", self._cable(name), "master", self.tag, "up")
        for command in (
            ("addr", "add", f"{address}/24", "dev", INTERFACE),
            ("link", "set", INTERFACE, "up"),
            ("link", "set", "lo", "up"),
        ):
            _ip("-n", space, *command)
        return address

    def space(self, name: str) -> str:
        """Return the name of a node's namespace."""
        return f"{self.tag}-{name}"

    def cut(self, name: str) -> None:
        """Pull a node's cable."""
        _ip("link", "set", self._cable(name), "down")

    def heal(self, name: str) -> None:
        """Plug it in again."""
        _ip("link", "set", self._cable(name), "up")

    def remove(self) -> None:
        """Take away namespaces and bridge, whatever is left of them."""
        for name in self.names:
            _ip("netns", "del", self.space(name), check=False)
        _ip("link", "del", self.tag, check=False)

    def _cable(self, name: str) -> str:
        return f"{self.tag}o{name}"


def why_no_network() -> str | None:
    """Say why this machine cannot make namespaces, or None where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"no {tool} on this machine: install iproute2 and util-linux"
    trial = Network()
    try:
        trial.create()
        trial.add("x")
    except ResourceError as error:
        return str(error)
    finally:
        trial.remove()
    return None


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if check and done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ResourceError(f"'ip {' '.join(arguments)}' failed ({said}): namespaces need root")
