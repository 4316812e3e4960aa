"""Writes what the compilers say of the decode kernels: `python -m experiments.kernel_report`, for
`experiments/results/kernels/`.

For each TPU and case: the block that was chosen, the bytes and the time of its copy at the published bandwidth, the
compiler's static estimate of its arithmetic, and of its products alone (`kernel_cycles`), their ratios to the copy, and
the memory the kernel takes. Nothing here was timed. It takes some ten minutes.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from pathlib import Path
from typing import Any

import jax
import jaxlib

from experiments import cli
from experiments.aot_tpu import TOPOLOGIES, compile_kernel, mesh_of
from experiments.kernel_cases import CASES
from experiments.kernel_cycles import cycles, plan_of
from mfa_jax.plan.compiler import prepare

HBM = {"v5e": (819e9, 1.5e9), "v5p": (2765e9 / 2, 1.75e9), "v6e": (1640e9, 1.75e9)}
"""Bytes a second and cycles a second of a core, as published; the two cores of v5p share its bandwidth."""


@dataclasses.dataclass(frozen=True)
class KernelReportConfig:
    """Where the report goes."""

    output: str = "experiments/results/kernels"
    """A folder: tpu.json and the table tpu.md are written into it."""
    chips: tuple[str, ...] = tuple(TOPOLOGIES)
    """Of v5e, v5p, v6e."""


def measure(name: str, chip: str) -> dict[str, Any]:
    """One line of the table."""
    case, mesh = CASES[name], mesh_of(chip)
    plan = plan_of(case, mesh.devices.flat[0].device_kind)
    bandwidth, clock = HBM[chip]
    # A key head at a time is a block; MLA's 576 lanes are 640 in memory.
    lanes = -(-plan.H // 128) * 128
    token = case.token_bytes // case.K + (lanes - plan.H) * (1 if plan.quantized else 2)
    copy = plan.block * token / bandwidth * clock
    arithmetic, products = cycles(name, chip), cycles(name, chip, products=True)
    return {"chip": chip, "case": name, "block": plan.block, "part": plan.part, "bytes": plan.block * token,
            "copy_cycles": round(copy), "compute_cycles": round(arithmetic), "ratio": round(arithmetic / copy, 2),
            "product_cycles": round(products), "product_ratio": round(products / copy, 2),
            "vmem_bytes": vmem_bytes(compile_kernel(case, mesh).as_text())}


def vmem_bytes(hlo: str) -> int:
    """What the kernel takes of VMEM, from the compiled program.

    Raises:
      ValueError: the program does not say.
    """
    for line in hlo.splitlines():
        found = re.search(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"', line)
        if "tpu_custom_call" in line and found:
            return int(found[1])
    raise ValueError("the compiled program does not say what its kernel takes of VMEM")


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    titles = ("chip", "case", "keys a block", "keys a part", "MiB a block", "copy, cycles", "compute, cycles",
              "compute / copy", "products / copy", "VMEM, MiB")
    rows = [f"| {' | '.join(titles)} |", "| --- | --- " + "| ---: " * 8 + "|"]
    for x in lines:
        cells = (x["chip"], x["case"], x["block"], x["part"], f"{x['bytes'] / 2**20:.2f}", x["copy_cycles"],
                 x["compute_cycles"], f"{x['ratio']:.2f}", f"{x['product_ratio']:.2f}",
                 f"{x['vmem_bytes'] / 2**20:.1f}")
        rows.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def main(config: KernelReportConfig) -> None:
    prepare()
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for chip in config.chips:
        for name in CASES:
            lines.append(measure(name, chip))
            print(json.dumps(lines[-1]), flush=True)
    facts = {"date": datetime.date.today().isoformat(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    (folder / "tpu.json").write_text(json.dumps({**facts, "lines": lines}, indent=1) + "\n")
    (folder / "tpu.md").write_text(table(lines))


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(KernelReportConfig)))
