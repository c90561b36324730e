"""What a peer tells others of where it is: never loopback if there is anything else, the way to the internet first."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import SimpleNamespace

import psutil
import pytest

from tscale_net import own_addresses
from tscale_net.own_addresses import MOST_HOSTS, own_hosts


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A made-up machine: interface -> addresses, the outbound one, interfaces that are down."""

    def make(interfaces: dict[str, list[str]], outbound: str | None = None, down: tuple[str, ...] = ()) -> None:
        def entries(texts: list[str]) -> list[SimpleNamespace]:
            return [SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text) for text in texts]

        monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: entries(texts) for name, texts in interfaces.items()})
        monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name not in down) for name in interfaces})
        monkeypatch.setattr(own_addresses, "_outbound", lambda family: iter([outbound] if outbound else []))

    return make


def test_a_machine_without_a_way_out_tells_its_lan_address(machine: Callable[..., None]) -> None:
    machine({"lo": ["127.0.0.1", "::1"], "eth0": ["10.9.0.1", "fe80::1%eth0", "2001:db8::5"]})
    assert own_hosts("0.0.0.0") == ["10.9.0.1"]
    assert own_hosts("::") == ["2001:db8::5"]


def test_the_way_out_comes_first_and_once(machine: Callable[..., None]) -> None:
    machine({"eth0": ["10.9.0.1"], "wlan0": ["192.168.1.7"]}, outbound="192.168.1.7")
    assert own_hosts("0.0.0.0") == ["192.168.1.7", "10.9.0.1"]


def test_what_leads_nowhere_is_left_out(machine: Callable[..., None]) -> None:
    virtual = {"docker0": ["172.17.0.1"], "veth1": ["10.1.0.1"]}
    machine({**virtual, "eth1": ["10.2.0.1"], "eth0": ["169.254.3.4"], "lo": ["127.0.0.1"]}, down=("eth1",))
    assert own_hosts("0.0.0.0") == ["127.0.0.1"]
    assert own_hosts("::") == ["::1"]


def test_only_a_few_are_told(machine: Callable[..., None]) -> None:
    machine({f"eth{n}": [f"10.0.{n}.1"] for n in range(9)})
    assert len(own_hosts("0.0.0.0")) == MOST_HOSTS


def test_this_very_machine_gives_addresses() -> None:
    assert all(socket.inet_aton(host) for host in own_hosts("0.0.0.0"))
