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
# # What MFA caches
#
# Decoding reads the keys and values of all earlier tokens for every new one, so what is cached sets how long a context
# fits into memory and how fast a token comes. This notebook shows what each attention variant caches, from the closed
# forms of `mfa_jax.capacity` and from caches that are really allocated, and what it gets for it. Nothing is trained.
#
# | variant | cached for a token in a layer, elements |
# | --- | --- |
# | MHA, GQA, MQA | `2 K H`: keys and values of `K` heads of width `H` |
# | MLA | `C + R`: one latent of width `C`, one rope key of width `R` |
# | MFA | `2 C`: one key and one value of width `C`, for all heads |
# | MFA-KR | `C`: one key; values are made from it |
#
# On Colab, `SOURCE` below says where the repository is.

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
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from experiments.capacity import COLORS, Arguments, reports, to_table
from experiments.published_numbers import rows
from experiments.published_numbers import to_table as printed_table
from experiments.quickstart import QuickstartConfig, compare
from mfa_jax.capacity import analyse
from mfa_jax.config import MFAConfig
from mfa_jax.plan.chips import CHIPS
from mfa_jax.presets import match_heads

plt.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})

# %% [markdown]
# ## The published models
#
# One row a model, at the context and the type of cache in the next cell; change them and run it again. `FRH`, `SLSD`
# and `TER` are the paper's measures: the rank that a head keeps, the width of the space that the heads share, and heads
# times rank. `paper-7b-*` are the models of the paper: what it prints of them fits these widths, and the text of
# `mfa_jax/presets.py` says which of their numbers are inferred.

# %%
found = reports(Arguments(context=8192, cache_dtype="bfloat16"))
Console(width=100).print(to_table(found))

# %% [markdown]
# ## Do the closed forms give what the papers print?
#
# The number as it stands in the paper, and ours in the same digits, cut off and not rounded where the paper does that.

# %%
Console(width=100).print(printed_table(list(rows())))

# %% [markdown]
# ## Is it so in memory?
#
# A closed form is a promise. Here the caches of six models are allocated, of the same size but for their attention, and
# their bytes are counted.


# %%
def plot_promised_and_measured(rows):
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    at = np.arange(len(rows))
    promised = axes.bar(at - 0.2, [row.cache_bytes_closed_form for row in rows], 0.4, label="closed form", color="C7")
    measured = axes.bar(at + 0.2, [row.cache_bytes_measured for row in rows], 0.4, label="allocated arrays", color="C2")
    for bars in (promised, measured):
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
    axes.set_xticks(at, [row.variant for row in rows])
    axes.set(ylabel="cache of a token, all layers [bytes]", title="nano models, cache in float32")
    axes.legend()


measured = compare(QuickstartConfig())
plot_promised_and_measured(measured)

# %% [markdown]
# ## How long a context fits?
#
# The caches of the paper's models for a batch of rows, against the memory of TPU chips. Weights are not counted here,
# and they need their share too.


# %%
def plot_context(found, rows_of_batch):
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    tokens = 2.0 ** np.arange(10, 21)
    for name, report in found.items():
        size = rows_of_batch * report.cache_bytes_per_token * tokens / 2**30
        axes.plot(tokens, size, "o-", markersize=3, color=COLORS[report.variant], label=name)
    for chip in CHIPS.values():
        axes.axhline(chip.hbm_bytes / 2**30, color="k", linewidth=0.8, linestyle=":")
        axes.text(tokens[0], chip.hbm_bytes / 2**30, f"memory of a {chip.name}", fontsize=8, va="bottom")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(tokens[::2], [f"{t / 1024:.0f}k" for t in tokens[::2]])
    axes.set(xlabel="context [tokens]", ylabel=f"cache of {rows_of_batch} rows [GiB]",
             title="The paper's 7B models, cache in bfloat16")
    axes.legend()


family = {name: report for name, report in found.items() if name.startswith("paper-7b")}
plot_context(family, rows_of_batch=16)

# %% [markdown]
# ## What is bought with it?
#
# A small cache alone is easy: MQA has one. The question is how much rank the heads keep. To the left is a smaller
# cache, upwards a higher total effective rank. Whether rank is what quality needs is a question for training runs, not
# for this picture.


# %%
def plot_plane(found):
    figure, axes = plt.subplots(figsize=(8.5, 5), layout="constrained")
    for name, report in found.items():
        x, y = report.cache_elements_per_token_and_layer, report.ter
        axes.scatter(x, y, color=COLORS[report.variant], s=40)
        left = report.variant.startswith("mfa")
        axes.annotate(name, (x, y), textcoords="offset points", xytext=(-6 if left else 6, 4), fontsize=8,
                      ha="right" if left else "left")
    for variant in dict.fromkeys(report.variant for report in found.values()):
        axes.scatter([], [], color=COLORS[variant], label=variant.upper().replace("_", "-"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlim(128, 8192)
    axes.set_ylim(1024, 32768)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="cache of a token in a layer [elements]", ylabel="total effective rank of a layer [dimensions]",
             title="Rank against cache")
    figure.legend(loc="outside right upper")


plot_plane(found)

# %% [markdown]
# ## The one number to choose: C
#
# The cache of MFA is `2 C` elements, and its heads have rank `C`. At a fixed number of parameters a wider `C` leaves
# fewer heads. Below, MFA layers with the parameters of the paper's MHA layer (`D = 2048`), with heads solved for.


# %%
def plot_widths(widths, found):
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.5), layout="constrained")
    for axes, label, values in zip(panels, (
        "query heads", "total effective rank [dimensions]", "cache of a token in a layer [elements]"), (
        [r.heads for r in found], [r.ter for r in found], [r.cache_elements_per_token_and_layer for r in found]),
            strict=True):
        axes.plot(widths, values, "o-", color=COLORS["mfa"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(widths, widths)
        axes.set(xlabel="C [dimensions]", ylabel=label, ylim=(0, None))
    figure.suptitle("MFA at the parameters of an MHA layer")


widths = (64, 128, 256, 512, 1024)
budget = 4 * 2048 * 2048
solved = [match_heads(MFAConfig(latent_dim=C, query_rank=C), 2048, budget) for C in widths]
plot_widths(widths, [analyse(attention, 2048, 24, context=8192) for attention in solved])

# %% [markdown]
# ## A layer of your own
#
# Any config will do: `GQAConfig`, `MLAConfig`, `MFAConfig`, `MFAKRConfig`.

# %%
mine = MFAConfig(num_heads=32, latent_dim=192, query_rank=384)
report = analyse(mine, model_dim=3072, num_layers=28, context=32768, cache_dtype="int8")
Console(width=100).print(to_table({"mine": report}))

# %% [markdown]
# Next: *2 Train and decode*. On the command line, `python -m experiments.capacity --help`.
