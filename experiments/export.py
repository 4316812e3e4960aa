"""A trained model as the checkpoint that engines serve: `config.json`, safetensors, tokenizer.

    python -m experiments.export --workdir runs/tiny --out exported --context-length 4096

MFA becomes `Step3TextForCausalLM`, which vLLM serves; GQA becomes Llama, Mistral, Qwen2 or Qwen3. What no such
architecture computes is refused, and the message says what could be done. `experiments/serving.md` has the engines'
commands, and `experiments.check_serving` compares what they answer.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from experiments import cli
from mfa_jax.convert import save_pretrained
from mfa_jax.train.run import load_trained


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What is written, and how."""

    workdir: str
    """Folder of the run."""
    out: str
    """Folder that is written; must not exist yet, or be empty."""
    context_length: int
    """Tokens that the engine may serve."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """What the tensors are stored as."""
    model_type: str | None = None
    """Of config.json; none for what the model is."""
    step: int | None = None
    """Checkpoint to read; none for the newest intact one."""
    ema: bool = False
    """Read the moving average of the weights."""


def main(config: ExportConfig) -> None:
    trained = load_trained(config.workdir, step=config.step, ema=config.ema)
    save_pretrained(config.out, trained.model.config, trained.params, context_length=config.context_length,
                    tokenizer=trained.tokenizer, add_bos_token=trained.config.data.add_bos_token,
                    model_type=config.model_type, dtype=config.dtype)
    print(f"step {trained.step} of {config.workdir}: written to {config.out}")


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(ExportConfig)))
