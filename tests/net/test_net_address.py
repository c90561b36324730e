"""Addresses in their three forms, and the book of ids met at first contact."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from net_kit import identity

from tscale_net.address import Address, is_loopback, is_unspecified, parse, split_host_port
from tscale_net.address_book import AddressBook
from tscale_net.errors import Refused

ID = identity(1).peer_id
OTHER = identity(2).peer_id


@pytest.mark.parametrize(
    ("text", "address", "multiaddr"),
    [
        (f"/ip4/203.0.113.5/tcp/7700/p2p/{ID}", Address("203.0.113.5", 7700, ID, "ip4"), f"/ip4/203.0.113.5/tcp/7700/p2p/{ID}"),
        ("/ip4/203.0.113.5/tcp/7700", Address("203.0.113.5", 7700, None, "ip4"), "/ip4/203.0.113.5/tcp/7700"),
        (f"/ip6/2001:db8::1/tcp/1/p2p/{ID}", Address("2001:db8::1", 1, ID, "ip6"), f"/ip6/2001:db8::1/tcp/1/p2p/{ID}"),
        (f"/dns4/seed.example.net/tcp/65535/p2p/{ID}", Address("seed.example.net", 65535, ID, "dns4"), None),
        (f"/dns6/seed.example.net/tcp/7700/p2p/{ID}", Address("seed.example.net", 7700, ID, "dns6"), None),
        (f"{ID}@seed.example.net:7700", Address("seed.example.net", 7700, ID, ""), f"/dns4/seed.example.net/tcp/7700/p2p/{ID}"),
        (f"{ID}@[::1]:7700", Address("::1", 7700, ID, "ip6"), f"/ip6/::1/tcp/7700/p2p/{ID}"),
        ("  localhost:7700 ", Address("localhost", 7700), "/dns4/localhost/tcp/7700"),
        ("10.0.0.1:7700", Address("10.0.0.1", 7700, None, "ip4"), "/ip4/10.0.0.1/tcp/7700"),
    ],
)
def test_forms(text: str, address: Address, multiaddr: str | None) -> None:
    assert parse(text) == address
    assert parse(address.multiaddr).host_port == address.host_port
    if multiaddr is not None:
        assert address.multiaddr == multiaddr


@pytest.mark.parametrize(
    "text",
    [
        "", "seed", "seed:", ":7700", "seed:0", "seed:65536", "seed:77x", "seed:-1", "::1:7700", "[seed]:7700", "[fe80::1%eth0]:7700",
        "1.2.3:7700", "999.1.1.1:7700", "a b:7700", "-x:7700", "x..y:7700", "sé:7700", "a" * 300 + ":1",
        f"{ID[:-1]}@host:1", "@host:1", f"{ID}@", f"{ID}@{ID}@h:1",
        "/", "/ip4", "/ip4/1.2.3.4", "/ip4/1.2.3.4/tcp/0", "/ip4/1.2.3/tcp/7700", "/ip4/1.2.3.4/udp/7700", "/ip4/1.2.3.4/tcp/7700/p2p/abc",
        f"/p2p/{ID}", "/ip6zone/eth0/ip6/fe80::1/tcp/7700", "/ip4/1.2.3.4/tcp/7700/http", "/unix/tmp/x", "/ip4/1.2.3.4/tcp/7700\nx",
        "/dns4//tcp/1",
        f"/ip4/1.2.3.4/tcp/1/p2p/{ID}/p2p-circuit/p2p/{OTHER}",
    ],
)  # fmt: skip
def test_other_text_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(text)
    assert caught.value.code in ("bad-address", "bad-peer-id")
    assert "\n" not in str(caught.value)


@given(st.text(max_size=80) | st.from_regex(r"/(ip4|ip6|dns4|tcp|p2p)/.{0,20}/(tcp|udp)/[0-9]{0,6}(/p2p/.{0,10})?", fullmatch=True))
def test_garbage_never_crashes(text: str) -> None:
    try:
        address = parse(text)
    except Refused:
        return
    assert parse(address.multiaddr).port == address.port


def test_listen_addresses() -> None:
    assert split_host_port("0.0.0.0:0", allow_port_zero=True) == ("0.0.0.0", 0)
    assert is_unspecified("::") and is_unspecified("0.0.0.0") and not is_unspecified("seed")
    assert is_loopback("127.0.0.2") and is_loopback("::1") and not is_loopback("10.0.0.1")


def test_book_pins_and_survives(tmp_path: Path) -> None:
    path = tmp_path / "home" / "known_peers"
    book = AddressBook(path)
    first = book.pin("Seed.example.net:7700", ID, 1_750_000_000.9)
    assert first is not None and ID in str(first) and str(path) in str(first)
    assert book.pin("seed.example.net:7700", ID, 1.0) is None
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == f"seed.example.net:7700 {ID} 1750000000\n"
    again = AddressBook(path)
    assert again.pinned("seed.example.net:7700") == ID
    with pytest.raises(Refused) as caught:
        again.check("seed.example.net:7700", OTHER)
    assert caught.value.code == "changed-id"
    for part in (ID, OTHER, str(path), "seed.example.net:7700"):
        assert part in str(caught.value)


@pytest.mark.parametrize("line", ["seed:7700", f"seed:7700 {ID}", f"seed {ID} 1", "seed:7700 me 1", f"seed:7700 {ID} soon", "\xff\xfe x y"])
def test_damaged_book_names_file_and_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "known_peers"
    path.write_text(f"# a comment\n\n{line}\n", encoding="latin-1")
    with pytest.raises(Refused, match="line 3"):
        AddressBook(path)


def test_book_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    book = AddressBook()
    book.path = tmp_path / "file" / "known_peers"
    with pytest.raises(Refused, match="cannot be written"):
        book.pin("seed:7700", ID, 1.0)
