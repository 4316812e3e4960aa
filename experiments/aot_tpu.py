"""Compiles the decode kernels, and `generate` with them, for TPUs that are not here: `python -m experiments.aot_tpu`.

It needs libtpu: in the environment variable TPU_LIBRARY_PATH, in `tpu/` of the virtual environment (`make aot-tpu` puts
it there) or installed. Each line of output is a JSON object: the chip, the case, seconds, bytes of temporary memory,
and `copies`, the arrays of so many tokens that the program makes out of the cache.

A row of a cache's scales is interleaved with those of other rows on a TPU, so that XLA has to lay them out anew for the
kernel: 8 bytes a token allocated, beside the 2 W of the token itself. Keys and values are never copied.

XLA lays an array whose last axis is no multiple of 128 out with another axis in the lanes where a program begins or
ends with it, and copies it for the kernel; inside one program, such as `generate`, it takes the kernel's layout.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import cli
from experiments.kernel_cases import BORDERS, CASES, Case, decode
from mfa_jax import axes
from mfa_jax.config import MFAConfig, MFAKRConfig, MLAConfig, ModelConfig
from mfa_jax.generate import SamplingConfig, lower_generate
from mfa_jax.model.transformer import Transformer
from mfa_jax.plan.compiler import prepare

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
"""A smallest slice of each chip."""
BATCH, CAPACITY = 4, 8192
SHORT = "MFA-KR 64x256 int8", 1664
"""A case with a cache that is shorter than a slot: its parts of 896 keys, on v5e and v5p, are no power of two."""


@dataclasses.dataclass(frozen=True)
class AotTpuConfig:
    """What is compiled."""

    chips: tuple[str, ...] = tuple(TOPOLOGIES)
    """Of v5e, v5p, v6e."""
    generate: bool = True
    """Also a small model's whole `generate`, for MFA, MFA-KR and MLA."""

    def __post_init__(self) -> None:
        for chip in self.chips:
            if chip not in TOPOLOGIES:
                raise ValueError(f"chips={chip!r}: must be of {', '.join(TOPOLOGIES)}")


def mesh_of(chip: str) -> Mesh:
    """One chip of a topology, with the axes of every mesh of ours."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
    return axes.make_mesh((1,) * len(axes.MESH_AXES), devices[:1])


def compile_kernel(case: Case, mesh: Mesh, B: int = BATCH, S: int = CAPACITY) -> Any:
    """The compiled `decode_attention` of one call."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        # As the kernel reads it, and as it lies inside a program.
        layout = Layout(tuple(range(len(shape))))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=Format(layout, sharding))

    arguments = case.arguments(B, S, array)
    with jax.set_mesh(mesh):
        local = jax.shard_map(lambda arrays: decode(case, arrays, "mosaic_tpu"), in_specs=PartitionSpec(),
                              out_specs=PartitionSpec(), check_vma=False)
        return jax.jit(local).lower(arguments).compile()


MODELS = (MFAConfig(num_heads=64, latent_dim=256), MFAKRConfig(num_heads=64, latent_dim=256),
          MLAConfig(num_heads=128, latent_dim=512, rope_dim=64))
"""Attention of the models whose whole `generate` is compiled."""


def compile_model(attention: Any, mesh: Mesh, cache_dtype: str, implementation: Any) -> Any:
    """The compiled `generate` of a small model with real widths of attention."""
    model = Transformer(ModelConfig(
        num_layers=2, model_dim=512, ffn_dim=1024, attention=attention, dtype="bfloat16", param_dtype="bfloat16",
        attention_implementation="blockwise", decode_implementation=implementation))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, PartitionSpec())
        place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding))
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))
        return lower_generate(
            model, place(shapes["params"]), batch_size=BATCH, prompt_tokens=128, max_new_tokens=64, capacity=CAPACITY,
            sampling=SamplingConfig(temperature=0), cache_dtype=cache_dtype).compile()


_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?\S+ = (\w+\[[\d,]*\])\S* ([\w-]+)\(", re.MULTILINE)
_MOVES = {"copy", "copy-start", "transpose", "reshape", "convert", "pad", "slice", "concatenate"}


def copies(program: Any, S: int, *, in_loops: bool = False) -> list[str]:
    """Instructions that make another array of S tokens out of a cache; only those inside a loop if so asked."""
    computations = re.split(r"\n(?=%|ENTRY)", program.as_text())
    names = [re.match(r"(?:ENTRY )?%?([\w.-]+)", text) for text in computations]
    bodies = set(re.findall(r"body=%?([\w.-]+)", program.as_text()))
    found = []
    for name, text in zip(names, computations, strict=True):
        if name is None or "fused" in name[1] or (in_loops and name[1] not in bodies):
            continue
        found += [f"{operation} {shape}" for shape, operation in _INSTRUCTION.findall(text)
                  if operation in _MOVES and re.search(rf"\b{S}\b", shape)]
    return found


def main(config: AotTpuConfig) -> None:
    prepare()
    for chip in config.chips:
        mesh = mesh_of(chip)
        cases = [(name, case, CAPACITY) for name, case in (CASES | BORDERS).items()]
        cases.append((f"{SHORT[0]}, {SHORT[1]} tokens", CASES[SHORT[0]], SHORT[1]))
        for name, case, S in cases:
            start = time.perf_counter()
            program = compile_kernel(case, mesh, S=S)
            _report(chip, name, start, program, copies(program, S))
        if config.generate:
            for attention in MODELS:
                for cache_dtype in ("bfloat16", "int8"):
                    start = time.perf_counter()
                    program = compile_model(attention, mesh, cache_dtype, "mosaic_tpu")
                    _report(chip, f"generate {attention.variant} {cache_dtype}", start, program,
                            copies(program, CAPACITY, in_loops=True))


def _report(chip: str, name: str, start: float, program: Any, moved: list[str]) -> None:
    print(json.dumps({"chip": chip, "case": name, "seconds": round(time.perf_counter() - start, 1),
                      "temp_bytes": program.memory_analysis().temp_size_in_bytes, "copies": moved}), flush=True)


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(AotTpuConfig)))
