# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # How fast is decoding
#
# A decoded token does little arithmetic for the bytes it reads, so the least time of a step is the time of reading the
# cache: a smaller cache is a faster token, if the kernel keeps up. Here that is drawn as a roofline, with the roofs of
# the device this runs on, and then measured on it.
#
# What is timed are calls of `decode_attention` at the widths of the paper's 7B models, one layer. Times are medians of
# rounds in which all take turns, after every output was compared with the reference. They hold for this machine, in
# this state; on a shared one they vary. The page of `experiments/bench_decode_kernel.py` says how it is done, and
# `experiments/results/` has what was recorded.
#
# It runs in a few minutes on two CPU cores; on a GPU or TPU it takes longer contexts by itself
# (`MFA_JAX_NOTEBOOK_SIZE` chooses). On Colab, `SOURCE` below says where the repository is.

# %%
# On Colab this installs the project for the runtime's device. Anywhere else it does nothing.
import os
import subprocess
import sys
from importlib.metadata import version

SOURCE = "/content/mfa_jax"  # where a clone of the repository lies, or its address: https://...
if "COLAB_RELEASE_TAG" in os.environ:
    extra = "cuda12" if os.environ.get("COLAB_GPU") == "1" else "tpu" if os.environ.get("COLAB_TPU_1VM") == "1" else ""
    place = f"git+{SOURCE}" if "://" in SOURCE else f"file://{SOURCE}"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", f"mfa_jax[{extra}] @ {place}"])
    loaded = [name for name in ("numpy", "jax") if name in sys.modules]
    older = [name for name in loaded if sys.modules[name].__version__ != version(name)]
    if older:  # what is loaded stays loaded: "Run all" must not go on
        raise SystemExit(f"Restart the session (menu Runtime) and run all cells again: older {older} are loaded.")

# %%
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from experiments import bench_decode
from experiments.bench_decode import BenchDecodeConfig
from experiments.bench_decode_kernel import BenchDecodeKernelConfig, Scale, measure, to_table
from experiments.capacity import COLORS
from experiments.decode_kernel.plots import roofline
from experiments.decode_kernel.points import Sizes
from experiments.kernel_cases import PAPER
from experiments.notebook import fast_dtype, pick, size
from mfa_jax import kernels
from mfa_jax.capacity import analyse
from mfa_jax.presets import model_preset, published

plt.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
dtype = pick(tiny="float32", cpu="float32", accelerator=fast_dtype())
print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, size {size()}, caches and queries in {dtype}")

# %% [markdown]
# ## What to expect
#
# In closed form: bytes read and FLOPs of attention for each cached token and layer, and their ratio, which does not
# depend on the context. A device turns its own ratio of arithmetic to bandwidth: below it, bytes set the pace. So the
# variants should stand in the order of their bytes, unless one of them does too much arithmetic for this device. MFA-KR
# does some that is not counted: it turns its cached keys by rope as it reads them.

# %%
for name in PAPER:
    model = published[name]
    report = analyse(model.attention, model.model_dim, 1, context=1, cache_dtype=dtype)
    backend = kernels.resolve("auto", PAPER[name].call(1024), kernels.default_device())
    print(f"{name:16} {report.bytes_read_per_decoded_token:6,} bytes and {report.attention_flops:7,} FLOPs a cached "
          f"token: {report.arithmetic_intensity:5.1f} FLOPs a byte; `auto` takes {backend}")

# %% [markdown]
# ## Measure
#
# First a copy and a product of matrices, the roofs of this device; then every variant, batch and length. The sides
# named `jax.nn` are JAX's own attention on the same arrays, where it can serve.

# %%
scale = Scale(
    batches=(pick(tiny=1, cpu=2, accelerator=16),),
    lengths=pick(tiny=(64,), cpu=(4096, 1024), accelerator=(16384, 4096, 1024)),
    copy_bytes=pick(tiny=2**18, cpu=2**28, accelerator=2**29),
    matmul=pick(tiny=64, cpu=1024, accelerator=4096),
    point=Sizes(cold_bytes=pick(tiny=2**16, cpu=2**27, accelerator=2**28),
                round_seconds=pick(tiny=0.001, cpu=0.05, accelerator=0.02), rounds=pick(tiny=2, cpu=5, accelerator=7)),
)
config = BenchDecodeKernelConfig(output=f"{tempfile.mkdtemp(prefix='mfa-')}/record.json", cases=tuple(PAPER),
                                 cache_dtypes=(dtype,), budget_seconds=200, torch=False, layer=False)
record = measure(config, scale)
table = to_table(record)
table.caption = None  # targets for an H100 at other sizes
Console(width=120).print(table)

