"""What the decode kernel is to reach on an H100, and whether a record of `bench_decode_kernel` shows it."""

from __future__ import annotations

from typing import Any

MFA, MFA_KR, MLA = "MFA 64x256", "MFA-KR 64x256", "MLA 128x(512+64)"
LONG = (8192, 32768)


def targets(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each with what is wanted, what was found of `auto`'s choice (None where not measured), and whether it is met."""
    found = []
    for variant, share in ((MFA, 0.9), (MFA_KR, 0.9), (MLA, 0.85)):
        for length in LONG:
            side = _ours(record, variant, "bfloat16", length)
            found.append(_target(f"{variant} bfloat16 64 x {length}: share of the copy's bandwidth", share,
                                 None if side is None else side["share_of_copy"]))
    found.append(_target("MFA-KR over MFA, bfloat16 64 x 32768: times as fast", 1.8,
                         _times_as_fast(record, (MFA_KR, "bfloat16", 32768), (MFA, "bfloat16", 32768))))
    for variant in (MFA, MFA_KR):
        for length in LONG:
            found.append(_target(f"{variant} int8 over bfloat16, 64 x {length}: times as fast", 1.7, _times_as_fast(
                record, (variant, "int8", length), (variant, "bfloat16", length))))
    worst = [(_over_best_peer(point), point["name"]) for point in record["points"]]
    measured = [(ratio, name) for ratio, name in worst if ratio is not None]
    slowest = min(measured, default=(None, "no point has a peer"))
    found.append(_target(f"best peer's time over ours, at the worst point ({slowest[1]})", 1.0, slowest[0]))
    for layer in record["layer"]:
        side = layer["sides"][layer["auto"]]
        name = f"Step-3's attention layer, {layer['batch']} x {layer['length']}: time over its floor"
        found.append(_target(name, 1.1, side.get("over_floor"), at_most=True))
    return found


def _target(name: str, wanted: float, found: float | None, at_most: bool = False) -> dict[str, Any]:
    met = None if found is None else (found <= wanted if at_most else found >= wanted)
    return {"target": name, "wanted": f"{'at most' if at_most else 'at least'} {wanted:g}", "found": found, "met": met}


def _ours(record: dict[str, Any], variant: str, cache_dtype: str, length: int) -> dict[str, Any] | None:
    """What `auto` takes at batch 64; None where that was not measured."""
    wanted = (variant, cache_dtype, 64, length)
    for point in record["points"]:
        if (point["variant"], point["cache_dtype"], point["batch"], point["length"]) == wanted:
            side: dict[str, Any] = point["sides"][point["auto"]]
            return side if "seconds" in side else None
    return None


def _times_as_fast(record: dict[str, Any], one: tuple[str, str, int], other: tuple[str, str, int]) -> float | None:
    first, second = _ours(record, *one), _ours(record, *other)
    return None if first is None or second is None else second["seconds"] / first["seconds"]


def _over_best_peer(point: dict[str, Any]) -> float | None:
    ours, others = point["sides"][point["auto"]], [s["seconds"] for s in peers(point).values() if "seconds" in s]
    if not others:
        return None
    # A failure of ours is slower than any peer.
    return min(others) / ours["seconds"] if "seconds" in ours else 0.0


def peers(point: dict[str, Any]) -> dict[str, Any]:
    """The sides of a point that are not our backends."""
    return {name: side for name, side in point["sides"].items() if not side["ours"]}
