"""Checkpoints written: the same bits come back, and what no public architecture computes is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from experiments import convert, export
from mfa_jax import axes
from mfa_jax.config import DType, GQAConfig, PositionConfig, to_dict
from mfa_jax.convert import checkpoint, load_pretrained, pretrained_tokenizer, save_pretrained, save_run
from mfa_jax.data import ByteTokenizer, load_tokenizer
from mfa_jax.train.run import load_trained
from tests.contract import ATTENTION, compiled, model_config
from tests.test_convert_checkpoint import make_tensors, write

GQA = model_config("gqa")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def equal_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert set(left) == set(right)
    for name in left:
        assert left[name].dtype == right[name].dtype and left[name].tobytes() == right[name].tobytes(), name


def test_a_trained_model_comes_back_bit_for_bit(data_dir: Path, tmp_path: Path) -> None:
    stories = data_dir / "models" / "stories260K"
    config, params = load_pretrained(stories)
    save_pretrained(tmp_path / "out", config, params, context_length=512,
                    tokenizer=pretrained_tokenizer(stories, "tok512.bin"))
    given = tensors_of(stories)
    given.pop("lm_head.weight", None)
    equal_bits(given, tensors_of(tmp_path / "out"))
    again, same = load_pretrained(tmp_path / "out")
    assert again == config
    chex.assert_trees_all_equal(same, params)
    assert pretrained_tokenizer(tmp_path / "out").encode("Once upon").tolist() == pretrained_tokenizer(
        stories, "tok512.bin").encode("Once upon").tolist()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["torch_dtype"]) == (1, [2, 1], "float32")


@pytest.mark.parametrize("mesh", [None, (2, 2, 1, 1, 2)])
def test_bfloat16_shards_from_a_mesh(tmp_path: Path, mesh: tuple[int, ...] | None) -> None:
    tensors = make_tensors()
    write(tmp_path, tensors)
    config, params = load_pretrained(tmp_path, param_dtype="bfloat16", mesh=mesh and axes.make_mesh(mesh))
    save_pretrained(tmp_path / "out", config, params, context_length=256, shard_bytes=3000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) > 4 and f"model-00002-of-{len(files) - 2:05}.safetensors" in files
    assert all(path.stat().st_size < 3000 + 2000 for path in (tmp_path / "out").glob("*.safetensors"))
    equal_bits(tensors, tensors_of(tmp_path / "out"))
    chex.assert_trees_all_equal(load_pretrained(tmp_path / "out", param_dtype="bfloat16")[1],
                                jax.device_get(params))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("attention", "model_type"), [
    (ATTENTION["gqa"], "llama"), (ATTENTION["gqa"], "mistral"), (ATTENTION["mha"], "llama"),
    (dataclasses.replace(ATTENTION["gqa"], num_heads=10), "mistral"),
    (dataclasses.replace(ATTENTION["gqa"], qkv_bias=True), "qwen2"),
    (dataclasses.replace(ATTENTION["gqa"], qk_norm=True, norm_eps=1e-5), "qwen3")])
def test_our_models_come_back(tmp_path: Path, attention: GQAConfig, model_type: str, tied: bool) -> None:
    c = compiled(model_config("gqa", attention=attention, tie_embeddings=tied))
    asked = "mistral" if model_type == "mistral" and attention.num_heads == 4 else None
    save_pretrained(tmp_path / "out", c.config, c.params, context_length=64, model_type=asked)
    config, params = load_pretrained(tmp_path / "out")
    assert {**to_dict(config), "depth_scaled_init": True} == to_dict(c.config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    chex.assert_trees_all_equal(params, c.params)


def test_tokenizers_come_along(tmp_path: Path) -> None:
    """A tokenizer.json keeps its bytes; bytes are written as one, too, with the same ids."""
    c = compiled(dataclasses.replace(GQA, vocab_size=264))
    save_pretrained(tmp_path / "bytes", c.config, c.params, context_length=64, tokenizer=ByteTokenizer())
    text = "naïve\n\t<|endoftext|> 🙂\x00"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "bytes" / "tokenizer.json"))
    assert theirs.encode("naïve\n\t 🙂\x00").ids == ByteTokenizer().encode("naïve\n\t 🙂\x00").tolist()
    assert theirs.encode(text).ids.count(256) == 1, "the end of a document"
    assert isinstance(pretrained_tokenizer(tmp_path / "bytes"), ByteTokenizer)

    named = tmp_path / "named"
    named.mkdir()
    (named / "tokenizer.json").write_bytes((tmp_path / "bytes" / "tokenizer.json").read_bytes())
    (named / "tokenizer_config.json").write_text(json.dumps(
        {"eos_token": {"content": "<|endoftext|>"}, "pad_token": "<|startoftext|>"}))
    (named / "chat_template.jinja").write_text("{{ messages }}")
    save_pretrained(tmp_path / "bpe", c.config, c.params, context_length=64, tokenizer=load_tokenizer(named))
    assert (tmp_path / "bpe" / "tokenizer.json").read_bytes() == (named / "tokenizer.json").read_bytes()
    written = json.loads((tmp_path / "bpe" / "tokenizer_config.json").read_text())
    assert (written["eos_token"], written["chat_template"]) == ("<|endoftext|>", "{{ messages }}")
    assert written["pad_token"] == "<|startoftext|>"
    assert vars(load_tokenizer(tmp_path / "bpe"))["chat_template"] == "{{ messages }}"
    assert load_tokenizer(tmp_path / "bpe").fingerprint == load_tokenizer(named).fingerprint

    # Behind the begin token where the model was trained so, and not twice where the tokenizer says so already.
    read = load_tokenizer(named)
    for i, (tokenizer, template) in enumerate([(ByteTokenizer(), False), (read, False), (read, True)]):
        out = tmp_path / f"begun{i}"
        if template:
            tokenizer = load_tokenizer(tmp_path / "begun1")
        save_pretrained(out, c.config, c.params, context_length=64, tokenizer=tokenizer, add_bos_token=True)
        begun = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
        assert begun.encode("naïve").ids == [257, *"naïve".encode()]
        assert begun.encode("naïve", add_special_tokens=False).ids == list("naïve".encode())
        assert load_tokenizer(out).encode("naïve").tolist() == list("naïve".encode())
    once, again = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("begun1", "begun2"))
    assert once == again

    (tmp_path / "bpe" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|startoftext|>"}))
    assert load_tokenizer(tmp_path / "bpe").eos_id == 257, "its files are all that there is: what they say is meant"


def test_without_a_tokenizer_no_token_is_said_to_end_a_text(tmp_path: Path) -> None:
    """Left out, transformers takes those of the first Llama."""
    save_pretrained(tmp_path / "out", GQA, compiled(GQA).params, context_length=64)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"]) == (None, None)


def test_numbers_too_large_for_the_stored_type_are_refused(tmp_path: Path) -> None:
    params = compiled(GQA).params
    params = {**params, "embed": params["embed"].at[0, 0].set(1e5)}
    with pytest.raises(ValueError, match=r"dtype='float16': model.embed_tokens.weight has 1 numbers too large.*100000"):
        save_pretrained(tmp_path / "out", GQA, params, context_length=64, dtype="float16")
    assert not (tmp_path / "out").exists()
    save_pretrained(tmp_path / "out", GQA, params, context_length=64, dtype="bfloat16")


@pytest.mark.parametrize(("change", "options", "error", "message"), [
    ({"attention": ATTENTION["mla"]}, {}, NotImplementedError, "attention=mla.*decode it with this library"),
    ({"attention": ATTENTION["mfa_kr"]}, {}, NotImplementedError, "attention=mfa_kr.*expand_key_reuse"),
    ({"position": PositionConfig(kind="alibi")}, {}, NotImplementedError, "position='alibi'.*trained with rope"),
    ({"position": PositionConfig(kind="none")}, {}, NotImplementedError, "position='none'"),
    ({"inv_freq": ((1.0,) * 4,) * 2}, {}, NotImplementedError, "inv_freq: a config.json has one base"),
    ({"attention": dataclasses.replace(ATTENTION["gqa"], qk_norm=True)}, {}, NotImplementedError, "attention.norm_eps"),
    ({"attention": ATTENTION["gqa_bias_norm"]}, {}, NotImplementedError, "qkv_bias=True: Qwen3ForCausalLM"),
    ({}, {"model_type": "qwen3"}, NotImplementedError, "qk_norm=False: Qwen3ForCausalLM"),
    ({"attention": dataclasses.replace(ATTENTION["gqa"], num_heads=10)}, {"model_type": "llama"}, NotImplementedError,
     "num_heads=10: LlamaForCausalLM has heads that divide model_dim=24; model_type='mistral'"),
    ({}, {"model_type": "gpt2"}, ValueError, "model_type='gpt2': must be one of llama"),
    ({}, {"model_type": "step3_text"}, ValueError, "attention='gqa': must be mfa"),
    ({}, {"dtype": "int8"}, ValueError, "dtype='int8'"),
    ({}, {"context_length": 0}, ValueError, "context_length=0"),
    ({}, {"tokenizer": ByteTokenizer()}, ValueError, "tokenizer.vocab_size=264: must be at most .*vocab_size=32"),
    ({"num_layers": 3}, {}, ValueError, r"params .*=\(2, .* asks for shape \(3, "),
    ({"tie_embeddings": False}, {}, ValueError, "params='unembed': must be the stacked parameters"),
])
def test_what_is_refused(
    tmp_path: Path, change: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    config, params = dataclasses.replace(GQA, **change), compiled(GQA).params
    with pytest.raises(error, match=message):
        save_pretrained(tmp_path / "out", config, params, **{"context_length": 64, **options})
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    c = compiled(GQA)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(ValueError, match="must not exist yet, or be empty"):
        save_pretrained(tmp_path / "taken", c.config, c.params, context_length=64)

    def full(*args: Any) -> None:
        (args[0] / "model.safetensors").touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained(tmp_path / "out", c.config, c.params, context_length=64)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_the_folder_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    c = compiled(model_config("gqa", vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer())
    with pytest.raises(ValueError, match="checkpoint='.*run': is the folder of a run; experiments.export makes a ch"):
        convert.main(convert.ConvertConfig(str(tmp_path / "run"), str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_conversion_tells_its_parameters(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: DType
) -> None:
    """MFA has more of them than what it is made from: Q = D, and projections of packed heads."""
    convert.main(convert.ConvertConfig(str(data_dir / "models" / "stories260K"), str(tmp_path / "out"), to="mfa",
                                       tokenizer="tok512.bin", param_dtype=dtype))
    told = json.loads(capsys.readouterr().out)
    trained = load_trained(tmp_path / "out")
    sizes = [leaf.size for leaf in jax.tree.leaves(trained.params)]
    assert told["parameters"] == [260_032, sum(sizes)] and sum(sizes) > 260_032
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(trained.params)} == {dtype}


def test_export_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    c = compiled(model_config("mfa", vocab_size=264))
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer())
    export.main(export.ExportConfig(str(tmp_path / "run"), str(tmp_path / "out"), context_length=64, dtype="float32"))
    assert "step 0" in capsys.readouterr().out
    config, params = load_pretrained(tmp_path / "out")
    assert config.attention == c.config.attention
    chex.assert_trees_all_equal(params["layers"], c.params["layers"])
