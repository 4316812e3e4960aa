"""Draws `experiments/sharding.png`: which device holds what of an MFA model, as the code lays it out.

    python -m experiments.sharding_picture

Eight devices, fsdp=2, context=2, tensor=2. Places are those that `axes.RULES` gives to the logical axes
of `ARRAYS`, which are written here by hand, as the model names them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from experiments import cli
from mfa_jax import axes
from mfa_jax.attention.context import zigzag

SIZES = {"data": 1, "fsdp": 2, "expert": 1, "context": 2, "tensor": 2}


@dataclasses.dataclass(frozen=True)
class PictureConfig:
    """Where the picture goes."""

    output: str = "experiments/sharding.png"
    """A PNG file."""


@dataclasses.dataclass(frozen=True)
class Drawn:
    """An array by its logical axes, of which the two that are named are drawn: down, and to the right."""

    title: str
    names: tuple[str | None, ...]
    down: tuple[int, str]
    right: tuple[int, str]


ARRAYS: Sequence[Sequence[Drawn]] = (
    (Drawn("tokens, states x [B, T, D]", ("batch", "sequence", "act_embed"), (0, "B rows"), (1, "T, in zig-zag order")),
     Drawn("queries [B, T, N, C]", ("batch", "sequence", "heads", None), (1, "T"), (2, "N heads")),
     Drawn("key and value made [B, T, C]", ("batch", "sequence", "latent"), (1, "T"), (2, "C")),
     Drawn("key and value gathered [B, T, C]", ("batch", None, "latent"), (1, "T"), (2, "C"))),
    (Drawn("S_q [D, Q], S_k, S_v [D, C]", ("embed", "latent"), (0, "D"), (1, "Q or C")),
     Drawn("Q [Q, N, C]", ("inner_rank", "heads", "latent"), (0, "Q"), (1, "N heads")),
     Drawn("O [N, C, D]", ("heads", "latent", "embed"), (2, "D"), (0, "N heads")),
     Drawn("gate, up [D, F], embedding [V, D]", ("embed", "ffn"), (0, "D"), (1, "F or V"))),
)
"""Activations of one layer above, weights (and their gradients and moments) below."""


def places(mesh: Mesh, drawn: Drawn) -> dict[tuple[int, int, int, int], list[int]]:
    """Devices of each part of the two axes that are drawn, of an array whose axes have 8 elements.

    A part is where it begins and ends, down and to the right.
    """
    found: dict[tuple[int, int, int, int], list[int]] = {}
    at = NamedSharding(mesh, axes.RULES.spec(*drawn.names))
    device: Any
    for device, index in at.devices_indices_map((8,) * len(drawn.names)).items():
        down, right = (index[axis].indices(8)[:2] for axis in (drawn.down[0], drawn.right[0]))
        found.setdefault((*down, *right), []).append(device.id)
    return found


def draw(panel: Any, mesh: Mesh, drawn: Drawn) -> None:
    """One array as a rectangle, its parts with the devices that hold them."""
    from matplotlib.patches import Rectangle

    parts = places(mesh, drawn)
    for number, ((top, bottom, left, right), devices) in enumerate(parts.items()):
        panel.add_patch(Rectangle((left, top), right - left, bottom - top, facecolor=f"C{number}", alpha=0.35,
                                  edgecolor="k", linewidth=1))
        panel.text((left + right) / 2, (top + bottom) / 2, " ".join(map(str, sorted(devices))), ha="center",
                   va="center", fontsize=9)
    chunks = zigzag(8, SIZES["context"]).reshape(2 * SIZES["context"], -1)[:, 0] // 2
    for axis, at in ((drawn.down, "y"), (drawn.right, "x")):
        if axis[1].startswith("T,"):  # where each quarter of the sequence lies
            panel.set_xticks(np.arange(1, 8, 2), [f"chunk {chunk}" for chunk in chunks], fontsize=7)
        else:
            getattr(panel, f"set_{at}ticks")([])
    panel.set(xlim=(0, 8), ylim=(8, 0), xlabel=drawn.right[1], ylabel=drawn.down[1])
    panel.set_title(drawn.title, fontsize=9)


def main(config: PictureConfig) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    mesh = axes.make_mesh(tuple(SIZES[axis] for axis in axes.MESH_AXES))
    figure, panels = plt.subplots(len(ARRAYS), 4, figsize=(13, 6.4), layout="constrained")
    for row, arrays in zip(panels, ARRAYS, strict=True):
        for panel, drawn in zip(row, arrays, strict=True):
            draw(panel, mesh, drawn)
    split = [axis for axis in axes.MESH_AXES if SIZES[axis] > 1]
    where = [f"device {i}: " + ", ".join(f"{axis} {int(place[axes.MESH_AXES.index(axis)])}" for axis in split)
             for i in (0, 1, 2, 4) for place in np.argwhere(mesh.device_ids == i)]
    figure.suptitle("Devices that hold each part of an MFA layer: " + ", ".join(f"{a}={SIZES[a]}" for a in split) + "\n"
                    + "; ".join(where), fontsize=10)
    figure.savefig(Path(config.output), dpi=110)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(PictureConfig)))
