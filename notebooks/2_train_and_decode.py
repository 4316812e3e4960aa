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
# # Train and decode
#
# The whole loop in ten cells: a small MFA language model is trained on the source of Python's standard library, read
# back from its checkpoint, and decoded through its cache. Nothing is downloaded beside the packages.
#
# It runs in a few minutes on two CPU cores. On a GPU or TPU it takes a larger model by itself (`experiments.notebook`);
# set the environment variable `MFA_JAX_NOTEBOOK_SIZE` to `tiny`, `cpu` or `accelerator` to choose. On Colab, `SOURCE`
# below says where the repository is.

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
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.notebook import pick, size
from mfa_jax import kernels
from mfa_jax.attention import decode_call
from mfa_jax.capacity import cache_bytes_per_token, model_parameters
from mfa_jax.config import DataConfig, OptimizerConfig, TrainConfig
from mfa_jax.generate import SamplingConfig, complete, encode_prompts, generate, stream_text
from mfa_jax.model.transformer import init_cache
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train
from mfa_jax.train.run import load_trained

plt.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, size {size()}")

# %% [markdown]
# **The run** is one frozen config. Try another variant: `nano-mfa-kr`, `nano-mla`, `nano-mha`. The folder is a fresh
# one each time this cell runs; with a fixed one, a run that was stopped goes on where it was.

# %%
preset = pick(tiny="tiny-mfa", cpu="nano-mfa", accelerator="small-mfa")
config = TrainConfig(
    workdir=tempfile.mkdtemp(prefix="mfa-"),
    preset=preset,
    model=model_preset(preset),
    data=DataConfig(source="stdlib", sequence_length=pick(tiny=64, cpu=128, accelerator=512),
                    batch_size=pick(tiny=8, cpu=16, accelerator=16)),
    optimizer=OptimizerConfig(kind="muon", learning_rate=1.5e-2, warmup_steps=pick(tiny=4, cpu=20, accelerator=30)),
    steps=pick(tiny=12, cpu=300, accelerator=400),
    log_every=pick(tiny=4, cpu=20, accelerator=20),
    eval_every=pick(tiny=6, cpu=100, accelerator=100),
)
print(config.model.attention)
print(f"{model_parameters(config.model).total:,} parameters")

# %% [markdown]
# **Train.** Documents are held out by a hash of their text; the loss on them is printed as `eval`.

# %%
result = train(config)


# %%
def plot_loss(lines):
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    batches = [(line["step"], line["bits_per_byte"]) for line in lines if "bits_per_byte" in line]
    held_out = [(line["step"], line["eval_bits_per_byte"]) for line in lines if "eval_bits_per_byte" in line]
    axes.plot(*zip(*batches, strict=True), ".-", label="training batches", color="C0")
    axes.plot(*zip(*held_out, strict=True), "o", label="held-out documents", color="C1", markersize=7)
    axes.set(xlabel="step", ylabel="loss [bits per byte]", ylim=(0, None), title=preset)
    axes.legend()


plot_loss([json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()])

# %% [markdown]
# **Read it back.** What decodes is what was saved: the newest intact checkpoint of the folder.

# %%
trained = load_trained(config.workdir)
sampling = SamplingConfig(temperature=0.8, top_p=0.95, vocab_limit=trained.tokenizer.vocab_size)
print(f"step {trained.step}, parameters in {sorted(trained.params)}")

# %% [markdown]
# **Decode a batch.** Prompts of different lengths share a batch and one compiled call.

# %%
prompts = ["def ", "class ", "import ", "    for "]
texts = complete(trained.model, trained.params, trained.tokenizer, prompts, sampling, jax.random.key(0),
                 max_new_tokens=pick(tiny=16, cpu=160, accelerator=256))
for prompt, text in zip(prompts, texts, strict=True):
    print(prompt + text, end="\n" + 60 * "-" + "\n")

# %% [markdown]
# **Or as it comes.**

# %%
for piece in stream_text(trained.model, trained.params, trained.tokenizer, "def main(", sampling, jax.random.key(1),
                         max_new_tokens=pick(tiny=16, cpu=120, accelerator=200)):
    print(piece, end="")

# %% [markdown]
# **What the cache holds**, and what attends to it: bytes as allocated and in closed form, the same model with MHA
# beside it, and the backend that `auto` takes on this device.

# %%
for name in (preset, preset.replace("mfa", "mha")):
    model = model_preset(name)
    cache = init_cache(model, batch=4, capacity=256)
    promised = cache_bytes_per_token(model.attention, model.num_layers, model.dtype)
    call = decode_call(model.attention, model.position, capacity=256, dtype=model.dtype, cache_dtype=model.dtype)
    print(f"{name}: {cache.nbytes / (4 * 256):,.0f} bytes a token, in closed form {promised:,}; "
          f"decoded by {kernels.resolve('auto', call, kernels.default_device())}")

# %% [markdown]
# **Is the cache exact?** `generate` notes how likely the model held each token that it chose, reading its cache. A
# forward pass over the whole text, without any cache, must say the same.


# %%
def plot_surprise(cached, full):
    figure, axes = plt.subplots(figsize=(9, 3.5), layout="constrained")
    axes.plot(cached, "o", markersize=4, label="decoding, through the cache", color="C2")
    axes.plot(full, linewidth=1, label="one forward pass, without a cache", color="k")
    axes.set(xlabel="generated byte", ylabel="surprise, $-\\log_2 p$ [bits]", ylim=(0, 1.3 * full.max()),
             title=f"largest difference {np.abs(cached - full).max():.1e} bits")
    axes.legend(loc="upper right", ncols=2)


tokens, lengths = encode_prompts(trained.tokenizer, ["class "])
out = generate(trained.model, trained.params, tokens, lengths, sampling, jax.random.key(2),
               max_new_tokens=pick(tiny=16, cpu=96, accelerator=96))
whole = np.concatenate([tokens[0], np.asarray(out.tokens[0])])
logits, _ = trained.model.apply({"params": trained.params}, whole[None, :-1])
chosen = jax.nn.log_softmax(logits[0, :, : sampling.vocab_limit])[jnp.arange(len(whole) - 1), whole[1:]]
plot_surprise(-np.asarray(out.logprobs[0]) / np.log(2), -np.asarray(chosen[lengths[0] - 1:]) / np.log(2))

# %% [markdown]
# Next: *3 Inside the circuits*. The same on the command line: `python -m experiments.train --help`,
# `python -m experiments.decode --help`.
