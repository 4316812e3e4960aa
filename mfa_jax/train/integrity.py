"""What a checkpoint records about each leaf, so that damage and another architecture can be told apart."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Shaped, UInt, UInt32

from mfa_jax.config import require

META = "meta"
"""Name of the JSON item."""
RESERVED = (META, "metrics")
"""Names that no tree may have; orbax owns the second."""
Leaves = dict[str, list[Any]]
"""`[dtype, shape, checksum]` by the path of the leaf."""

# What reading makes of a file that is gone, or that is looked for where damage says. Any other code is of the disk, the
# network or this process.
_DAMAGE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})
_CODE, _FILE = re.compile(r"os_error_code='(\d+)'"), re.compile(r'local file "([^"]+)"')  # as tensorstore tells them
_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


class DamagedCheckpointError(ValueError):
    """What a checkpoint holds cannot be read, or is not what was saved."""


class UnreadableCheckpointError(OSError):
    """A checkpoint could not be read for a reason that says nothing about what it holds (an I/O error, a stale handle,
    no permission): `errno` and `filename` say which and where. Nothing was moved."""


def error_code(error: BaseException | None) -> int | None:
    """The code of the system call that failed, by an error or what caused it; None where none did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if found := _CODE.search(str(error)):
            return int(found[1])
        error = error.__cause__ or error.__context__
    return None


def unreadable(error: Exception, place: str) -> UnreadableCheckpointError | None:
    """What to raise where reading failed for a reason that is not damage; None where it is.

    Args:
      place: what was read, for where the error does not name the file.
    """
    code = error_code(error)
    if code is None or code in _DAMAGE:
        return None
    file = error.filename if isinstance(error, OSError) else (_FILE.findall(str(error)) or [None])[-1]
    return UnreadableCheckpointError(
        code, f"a checkpoint cannot be read now ({os.strerror(code)}, errno {code}); that is not damage, and nothing "
        f"was moved: start again, and where it lasts, move the step out of its folder", str(file or place))


def checksum(x: Shaped[Array, "..."], *, by_layer: bool = False) -> UInt32[Array, ""]:
    """`sum_i mix(word_i * (2 i c + 1)) mod 2^32` over the elements' bits, at positions `i` of the whole array.

    Integer sums do not depend on their order, so neither does the result on how `x` is sharded. For a fixed position
    the summand is a bijection of the word (odd multipliers, xor-shift): damage to a single word of up to 32 bits
    always shows; anything else escapes with a chance of about 2^-32.

    Args:
      by_layer: sum over the first axis of stacked layers one after the other. XLA's CPU compiler writes all summands
        of a sum down, 4 bytes an element, where those for TPUs and GPUs add them up as they come; so it does with
        numbers of another type than the summands', which are therefore to be given as `_bits`.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if not by_layer or x.ndim < 3:
        return _sum_of(x, jnp.uint32(0))
    size = jnp.uint32(math.prod(x.shape[1:]) % 2**32)

    def add(carry: tuple[UInt32[Array, ""], UInt32[Array, ""]], layer: Shaped[Array, "..."]) -> tuple[Any, None]:
        total, start = carry
        return (total + _sum_of(layer, start), start + size), None

    (total, _), _ = jax.lax.scan(add, (jnp.uint32(0), jnp.uint32(0)), x)
    return total


def _sum_of(x: Shaped[Array, "..."], start: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """Of elements the first of which has position `start`."""
    words = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize]).astype(jnp.uint32)
    position = jnp.broadcast_to(start, words.shape)
    for axis in range(words.ndim):
        stride = jnp.uint32(math.prod(words.shape[axis + 1:]) % 2**32)
        position += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
    mixed = words * (position * jnp.uint32(2 * 1640531527) + jnp.uint32(1))
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)


def _bits(x: Shaped[Array, "..."]) -> UInt[Array, "..."]:
    """What lies on one CPU device as numbers without a type: the same memory."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return jax.device_put(np.asarray(x).view(_WORDS[x.dtype.itemsize]), x.sharding)