# %% [markdown]
# ## Time of a token against its context
#
# Solid: measured, with the backend that `auto` takes. Dotted: what reading the cache would take at the speed of the
# copy. A copy writes as much as it reads, so that on some devices, CPUs among them, reading alone is faster; and a
# short cache may come out of a cache of the processor.


# %%
def plot_time(record):
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    rate = record["device_speed"]["copy_bytes_per_s"]
    for name in dict.fromkeys(point["variant"] for point in record["points"]):
        points = sorted((p for p in record["points"] if p["variant"] == name), key=lambda p: p["length"])
        points = [p for p in points if "seconds" in p["sides"][p["auto"]]]
        color, lengths = COLORS[published[name].attention.variant], [p["length"] for p in points]
        axes.plot(lengths, [1e6 * p["sides"][p["auto"]]["seconds"] for p in points], "o-", color=color, label=name)
        axes.plot(lengths, [1e6 * p["valid_bytes"] / rate for p in points], ":", color=color)
    axes.plot([], [], "k:", label="bytes at the speed of a copy")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    ticks = sorted({p["length"] for p in record["points"]})
    axes.set_xticks(ticks, ticks)
    axes.set(xlabel=f"tokens a row, batch {record['points'][0]['batch']}", ylabel="time of attention in one layer [us]",
             title=record["machine"]["device"])
    axes.legend()


plot_time(record)

# %% [markdown]
# ## Roofline
#
# The slanted roof is the copy, the flat one the product of matrices in the type of the caches, both of this run.

# %%
roofline(record)

# %% [markdown]
# ## How much of the copy's bandwidth is reached
#
# Valid bytes of the cache a second, over the bytes a second of the copy, at the longest context.


# %%
def plot_share(record):
    longest = max(p["length"] for p in record["points"])
    points = [p for p in record["points"] if p["length"] == longest]
    names = list(dict.fromkeys(name for p in points for name, side in p["sides"].items() if "share_of_copy" in side))
    figure, axes = plt.subplots(figsize=(8.5, 4), layout="constrained")
    for i, name in enumerate(names):
        at = [x + (i - (len(names) - 1) / 2) * 0.8 / len(names) for x in range(len(points))]
        shares = [p["sides"][name].get("share_of_copy", np.nan) for p in points]
        axes.bar_label(axes.bar(at, shares, 0.8 / len(names), label=name), fmt="%.2f", fontsize=8, padding=2)
    axes.axhline(1, color="k", linestyle="--", linewidth=1, label="copy")
    axes.set_xticks(range(len(points)), [p["variant"] for p in points])
    axes.margins(y=0.15)
    axes.set_xlim(-0.6, len(points) - 0.4)
    axes.set(ylabel="bandwidth over the copy's", title=f"{longest} tokens a row, {record['machine']['device']}")
    figure.legend(loc="outside right upper")


plot_share(record)

# %% [markdown]
# ## And a whole model?
#
# Attention is not all of a step: weights are read too, once for all rows. So a small model with a short context gains
# less than attention alone does, and a large batch with a long context more. Random weights, greedy, the same number
# of parameters for every variant.

# %%
whole = bench_decode.measure(BenchDecodeConfig(
    model=model_preset(pick(tiny="tiny-mha", cpu="nano-mha", accelerator="small-mha")),
    variants=pick(tiny="mfa", cpu="mqa,mla,mfa,mfa-kr", accelerator="mqa,mla,mfa,mfa-kr"),
    batch_size=pick(tiny=1, cpu=8, accelerator=32), prompt_tokens=pick(tiny=16, cpu=256, accelerator=1024),
    new_tokens=pick(tiny=4, cpu=256, accelerator=512), repeats=pick(tiny=1, cpu=3, accelerator=5), peer=False,
))


# %%
def plot_whole(record):
    found = {"mha" if name == "ours" else name: side for name, side in record["sides"].items()}
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, side in found.items():
        x, y, left = side["cache_bytes_per_token"], side["tokens_per_s"], name.startswith("mfa")
        axes.scatter(x, y, s=50, color=COLORS[name.replace("-", "_")])
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(-7 if left else 7, 4),
                      ha="right" if left else "left")
    config = record["config"]
    axes.set_xscale("log", base=2)
    sizes = sorted({side["cache_bytes_per_token"] for side in found.values()})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=45)
    axes.margins(x=0.2, y=0.15)
    axes.set(xlabel="cache of a token, all layers [bytes]", ylabel="decoded, reading the prompts included [tokens/s]",
             title=f"whole models, {config['batch_size']} rows, {config['prompt_tokens']} tokens read and "
                   f"{config['new_tokens']} decoded")
    axes.set_ylim(bottom=0)


plot_whole(whole)

# %% [markdown]
# The same on the command line, at the sizes of the recorded results: `python -m experiments.bench_decode_kernel --help`
# and `python -m experiments.bench_decode --help`. Next: *5 Bring your own text*.
