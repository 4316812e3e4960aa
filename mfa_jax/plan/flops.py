"""FLOPs of one instruction: of matrix products from their shapes, of kernels by a formula each.

A multiplication and an addition are two FLOPs; nothing else counts. The compiler does not look into a kernel, so those
that our programs call have their formulas here.

The kernels of grouped products work on the tiles of rows that are there. Where experts are split over X devices, their
arrays have room for the rows of all (`dispatch`), and with a balanced router 1 / X of it is filled, which is counted.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from mfa_jax.plan.hlo import Computation, Instruction, Shape


def instruction_flops(home: Computation, instruction: Instruction, expert_shards: int = 1) -> float | None:
    """FLOPs of one run of an instruction, without what is fused into it; None for what has no formula.

    Args:
      expert_shards: devices that experts are split over.
    """
    if instruction.opcode == "dot":
        return _dot_flops(home, instruction)
    if instruction.opcode == "convolution":
        return _convolution_flops(home, instruction)
    found = _kernel_flops(home, instruction) if is_kernel(instruction) else None
    return found / expert_shards if found is not None and is_grouped(instruction) else found


def is_kernel(instruction: Instruction) -> bool:
    """Whether it calls a Pallas kernel for TPUs."""
    return instruction.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in instruction.attributes


def is_grouped(instruction: Instruction) -> bool:
    """Whether it calls the kernel of a grouped product or of the gradient of its matrices; rows are its 2-D arrays."""
    return is_kernel(instruction) and re.match("t?gmm", instruction.name) is not None


# ---- matrix products -------------------------------------------------------------------------------------------


def _dot_flops(home: Computation, dot: Instruction) -> float:
    """2 for each element of the result and each of the axes that are summed over."""
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    left = home.operand_shapes(dot)[0][0]
    summed = [left.dims[int(d)] for d in found[1].split(",") if d] if found else []
    return 2.0 * dot.shapes[0].size * float(np.prod(summed, initial=1.0))


def _convolution_flops(home: Computation, convolution: Instruction) -> float:
    """2 for each batch row, output feature, input feature of the kernel, and position where the window meets data.

    XLA writes a batched matrix product as a convolution whose window meets data at one position a batch.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    assert labels is not None, convolution.name
    left, right = (shapes[0].dims for shapes in home.operand_shapes(convolution))
    data, kernel, out = (dict(zip(names, dims, strict=True)) for names, dims in
                         zip(labels.groups(), (left, right, convolution.shapes[0].dims), strict=True))
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    flops = 2.0 * out["b"] * out["f"] * kernel["i"]
    for place, digit in enumerate(sorted(label for label in out if label.isdigit())):
        def option(name: str, default: str, place: int = place) -> str:
            return options[name].split("x")[place] if name in options else default

        flops *= _meetings(data[digit], kernel[digit], out[digit], int(option("stride", "1")),
                           int(option("pad", "0_0").split("_")[0]), int(option("lhs_dilate", "1")),
                           int(option("rhs_dilate", "1")))
    return flops


@functools.cache
def _meetings(data: int, kernel: int, out: int, stride: int, pad: int, data_dilation: int, kernel_dilation: int) -> int:
    """How many pairs of an output position and a window position fall on data and not on padding."""
    starts = np.arange(out) * stride - pad
    return sum(int(np.sum((at >= 0) & (at <= (data - 1) * data_dilation) & (at % data_dilation == 0)))
               for at in (starts + k * kernel_dilation for k in range(kernel)))


# ---- kernels ---------------------------------------------------------------------------------------------------


def _splash(products_of_key: int, products_of_value: int) -> Callable[[Sequence[Shape], Sequence[Shape]], float]:
    """Causal attention: so many products of the width of a key and of a value for each pair that a query sees.

    The kernel computes whole blocks; the part of a diagonal block that is masked is not counted.
    """
    def flops(operands: Sequence[Shape], results: Sequence[Shape]) -> float:
        q, k, v = [x for x in operands if x.dtype in ("bf16", "f32", "f16") and len(x.dims) >= 2][:3]
        T = k.dims[-2]
        pairs = math.prod(q.dims[:-1]) * (T + 1) / 2
        return 2 * pairs * (products_of_key * k.dims[-1] + products_of_value * v.dims[-1])

    return flops


def _decode(operands: Sequence[Shape], results: Sequence[Shape]) -> float:
    """Scores and values of each row of queries, padded to a tile, with every key of a full cache."""
    q, k = [x for x in operands if len(x.dims) == 4][:2]
    B, K, M, H = q.dims
    return 2.0 * B * K * M * k.dims[2] * (H + results[0].dims[-1])


def _grouped(operands: Sequence[Shape], results: Sequence[Shape]) -> float:
    """Each row that there is room for with the matrix of its group."""
    rows = next(x for x in operands if len(x.dims) == 2)
    return 2.0 * rows.size * results[0].dims[-1]


def _grouped_transposed(operands: Sequence[Shape], results: Sequence[Shape]) -> float:
    """The gradient of the groups' matrices: each row's two vectors multiplied."""
    rows = [x for x in operands if len(x.dims) == 2][1]
    return 2.0 * rows.dims[0] * results[0].dims[-2] * results[0].dims[-1]


_FLOPS: dict[str, Callable[[Sequence[Shape], Sequence[Shape]], float]] = {
    # Scores, values.
    "splash_mq?h?a_fwd": _splash(1, 1),
    # Scores again and the queries' gradient; the probabilities' gradient.
    "splash_mq?h?a_dq": _splash(2, 1),
    # Scores again and the keys' gradient; the probabilities' and the values' gradient.
    "splash_mq?h?a_dkv": _splash(2, 2),
    # JAX's megablox.
    "gmm": _grouped,
    "tgmm": _grouped_transposed,
    # Ours: `mfa_jax.kernels.mosaic_tpu`.
    "decode_attention": _decode,
}
"""By how the name begins, as a regular expression."""


def _kernel_flops(home: Computation, call: Instruction) -> float | None:
    flops = next((flops for start, flops in _FLOPS.items() if re.match(start, call.name)), None)
    operands = [shapes[0] for shapes in home.operand_shapes(call) if shapes]
    return None if flops is None else flops(operands, call.shapes)
