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
# # Bring your own text
#
# Point `TEXT` at a file or a folder: text or JSONL (`data.text_field` names the field), plain or gz, bz2, xz, zst; a
# NUL character separates documents in a file. On Colab, upload a file or mount a drive first; `SOURCE` below says where
# the repository is.
#
# Without a text of your own, the reference manual that comes with Python is taken.
#
# It runs in a few minutes on two CPU cores; on a GPU or TPU it takes a larger model by itself
# (`MFA_JAX_NOTEBOOK_SIZE` chooses).

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
import bz2
import dataclasses
import json
import lzma
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import jax
import matplotlib.pyplot as plt
import numpy as np
from tokenizers import ByteLevelBPETokenizer

from experiments.notebook import pick, size
from mfa_jax.config import DataConfig, OptimizerConfig, TrainConfig
from mfa_jax.data import documents, load_tokenizer, open_prepared
from mfa_jax.generate import SamplingConfig, complete
from mfa_jax.model.transformer import init_cache
from mfa_jax.presets import model_preset
from mfa_jax.train.loop import train
from mfa_jax.train.run import load_trained

plt.rcParams.update({"figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True})
folder = Path(tempfile.mkdtemp(prefix="mfa-"))
print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}, size {size()}")

# %%
TEXT = ""  # your file or folder

if not TEXT:
    TEXT = str(folder / "manual")
    Path(TEXT).mkdir(exist_ok=True)
    for name, text in topics.items():
        (Path(TEXT) / f"{name}.txt").write_text(text, encoding="utf-8")

# %% [markdown]
# ## What was read
#
# Look before you train: how many documents, how long, and what they look like.


# %%
def plot_lengths(lengths):
    figure, axes = plt.subplots(figsize=(7.5, 3.5), layout="constrained")
    axes.hist(lengths, bins=np.geomspace(max(1, min(lengths)), max(lengths) + 1, 30), color="C0")
    axes.set_xscale("log", base=10)
    axes.set(xlabel="length of a document [bytes]", ylabel="documents",
             title=f"{len(lengths):,} documents, {sum(lengths) / 1e6:.2f} MB")


found = list(documents(TEXT))
plot_lengths([len(document.text.encode()) for document in found])
print(found[0].name.rsplit("/")[-1], "\n", found[0].text[:400])

# %% [markdown]
# ## Two tokenizers
#
# Bytes need nothing. A tokenizer made for the text reads more of it in as many tokens; any `tokenizer.json` will do,
# and here one is made. It has seen all documents, the held-out ones too: for a result to report, make it without them.

# %%
bpe = ByteLevelBPETokenizer()
bpe.train_from_iterator((document.text for document in found), vocab_size=pick(tiny=300, cpu=1024, accelerator=4096),
                        special_tokens=["<|endoftext|>"], show_progress=False)
bpe.save(str(folder / "tokenizer.json"))
names = {"bytes": "bytes", "bpe": str(folder / "tokenizer.json")}
sample = found[0].text[:200]
for name, path in names.items():
    tokenizer = load_tokenizer(path)
    print(f"{name}: vocabulary {tokenizer.vocab_size}, {len(tokenizer.encode(sample))} tokens of {len(sample)} letters")

# %% [markdown]
# ## Train
#
# The same model, steps and tokens for both. Interrupting the cell saves what is done, and running it again goes on from
# there; a kernel that is stopped loses what came after the last save. More steps, and a name of your own for `workdir`,
# which here is a fresh folder of every start, make a run worth keeping.

# %%
preset = pick(tiny="tiny-mfa", cpu="nano-mfa", accelerator="small-mfa")
configs = {
    name: TrainConfig(
        workdir=str(folder / name),
        model=dataclasses.replace(model_preset(preset), vocab_size=load_tokenizer(path).vocab_size),
        data=DataConfig(source=TEXT, tokenizer=path, held_out=0.1,
                        sequence_length=pick(tiny=64, cpu=128, accelerator=512),
                        batch_size=pick(tiny=8, cpu=16, accelerator=16)),
        optimizer=OptimizerConfig(kind="muon", learning_rate=1.5e-2, warmup_steps=pick(tiny=2, cpu=20, accelerator=20)),
        steps=pick(tiny=6, cpu=160, accelerator=200), log_every=pick(tiny=3, cpu=20, accelerator=20),
        eval_every=pick(tiny=3, cpu=20, accelerator=20), save_every=50,
    )
    for name, path in names.items()
}
for name, config in configs.items():
    print(f"---- {name}")
    if train(config).interrupted:
        raise KeyboardInterrupt("run this cell again to go on")

# %% [markdown]
# ## How well does it read?
#
# Bits for each byte of held-out documents: the fewer, the better the text was foreseen. Counted in bytes, the two
# tokenizers can be compared. The dashed lines are what two compressors need for the held-out documents alone; they have
# seen no other text, so that they are a scale and not a rival.


# %%
def plot_bits_per_byte(curves, compressors):
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for name, lines in curves.items():
        axes.plot([line["step"] for line in lines], [line["eval_bits_per_byte"] for line in lines], "o-", markersize=4,
                  label=name)
    for style, (name, bits) in zip(("--", ":"), compressors.items(), strict=True):
        axes.axhline(bits, color="k", linewidth=1, linestyle=style, label=name)
    axes.set(xlabel="step", ylabel="held-out documents [bits per byte]", ylim=(0, None), title=preset)
    axes.legend()


curves = {}
for name, config in configs.items():
    metrics = [json.loads(line) for line in (Path(config.workdir) / "metrics.jsonl").read_text().splitlines()]
    curves[name] = [line for line in metrics if "eval_bits_per_byte" in line]
prepared = open_prepared(folder / "bytes" / "data")
ids = prepared.tokens("held_out")
held_out = bytes(ids[ids < 256].tolist())
plot_bits_per_byte(curves, {compressor.__name__: 8 * len(compressor.compress(held_out)) / len(held_out)
                            for compressor in (bz2, lzma)})
for split in ("train", "held_out"):
    print(f"{split}: {prepared.size(split).documents} documents, {prepared.size(split).text_bytes:,} bytes")

# %% [markdown]
# ## What does it write?
#
# The beginning of a held-out document, and how each model goes on. Models of this size and so few steps get the shapes
# of words and lines; sense takes more of everything.

# %%
beginning = held_out[:120].decode(errors="ignore")
print(beginning, end="\n" + 80 * "=" + "\n")
for name, config in configs.items():
    trained = load_trained(config.workdir)
    sampling = SamplingConfig(temperature=0.7, top_p=0.95, vocab_limit=trained.tokenizer.vocab_size)
    text, = complete(trained.model, trained.params, trained.tokenizer, [beginning], sampling, jax.random.key(0),
                     max_new_tokens=pick(tiny=8, cpu=120, accelerator=200))
    cached = init_cache(config.model, batch=1, capacity=256).nbytes / 256
    print(f"[{name}, {cached:,.0f} cached bytes a token]\n{text}", end="\n" + 80 * "-" + "\n")

# %% [markdown]
# ## Further
#
# The folder of a run is all there is to it: `python -m experiments.train --config WORKDIR/config.json --steps 5000`
# goes on, `python -m experiments.decode --workdir WORKDIR --prompt ...` decodes, `python -m experiments.export` makes a
# Hugging Face checkpoint of it. Other variants are other presets (`nano-mfa-kr`, `nano-mla`, `nano-mha`).
