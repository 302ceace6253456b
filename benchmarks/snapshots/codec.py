"""What the delta codec makes of a step, and how fast, one core; and how fast bytes are digested."""

from __future__ import annotations

import time

from report import Report
from weights import RATES, Trained, changed_share, moved, num_bytes, stand_in

from homefire.checkpoints import Tensors, decode_tensor, encode_tensor, tensor_digest

_SIZE_BARS = ((0.015, 0.010), (0.09, 0.045), (0.45, 0.17))
"""Up to this share of changed elements: at most this share of the full size."""
_FAST_UP_TO = 0.09
_ENCODE_BAR, _DECODE_BAR = 400.0, 700.0
_STAND_IN_SHARES = (0.013, 0.086)


def measure(report: Report, trained: Trained, *, rounds: int, num_stand_in: int) -> None:
    report.say("the codec on the trained model")
    for rate in RATES:
        _pair(report, f"33 M, one step at {rate:g}", trained.before, trained.after[rate], rounds)
    report.say(f"the codec on a random stand-in of {num_stand_in / 1e6:.0f} M parameters")
    full = stand_in(num_stand_in)
    for share in _STAND_IN_SHARES:
        _pair(
            report, f"{num_stand_in / 1e6:.0f} M random", full, moved(full, share), 1, sized=False
        )
    report.add("digest of what is in memory", _digest_rate(full), "MB/s")


def _pair(
    report: Report, name: str, old: Tensors, new: Tensors, rounds: int, *, sized: bool = True
) -> None:
    """Best of the rounds: what the core can do, not what else it did."""
    share, megabytes = changed_share(old, new), num_bytes(old) / 1e6
    encode_s = decode_s = float("inf")
    size = 0
    for _ in range(rounds):
        began = time.process_time()
        encoded = {n: e for n in new if (e := encode_tensor(old[n], new[n])) is not None}
        encode_s = min(encode_s, time.process_time() - began)
        size = sum(each.size_bytes for each in encoded.values())
        began = time.process_time()
        decoded = {n: decode_tensor(old[n], each) for n, each in encoded.items()}
        decode_s = min(decode_s, time.process_time() - began)
        _check(decoded, new)
    of = f"{name} ({share:.1%} changed)"
    fast = share <= _FAST_UP_TO
    if sized:
        bars = [bar for up_to, bar in _SIZE_BARS if share <= up_to]
        report.add(f"size of full bf16: {of}", size / num_bytes(old), **_at_most(bars))
    report.add(f"encode: {of}", megabytes / encode_s, "MB/s", **_at_least(fast, _ENCODE_BAR))
    report.add(f"decode: {of}", megabytes / decode_s, "MB/s", **_at_least(fast, _DECODE_BAR))


def _check(decoded: Tensors, new: Tensors) -> None:
    for name, tensor in decoded.items():
        if tensor.data.tobytes() != new[name].data.tobytes():
            raise RuntimeError(f"{name} came out wrong")


def _digest_rate(tensors: Tensors) -> float:
    began = time.process_time()
    for tensor in tensors.values():
        tensor_digest(tensor)
    return num_bytes(tensors) / 1e6 / (time.process_time() - began)


def _at_most(bars: list[float]) -> dict[str, float]:
    return {"at_most": bars[0]} if bars else {}


def _at_least(applies: bool, bar: float) -> dict[str, float]:
    return {"at_least": bar} if applies else {}
