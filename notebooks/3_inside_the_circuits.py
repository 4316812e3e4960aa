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
# # Inside the circuits
#
# Every attention variant is a choice of two matrices for each head `n` (arXiv 2412.19255, section 2):
#
# $$y_i = \sum_n \sum_{j \le i} \mathrm{softmax}_j\!\left(\frac{x_i W_n x_j^\top}{\sqrt{H}}\right) x_j U_n$$
#
# `W_n` says where a head looks, `U_n` what it brings along. Both are `[D, D]` and of low rank; how low is what the
# variants differ in. Here an MFA model is trained, and its circuits are looked at: the matrices, their ranks before and
# after training, and where the heads attend.
#
# It runs in a few minutes on two CPU cores; on a GPU or TPU it takes a larger model by itself (`MFA_JAX_NOTEBOOK_SIZE`
# chooses). On Colab, `SOURCE` below says where the repository is.

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
import string
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

from experiments.notebook import pick, size
from mfa_jax.attention_maps import attention_maps
from mfa_jax.capacity import factorization_rank_per_head
from mfa_jax.circuits import circuits
from mfa_jax.config import DataConfig, OptimizerConfig, TrainConfig
from mfa_jax.model.transformer import init_params
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train
from mfa_jax.train.run import load_trained

plt.rcParams.update({"figure.dpi": 110})
print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, size {size()}")

# %% [markdown]
# ## A trained model
#
# Another variant (`nano-mha`, `nano-mla`, `nano-mfa-kr`) goes through all that follows, too.

# %%
preset = pick(tiny="tiny-mfa", cpu="nano-mfa", accelerator="small-mfa")
config = TrainConfig(
    workdir=tempfile.mkdtemp(prefix="mfa-"),
    model=model_preset(preset),
    data=DataConfig(source="stdlib", sequence_length=pick(tiny=64, cpu=128, accelerator=512),
                    batch_size=pick(tiny=8, cpu=16, accelerator=16)),
    optimizer=OptimizerConfig(kind="muon", learning_rate=1.5e-2, warmup_steps=pick(tiny=4, cpu=20, accelerator=30)),
    steps=pick(tiny=8, cpu=300, accelerator=400),
    log_every=pick(tiny=4, cpu=50, accelerator=50),
    eval_every=0,
)
train(config)
trained = load_trained(config.workdir)
layers = range(config.model.num_layers)
after = [circuits(trained.params, layer) for layer in layers]
fresh = nn.unbox(jax.jit(lambda: init_params(trained.model, jax.random.key(config.seed)))())
before = [circuits(fresh, layer) for layer in layers]
nominal = factorization_rank_per_head(config.model.attention)

# %% [markdown]
# ## The matrices
#
# `W_n` and `U_n` of the first heads of the middle layer. Rows are dimensions of the token that attends (`W_n`) or is
# attended to (`U_n`), columns those of the other end. Single numbers mean little, since the basis of the residual
# stream is arbitrary; stripes show that some of its dimensions are used more than others.


# %%
def plot_matrices(layer, heads):
    figure, panels = plt.subplots(2, len(heads), figsize=(2.4 * len(heads) + 1, 5.2), layout="constrained",
                                  sharex=True, sharey=True)
    for row, kind in zip(panels, "WU", strict=True):
        matrices = [getattr(after[layer], kind)(head) for head in heads]
        limit = np.percentile(np.abs(matrices), 99.5)
        for axes, head, matrix in zip(row, heads, matrices, strict=True):
            image = axes.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
            axes.set_title(f"${kind}_{{{head}}}$")
        figure.colorbar(image, ax=row, label=f"element of ${kind}_n$", shrink=0.8)
    figure.supxlabel("dimension of the residual stream")
    figure.supylabel("dimension of the residual stream")
    figure.suptitle(f"{preset}, layer {layer}, heads {heads[0]} to {heads[-1]}")


