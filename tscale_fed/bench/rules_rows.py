"""Rows of the rules bench in words: `avg topk-64 H=5 lr=.02,.04 decay`.

Enters: text. Leaves: `Row` values, one per learning rate. The first word says who meets how:

    one              a peer alone
    sync             synchronous: the gradient of all peers' batches in every step
    sum [CODEC]      the swarm's sum rule: c = s * share, own leak c, momentum times the share
    avg [CODEC]      its averaging rule: own leak 1, momentum kept
    owners sum|avg [CODEC/CODEC]
                     the same with owners of chunks: they add contributions (first codec) up and publish the sum (second codec), both with
                     error feedback; a contribution is in the basepoint two meetings later
    central [CODEC]  the original's rule: packs before it applies, s = 0.5, momentum times the share (default codec fp16, H=20)
    diloco           plain mean of exact displacements, no lag, outer Nesterov 0.7/0.9 (DiLoCo)
    noloco           pairs of peers, outer 0.7/0.3 (NoLoCo)

Codecs: rules_codecs.py (default sign). Further words:
    H=5            own steps between two publications                lr=.02,.04    a row for each
    decay[=.3]     the rate falls to 0 over this last part           s=1           share_scale
    leak=L         own leak as a part of q (sum: the coefficient)    keep=K        momentum factor at a publication, a number or "share"
    count=global   momentum horizon follows the swarm's steps        outer=.7/.5   outer Nesterov: rate / momentum
    lag=1          meetings until a packet is applied (0: at once)   speeds=1:4:10 peers in turn are so many times slower than the fastest
    data=own       peer k draws from its own part of the text        late=2:4      two peers' packets need 4 meetings more
    stale=inverse  late packets with a coefficient / (1 + lag)       credit=no     owners: own contributions leave W until published
    x=8            so many times the steps (one: to compare speeds)  drain=4       meetings after the last step, to publish what is left
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tscale_net.errors import Refused

Kind = Literal["one", "sync", "sum", "avg", "central", "diloco", "noloco"]
KINDS: tuple[Kind, ...] = ("one", "sync", "sum", "avg", "central", "diloco", "noloco")
DECAY = 0.3
DEFAULT_RATE = 0.02
DEFAULT_INTERVAL_STEPS = 5


@dataclass(frozen=True)
class Row:
    """See the module. `leak`, `keep` None: the kind's own."""

    kind: Kind
    codec: str = "sign"
    owners_codec: str = ""
    """Second level; empty: packets go to everybody."""
    interval: int = DEFAULT_INTERVAL_STEPS
    rate: float = DEFAULT_RATE
    decay: float = 0.0
    scale: float = 1.0
    leak: float | None = None
    keep: float | None = None
    global_count: bool = False
    outer_rate: float = 1.0
    outer_momentum: float = 0.0
    lag: int = 1
    speeds: tuple[float, ...] = ()
    own_data: bool = False
    late_peers: int = 0
    late_meetings: int = 0
    stale_inverse: bool = False
    credit: bool = True
    times: int = 1
    drain: int = 0
    name: str = ""

    @property
    def swarm(self) -> bool:
        """Whether peers meet at all."""
        return self.kind not in ("one", "sync")

    def speed_of(self, peer: int) -> float:
        """Steps per tick."""
        return 1.0 / self.speeds[peer % len(self.speeds)] if self.speeds else 1.0


def parse_rows(texts: list[str]) -> list[Row]:
    """All rows that the texts name. Raises Refused("bad-bench") for words that mean nothing."""
    return [row for text in texts for row in _parse(text)]


def _parse(text: str) -> list[Row]:
    words = text.split()
    owners = words[:1] == ["owners"]
    words = words[1:] if owners else words
    if not words or words[0] not in KINDS or (owners and words[0] not in ("sum", "avg")):
        raise Refused("bad-bench", f"row '{text}': begin with one of {', '.join(KINDS)}, or owners sum, owners avg")
    kind, words = words[0], words[1:]
    values: dict[str, Any] = dict(_DEFAULTS.get(kind, {}))
    codec = words.pop(0) if words and "=" not in words[0] and words[0] != "decay" else values.get("codec", "sign")
    values["codec"], _, second = codec.partition("/")
    if bool(second) and not owners:
        raise Refused("bad-bench", f"row '{text}': two codecs are for owners; write for example 'owners avg topk-64/topk-256'")
    values["owners_codec"] = (second or values["codec"]) if owners else ""
    rates = [DEFAULT_RATE]
    for word in words:
        name, given, value = word.partition("=")
        try:
            if name == "lr":
                rates = [float(each) for each in value.split(",")]
            elif name in _READERS and (given or name == "decay"):
                values |= _READERS[name](value)
            else:
                raise Refused("bad-bench", f"row '{text}': '{word}' is unknown; known are lr=, {', '.join(f'{n}=' for n in _READERS)}")
        except (ValueError, ZeroDivisionError):
            raise Refused("bad-bench", f"row '{text}': '{value}' is no value of {name}") from None
    rows = [_checked(Row(**{"kind": kind, **values, "rate": rate}), text) for rate in rates]
    return [dataclasses.replace(row, name=name_of(row)) for row in rows]


