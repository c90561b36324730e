"""Addresses as people and peers write them, in three forms, read into one value.

Enters: text such as `/ip4/203.0.113.5/tcp/7700/p2p/12D3KooW...`, `12D3KooW...@seed.example.net:7700` or `seed.example.net:7700`.
Leaves: `Address(host, port, peer_id)`, or Refused("bad-address") with one sentence.

Rule: names are libp2p's, the wire protocol is not, so no protocol of our own is put into the multiaddr. Only ip4, ip6, dns4, dns6, tcp and
p2p are accepted; zones, paths and relays are refused here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache

from tscale_net import limits
from tscale_net.errors import Refused
from tscale_net.identity import public_key_of
from tscale_net.ports import PeerId

_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*\.?")
_PORT = re.compile(r"[0-9]{1,5}")
_FORMS = "Use /ip4/ADDRESS/tcp/PORT/p2p/ID, ID@HOST:PORT or HOST:PORT."


@dataclass(frozen=True, slots=True)
class Address:
    """Where a peer listens and, if known, who it is."""

    host: str
    """IPv4, IPv6 (no brackets) or host name."""
    port: int
    """TCP port of the links; the hello door is the next one. 0 only in listen addresses."""
    peer_id: PeerId | None = None
    kind: str = ""
    """"ip4", "ip6", "dns4" or "dns6"; empty for a host name without a stated family."""

    @property
    def host_port(self) -> str:
        """`host:port`, with brackets around IPv6."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def multiaddr(self) -> str:
        """The libp2p form; a host name of unstated family becomes dns4."""
        text = f"/{self.kind or 'dns4'}/{self.host}/tcp/{self.port}"
        return f"{text}/p2p/{self.peer_id}" if self.peer_id else text

    def __str__(self) -> str:
        return f"{self.peer_id}@{self.host_port}" if self.peer_id else self.host_port


@lru_cache(limits.ADDRESSES_READ)
def parse(text: str) -> Address:
    """Read any of the three forms. Raises Refused("bad-address" or "bad-peer-id")."""
    text = text.strip()
    if not text or len(text) > limits.ADDRESS_CHARACTERS or not text.isascii() or not text.isprintable():
        raise _bad(text, "is empty, too long or holds strange characters")
    if text.startswith("/"):
        return _parse_multiaddr(text)
    peer_id: PeerId | None = None
    if "@" in text:
        peer_id, text = text.split("@", 1)
        public_key_of(peer_id)
    host, port = split_host_port(text)
    return Address(host, port, peer_id, _family(host))


def split_host_port(text: str, allow_port_zero: bool = False) -> tuple[str, int]:
    """Split `host:port` or `[ipv6]:port`. Port 0 ("any free one") is for listening only. Raises Refused("bad-address")."""
    host, colon, port_text = text.rpartition(":")
    if not colon:
        raise _bad(text, "has no port")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _family(host) != "ip6":
            raise _bad(text, "has something else than an IPv6 address in brackets")
    elif ":" in host:
        raise _bad(text, "has an IPv6 address without brackets")
    elif _family(host) == "" and (not _HOST_NAME.fullmatch(host) or re.fullmatch(r"[0-9.]+", host)):
        raise _bad(text, "has no valid host")
    if not _PORT.fullmatch(port_text) or not (0 if allow_port_zero else 1) <= int(port_text) <= 65535:
        raise _bad(text, "has no port between 1 and 65535")
    return host, int(port_text)


def is_unspecified(host: str) -> bool:
    """Whether `host` means "all addresses of this machine" (0.0.0.0 or ::)."""
    return bool(_family(host)) and ipaddress.ip_address(host).is_unspecified


def is_loopback(host: str) -> bool:
    """Whether `host` is an IP address of this machine's loopback."""
    return bool(_family(host)) and ipaddress.ip_address(host).is_loopback


def _family(host: str) -> str:
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv6Address):
        return "" if parsed.scope_id else "ip6"
    return "ip4"


def _parse_multiaddr(text: str) -> Address:
    from multiaddr import Multiaddr  # 33 ms, so only when one is really read
    from multiaddr.exceptions import Error as MultiaddrError

    try:
        parsed = Multiaddr(text)
        steps = [(protocol.name, value) for protocol, value in parsed.items()]
    except (MultiaddrError, ValueError, LookupError, TypeError) as error:
        raise _bad(text, "is not a valid multiaddr") from error
    names = tuple(name for name, _ in steps)
    if len(names) not in (2, 3) or names[0] not in ("ip4", "ip6", "dns4", "dns6") or names[1:] not in (("tcp",), ("tcp", "p2p")):
        raise _bad(text, f"is {'/'.join(names)[:60]}, which is not spoken here")
    host, port_text = str(steps[0][1]), str(steps[1][1])
    if names[0].startswith("dns"):
        if not _HOST_NAME.fullmatch(host) or _family(host):
            raise _bad(text, "has no valid host name")
    elif _family(host) != names[0]:
        raise _bad(text, "has an IP address of another family")
    if not _PORT.fullmatch(port_text) or not 1 <= int(port_text) <= 65535:
        raise _bad(text, "has no port between 1 and 65535")
    peer_id = str(steps[2][1]) if len(steps) == 3 else None
    if peer_id is not None:
        public_key_of(peer_id)
    return Address(host, int(port_text), peer_id, names[0])


def _bad(text: str, why: str) -> Refused:
    return Refused("bad-address", f"The address {text[:100]!r} {why}. {_FORMS}")