plot_matrices(len(layers) // 2, heads=range(4))

# %% [markdown]
# ## Singular values
#
# The factorization leaves a head no more singular values than its nominal rank, which is where the lines end. How they
# fall before that says how much of it is used. Thin lines are heads, the dashed line their mean at the start of
# training.


# %%
def plot_spectra(layers):
    figure, panels = plt.subplots(2, len(layers), figsize=(2.3 * len(layers) + 1, 5), layout="constrained", sharex=True,
                                  sharey=True, squeeze=False)
    for column, layer in enumerate(layers):
        for axes, kind, spectrum, start in zip(panels[:, column], "WU", after[layer].singular_values(),
                                               before[layer].singular_values(), strict=True):
            shown = [s / s[:, :1] for s in (spectrum, start)]
            index = np.arange(1, shown[0].shape[1] + 1)
            axes.plot(index, shown[0].T, color="C2" if kind == "W" else "C0", alpha=0.4, linewidth=0.8)
            axes.plot(index, shown[1].mean(axis=0), "k--", linewidth=1.2)
            axes.axvline(nominal, color="C3", linewidth=0.8, linestyle=":")
            axes.set(yscale="log", ylim=(1e-3, 1.3), title=f"${kind}_n$, layer {layer}")
            axes.grid(alpha=0.3)
    figure.supxlabel(f"index of the singular value (dotted: nominal rank, {nominal})")
    figure.supylabel("singular value over the largest")


plot_spectra(layers[:: max(1, len(layers) // 5)])

# %% [markdown]
# ## Measured ranks
#
# The rank counts singular values above a millionth of the largest. The *effective* rank is the exponential of the
# entropy of their shares: a head that uses its dimensions evenly has its nominal rank, one that leans on a few has
# less. Means over the heads of a layer.

# %%
table = Table("layer", "nominal", *(f"{kind}_n {what}" for kind in "WU" for what in (
    "rank", "effective, at the start", "effective, trained")), title=preset)
for layer in layers:
    start, end = before[layer].ranks(), after[layer].ranks()
    table.add_row(str(layer), str(nominal), *(f"{values.mean():.1f}" for kind in "WU" for values in (
        end[f"{kind}_rank"], start[f"{kind}_effective_rank"], end[f"{kind}_effective_rank"])))
Console(width=120).print(table)


# %%
def plot_ranks():
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axes, kind, color in zip(panels, "WU", ("C2", "C0"), strict=True):
        for layer in layers:
            ranks = after[layer].ranks()[f"{kind}_effective_rank"]
            axes.plot(np.full(len(ranks), layer), ranks, "o", color=color, alpha=0.5, markersize=4)
        axes.plot(layers, [c.ranks()[f"{kind}_effective_rank"].mean() for c in before], "k--", label="start, mean")
        axes.plot([], [], "o", color=color, label="trained, each head")
        axes.axhline(nominal, color="C3", linestyle=":", label="nominal")
        axes.set(xlabel="layer", title=f"${kind}_n$", xticks=list(layers), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="lower right")
    panels[0].set_ylabel("effective rank [dimensions]")


plot_ranks()

# %% [markdown]
# ## Which byte looks for which?
#
# In the first layer a token's state is its embedding, normed. `E W_n E^T` is then the score of every pair of bytes,
# before rope turns it by their distance: rows look, columns are looked at. The mean of a row is taken off, which
# softmax does not see.


# %%
def plot_pairs(scores, letters, heads):
    figure, panels = plt.subplots(1, len(heads), figsize=(6 * len(heads), 5.8), layout="constrained")
    limit = np.percentile(np.abs(scores), 99.5)
    for axes, head in zip(panels, heads, strict=True):
        image = axes.imshow(scores[head], cmap="RdBu", vmin=-limit, vmax=limit)
        axes.set_xticks(range(len(letters)), letters, fontsize=8, family="monospace")
        axes.set_yticks(range(len(letters)), letters, fontsize=8, family="monospace")
        axes.set(title=f"head {head}", xlabel="byte that is attended to")
    panels[0].set_ylabel("byte that attends")
    figure.colorbar(image, ax=panels, label="score before rope, less its row's mean", shrink=0.8)


letters = list(string.ascii_lowercase + "()[]:,.=_\"'#0") + ["␣", "⏎"]
ids = [ord({"␣": " ", "⏎": "\n"}.get(letter, letter)) for letter in letters]
embedded = np.asarray(trained.params["embed"], np.float64)[ids]
scale = np.asarray(trained.params["layers"]["attention_norm"]["scale"][0], np.float64)
embedded *= scale / np.sqrt(np.mean(embedded**2, axis=1, keepdims=True))
heads = range(2)
scores = np.asarray([embedded @ after[0].W(head) @ embedded.T * after[0].scale for head in heads])
plot_pairs(scores - scores.mean(axis=-1, keepdims=True), letters, heads)

# %% [markdown]
# MFA norms its query latent, which divides a token's scores by that latent's size: rows above are right up to a
# positive factor each.
#
# ## Where the heads attend
#
# The weights of some heads for a line of code, positions and norms included: each row sums to one.


# %%
def plot_maps(maps, text, layer):
    figure, panels = plt.subplots(2, 4, figsize=(14, 7.4), layout="constrained")
    for axes in panels.flat[len(maps):]:
        axes.set_axis_off()
    for head, axes in zip(range(len(maps)), panels.flat, strict=False):
        image = axes.imshow(maps[head], cmap="viridis", vmin=0, vmax=1)
        axes.set_title(f"layer {layer}, head {head}")
        axes.set_xticks(range(len(text)), text, fontsize=6, family="monospace")
        axes.set_yticks(range(len(text)), text, fontsize=6, family="monospace")
    figure.supxlabel("byte that is attended to")
    figure.supylabel("byte that attends")
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.7)


line = "for name in names: print(name)"
tokens = jnp.asarray([trained.tokenizer.encode(line)])
attended = [np.asarray(attention_maps(trained.model, trained.params, tokens, layer)[0]) for layer in layers]
plot_maps(attended[len(layers) // 2], line, len(layers) // 2)

# %% [markdown]
# How far back does each head look? The mean distance, over the queries of the second half of the line, and how sharply
# it chooses: the entropy of its weights. One point a head.


# %%
def plot_reach(attended):
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    positions = np.arange(attended[0].shape[-1])
    half = len(positions) // 2
    for layer, maps in enumerate(attended):
        distance = (maps * (positions[:, None] - positions)).sum(-1)[:, half:].mean(-1)
        entropy = -(maps * np.log2(np.maximum(maps, 1e-12))).sum(-1)[:, half:].mean(-1)
        axes.plot(distance, entropy, "o", label=f"layer {layer}", color=plt.cm.viridis(layer / len(attended)))
    axes.set(xlabel="mean distance [bytes]", ylabel="entropy of the weights [bits]", title=preset)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


plot_reach(attended)

# %% [markdown]
# Next: *4 How fast is decoding*. The functions used here are `mfa_jax.circuits` and `mfa_jax.attention_maps`.
