"""What both papers print of their models' attention, beside our closed forms.

    python -m experiments.published_numbers

Ends with exit code 2 where a printed digit does not come out. The tests hold every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.cli import run
from mfa_jax.capacity import Report, analyse
from mfa_jax.config import require
from mfa_jax.presets import published

MFA, STEP3 = "arXiv 2412.19255", "arXiv 2507.19427"


@dataclasses.dataclass(frozen=True)
class Row:
    """One printed number."""

    source: str
    model: str
    quantity: str
    printed: str
    ours: str
    """Ours, in the digits of the paper."""


def report(name: str, context: int = 8192, cache_dtype: str = "int8") -> Report:
    """The closed forms of a published model."""
    model = published[name]
    return analyse(model.attention, model.model_dim, model.num_layers, context=context, cache_dtype=cache_dtype)


_TABLES = (
    (8192, "deepseek-v3", "2.88e+08", "1.47e+11", "2.28e+10"),
    (8192, "kimi-k2", "2.88e+08", "7.37e+10", "1.23e+10"),
    (8192, "qwen3-235b", "7.89e+08", "2.52e+10", "1.34e+10"),
    (8192, "qwen3-32b", "1.07e+09", "1.72e+10", "1.21e+10"),
    (8192, "step3", "2.56e+08", "3.27e+10", "2.07e+10"),
    (32768, "deepseek-v3", "1.15e+09", "5.89e+11", "2.28e+10"),
    (32768, "kimi-k2", "1.15e+09", "2.95e+11", "1.23e+10"),
    (32768, "qwen3-235b", "3.15e+09", "1.01e+11", "1.34e+10"),
    (32768, "qwen3-32b", "4.29e+09", "6.87e+10", "1.21e+10"),
    (32768, "step3", "1.02e+09", "1.31e+11", "2.07e+10"),
)
"""Context, model, and of a decoded token: bytes of an 8-bit cache that are read, FLOPs of attention, of projections."""


def rows() -> Iterator[Row]:
    """Every number, in the order of the papers."""
    cached = {v: report(f"paper-7b-{v}", cache_dtype="bfloat16").cache_bytes_per_token
              for v in ("mha", "mla", "mfa", "mfa-kr")}
    for variant, printed in (("mha", "196.6"), ("mfa", "24.6"), ("mfa-kr", "12.3")):
        yield Row(MFA, f"paper-7b-{variant}", "16-bit cache, KB a token", printed, f"{cached[variant] / 1000:.1f}")
    # The paper cuts 93.75 off after one digit.
    for variant, printed in (("mfa", "87.5"), ("mfa-kr", "93.7")):
        saved = int(1000 * (1 - cached[variant] / cached["mha"])) / 10
        yield Row(MFA, f"paper-7b-{variant}", "cache below MHA's, %", printed, f"{saved:.1f}")
    yield Row(MFA, "paper-7b-mfa", "cache below MLA's, %", "56", f"{100 * (1 - cached['mfa'] / cached['mla']):.0f}")
    for context, name, read, attention, projection in _TABLES:
        found = report(name, context)
        for quantity, printed, ours in (
            ("bytes read", read, found.bytes_read_per_decoded_token), ("attention FLOPs", attention,
             found.attention_flops), ("projection FLOPs", projection, found.projection_flops)):
            yield Row(STEP3, name, f"{quantity}, {context} tokens", printed, f"{ours:.2e}")
    for name, intensity, rank in (("step3", "128", "16384"), ("deepseek-v3", "512", "16384"),
                                  ("qwen3-235b", "32", "8192")):
        found = report(name)
        yield Row(STEP3, name, "arithmetic intensity, FLOPs a byte", intensity, f"{found.arithmetic_intensity:g}")
        yield Row(STEP3, name, "total effective rank", rank, f"{found.ter}")


def to_table(found: list[Row]) -> Table:
    """A row a number."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in ("source", "model", "quantity", "printed", "ours"):
        table.add_column(heading, justify="right" if heading in ("printed", "ours") else "left")
    for row in found:
        table.add_row(*dataclasses.astuple(row))
    return table


def main() -> None:
    found = list(rows())
    Console().print(to_table(found))
    off = [f"{row.model} {row.quantity}" for row in found if row.printed != row.ours]
    require(not off, "published numbers", off, "must come out as printed")


if __name__ == "__main__":
    run(main)
