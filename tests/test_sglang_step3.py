"""The plugin for SGLang, as far as it goes without SGLang: how it is found, what it asks for, what it leaves alone."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import types

import pytest

from experiments import sglang_step3


class Configs:
    """`transformers.AutoConfig`, of which one method is called."""

    def __init__(self) -> None:
        self.registered: dict[str, type] = {}

    def register(self, model_type: str, config: type, *, exist_ok: bool = False) -> None:
        assert exist_ok or model_type not in self.registered
        self.registered[model_type] = config


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch) -> Configs:
    found = Configs()
    config = type("Step3TextConfig", (), {"model_type": "step3_text"})
    for name, attributes in (("sglang", {}), ("sglang.srt", {}), ("sglang.srt.configs", {"Step3TextConfig": config}),
                             ("transformers", {"AutoConfig": found})):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv(sglang_step3.PACKAGES, "")  # so that what is set from here on does not outlive the test
    del os.environ[sglang_step3.PACKAGES]
    return found


def test_sglang_finds_it_and_it_brings_neither_jax_nor_torch() -> None:
    (found,) = importlib.metadata.entry_points(group="sglang.srt.plugins", name="step3_text")
    assert found.load() is sglang_step3.register
    program = f"import sys, {found.module}; print(*sorted({{'jax', 'flax', 'torch', 'sglang'}} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_it_registers_the_config_and_the_package(configs: Configs) -> None:
    sglang_step3.register()
    sglang_step3.register()  # once in each process, and in some twice
    assert list(configs.registered) == ["step3_text"]
    assert os.environ[sglang_step3.PACKAGES] == "experiments.sglang_step3"


def test_another_package_of_models_is_left_alone_with_a_word(
    configs: Configs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(sglang_step3.PACKAGES, "theirs")
    with caplog.at_level(logging.WARNING):
        sglang_step3.register()
    assert os.environ[sglang_step3.PACKAGES] == "theirs"
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE=theirs" in caplog.text and "experiments.sglang_step3.model" in caplog.text