def _checked(row: Row, text: str) -> Row:
    wrong = (
        (row.interval < 1 or row.times < 1, "H and x are whole numbers above 0"),
        (row.rate <= 0 or not 0 <= row.decay <= 1, "lr is above 0, decay between 0 and 1"),
        (min(row.lag, row.late_meetings, row.late_peers, row.drain) < 0, "lag, late and drain are not negative"),
        (row.scale <= 0 or (row.leak is not None and not 0 < row.leak <= 2), "s is above 0, leak between 0 and 2"),
        (any(speed < 1 for speed in row.speeds), "speeds say how many times slower than the fastest: 1 or more"),
        (bool(row.owners_codec) and (row.lag != 1 or row.late_peers > 0), "owners have a lag of two meetings, and nobody late"),
        (row.kind in ("diloco", "noloco", "central") and bool(row.speeds), "speeds are for one, sum and avg"),
    )
    for bad, sentence in wrong:
        if bad:
            raise Refused("bad-bench", f"row '{text}': {sentence}")
    return row


def name_of(row: Row) -> str:
    """The words that make a row, defaults left out."""
    usual = Row(**{"kind": row.kind, **_DEFAULTS.get(row.kind, {})})
    words = ["owners"] * bool(row.owners_codec) + [row.kind]
    if row.swarm:
        if row.owners_codec:
            words.append(f"{row.codec}/{row.owners_codec}")
        elif row.codec != usual.codec or row.kind in ("sum", "avg"):
            words.append(row.codec)
        words.append(f"H={row.interval}")
    words.append(f"lr={row.rate:g}")
    for name, text_of in _TEXTS.items():
        if text_of(row) != text_of(usual):
            words.append(name if name == "decay" and row.decay == DECAY else f"{name}={text_of(row)}")
    return " ".join(words)


def _number_or_share(value: str) -> float | None:
    return None if value == "share" else float(value)


def _choice(value: str, yes: str, no: str) -> bool:
    if value not in (yes, no):
        raise ValueError(value)
    return value == yes


def _pair(value: str) -> tuple[str, str]:
    first, _, second = value.partition("/" if "/" in value else ":")
    return first, second


_DEFAULTS: dict[str, dict[str, Any]] = {
    "avg": dict(leak=1.0, keep=1.0),
    "central": dict(codec="fp16", interval=20, scale=0.5),
    "diloco": dict(codec="none", interval=20, lag=0, leak=1.0, keep=1.0, outer_rate=0.7, outer_momentum=0.9),
    "noloco": dict(codec="none", interval=20, lag=0, keep=1.0, outer_rate=0.7, outer_momentum=0.3),
}
_READERS: dict[str, Callable[[str], dict[str, Any]]] = {
    "H": lambda v: {"interval": int(v)},
    "decay": lambda v: {"decay": float(v) if v else DECAY},
    "s": lambda v: {"scale": float(v)},
    "leak": lambda v: {"leak": _number_or_share(v)},
    "keep": lambda v: {"keep": _number_or_share(v)},
    "count": lambda v: {"global_count": _choice(v, "global", "local")},
    "outer": lambda v: {"outer_rate": float(_pair(v)[0]), "outer_momentum": float(_pair(v)[1])},
    "lag": lambda v: {"lag": int(v)},
    "speeds": lambda v: {"speeds": tuple(float(each) for each in v.split(":"))},
    "data": lambda v: {"own_data": _choice(v, "own", "all")},
    "late": lambda v: {"late_peers": int(_pair(v)[0]), "late_meetings": int(_pair(v)[1])},
    "stale": lambda v: {"stale_inverse": _choice(v, "inverse", "one")},
    "credit": lambda v: {"credit": _choice(v, "yes", "no")},
    "x": lambda v: {"times": int(v)},
    "drain": lambda v: {"drain": int(v)},
}
_TEXTS: dict[str, Callable[[Row], str]] = {
    "decay": lambda r: f"{r.decay:g}",
    "s": lambda r: f"{r.scale:g}",
    "leak": lambda r: "share" if r.leak is None else f"{r.leak:g}",
    "keep": lambda r: "share" if r.keep is None else f"{r.keep:g}",
    "count": lambda r: "global" if r.global_count else "local",
    "outer": lambda r: f"{r.outer_rate:g}/{r.outer_momentum:g}",
    "lag": lambda r: str(r.lag),
    "speeds": lambda r: ":".join(f"{each:g}" for each in r.speeds),
    "data": lambda r: "own" if r.own_data else "all",
    "late": lambda r: f"{r.late_peers}:{r.late_meetings}",
    "stale": lambda r: "inverse" if r.stale_inverse else "one",
    "credit": lambda r: "yes" if r.credit else "no",
    "x": lambda r: str(r.times),
    "drain": lambda r: str(r.drain),
}