def leaves_by_path(tree: Any) -> dict[str, Any]:
    """Leaves of a tree by readable path, `layers/attention/S_q`."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.partial(jax.jit, static_argnames="by_layer")
def _checksums(leaves: dict[str, Any], *, by_layer: bool) -> dict[str, UInt32[Array, ""]]:
    return {path: checksum(leaf, by_layer=by_layer) for path, leaf in leaves.items()}


def describe(tree: Any) -> Leaves:
    """`[dtype, shape, checksum]` of each leaf by its path.

    In one program: of dozens that are in flight at once, each with a sum over devices, the threads of a CPU's devices
    may each wait in another one, for ever.
    """
    leaves = leaves_by_path(tree)
    # Of several devices each layer's sum would be one that they meet for.
    on_one = all([device.platform for device in leaf.sharding.device_set] == ["cpu"] for leaf in leaves.values())
    given = {path: _bits(leaf) for path, leaf in leaves.items()} if on_one else leaves
    sums = jax.device_get(_checksums(given, by_layer=on_one))
    return {path: [str(leaf.dtype), list(leaf.shape), int(sums[path])] for path, leaf in leaves.items()}


def digest(leaves: Leaves) -> str:
    """Of all leaves of a tree, by what `describe` says of them: the same wherever they are placed."""
    return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with a CRC-32 of itself, whatever the order of its keys."""
    return {**document, "crc32": zlib.crc32(json.dumps(document, sort_keys=True).encode())}


def read_sealed(path: epath.Path) -> dict[str, Any]:
    """A document that was written `sealed`.

    Raises:
      DamagedCheckpointError: it is missing, is not JSON, or is not what was written.
      UnreadableCheckpointError: it cannot be read, which says nothing about it.
    """
    try:
        document = json.loads(path.read_text())
        if document.pop("crc32", None) != sealed(document)["crc32"]:
            raise ValueError("checksum differs")
    except (OSError, ValueError, AttributeError) as error:
        raise unreadable(error, str(path)) or DamagedCheckpointError(
            f"meta data cannot be used ({type(error).__name__}: {error})") from error
    return document


def require_same_architecture(checkpoint: str, saved: Mapping[str, Leaves], abstract: Mapping[str, Any]) -> None:
    """Refuses trees that a checkpoint does not hold, or whose leaves are others there.

    Raises:
      ValueError: the tree, or the leaves with what the checkpoint has and what is asked for.
    """
    for name in abstract:
        require(name in saved, "item", name, f"is not in {checkpoint}; there are {list(saved)}")
    lines = [line for name, tree in abstract.items() for line in _differences(name, saved[name], tree)]
    if lines:
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(f"{checkpoint} is of another architecture: {'; '.join(lines[:3])}{more}")


def _differences(item: str, saved: Leaves, abstract: Any) -> list[str]:
    """What the checkpoint has against what is asked for, a line a leaf."""
    expected = {path: [str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves_by_path(abstract).items()}
    lines = []
    for path in [*expected, *(p for p in saved if p not in expected)]:
        found, wanted = saved.get(path, [])[:2], expected.get(path)
        if found != wanted:
            have = f"is {found[0]}{found[1]}" if found else "is missing"
            want = f"expected {wanted[0]}{wanted[1]}" if wanted else "expected no such leaf"
            lines.append(f"{item}/{path} {have} in the checkpoint, {want}")
    return lines


def require_trees(items: Mapping[str, Any], leaf_kind: type, what: str) -> None:
    """Raises `ValueError` unless `items` names trees whose leaves are all of this kind, with shardings."""
    require(bool(items), what, dict(items), "must name at least one tree")
    for name, tree in items.items():
        require(name.isidentifier() and name not in RESERVED, what, name,
                f"must be an identifier other than {', '.join(RESERVED)}")
        leaves = leaves_by_path(tree)
        accepted = f"must be a jax {leaf_kind.__name__.rpartition('.')[2]} with a sharding"
        require(bool(leaves), f"{what}[{name!r}]", tree, "must have at least one leaf")
        for path, leaf in leaves.items():
            require(isinstance(leaf, leaf_kind) and getattr(leaf, "sharding", None) is not None,
                    f"{what}[{name!r}] {path}", leaf, accepted)
