"""The tokenizer of a checkpoint, in and out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mfa_jax.config import require
from mfa_jax.convert.gguf_tokenizer import read_tokenizer
from mfa_jax.data import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer
from mfa_jax.data.tokenizer_files import SAVED
from mfa_jax.train.run import CHECKPOINTS

_END, _BEGIN = "<|endoftext|>", "<|startoftext|>"


def pretrained_tokenizer(path: str | Path, name: str | None = None) -> Tokenizer:
    """The tokenizer that lies in a checkpoint: in its folder, or inside a `.gguf` file or beside it.

    Args:
      name: a file of the folder (`tokenizer.json`, a sentencepiece table `*.bin`), for a `.gguf` file of the folder
        that it lies in, or the path of one; None for what the folder or the file holds.

    Raises:
      ValueError: there is none, or it cannot be read.
      NotImplementedError: a kind of tokenizer in a `.gguf` file that cannot be rebuilt.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        return read_tokenizer(path) if name is None else load_tokenizer(path.parent / name)
    require(path.is_dir(), "checkpoint", str(path), "no such folder or .gguf file")
    held = sorted(file.name for file in path.iterdir())
    require(CHECKPOINTS not in held, "checkpoint", str(path), "is the folder of a run; experiments.export makes a "
            "checkpoint of one")
    require(name is not None or SAVED in held or HuggingFaceTokenizer.FILE in held, "tokenizer", None,
            f"{path} holds no {HuggingFaceTokenizer.FILE}; name the tokenizer among its files (--tokenizer; in healing "
            f"--distillation.tokenizer): "
            f"{', '.join(held) or 'none'}")
    return load_tokenizer(path if name is None else path / name)


def save_tokenizer(
    folder: Path, tokenizer: Tokenizer, context_length: int, *, add_bos_token: bool = False
) -> dict[str, Any]:
    """Writes what `load_tokenizer` needs and, but for a sentencepiece table, what engines read.

    Args:
      add_bos_token: have engines begin a text with the begin token, where the tokenizer does not say so already.

    Returns:
      the special tokens, as a `config.json` names them.

    Raises:
      ValueError: no begin token where one is asked for.
    """
    require(not add_bos_token or tokenizer.bos_id is not None, "add_bos_token", add_bos_token,
            "the tokenizer has no begin token")
    given: dict[str, str | None] = {}
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer.save(folder)
    if isinstance(tokenizer, ByteTokenizer):
        content = _bytes_as_bpe().to_str(pretty=True).encode()
        (folder / HuggingFaceTokenizer.FILE).write_bytes(_beginning(content, _BEGIN) if add_bos_token else content)
        given = {"eos_token": _END, "bos_token": _BEGIN}
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        # By the files that everyone reads, and no other: what is changed in them is meant.
        begins = tokenizer.bos_token if add_bos_token else None
        (folder / HuggingFaceTokenizer.FILE).write_bytes(
            tokenizer.content if begins is None else _beginning(tokenizer.content, begins))
        given = {"eos_token": tokenizer.eos_token, "bos_token": tokenizer.bos_token,
                 "pad_token": tokenizer.pad_token, "chat_template": tokenizer.chat_template}
    if given:
        named = {key: value for key, value in given.items() if value is not None}
        (folder / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context_length, **named}, indent=2))
    ends = list(tokenizer.stop_ids)
    return {"eos_token_id": ends if len(ends) > 1 else ends[0], "bos_token_id": tokenizer.bos_id}


def _beginning(content: bytes, begin: str) -> bytes:
    """A `tokenizer.json` that puts the begin token before a text; as it is where it does so already."""
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    token = (begin, tokenizer.token_to_id(begin))
    if tokenizer.encode("a").ids[:1] == [token[1]]:
        return content
    put = processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[token])
    others = tokenizer.post_processor
    tokenizer.post_processor = put if others is None else processors.Sequence([others, put])
    return tokenizer.to_str(pretty=True).encode()


def _bytes_as_bpe() -> tokenizers.Tokenizer:
    """`ByteTokenizer` as byte-level BPE without merges: the same ids."""
    # Byte-level BPE spells a byte as itself where that is printable in Latin-1, and the rest, in order, from 256 on.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    rest = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(rest)): byte for byte in range(256)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END, _BEGIN])
    assert [tokenizer.token_to_id(token) for token in (_END, _BEGIN)] == [ByteTokenizer.eos_id, ByteTokenizer.bos_id]
    return tokenizer
