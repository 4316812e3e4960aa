"""Eight virtual CPU devices, shapes checked on every call, and where external data lies."""

from __future__ import annotations

import gc
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

# The suite is about CPU results; JAX_PLATFORMS=cuda (or tpu) in the environment runs it elsewhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time goes into compiling small programs that run once: LLVM does not optimise them, and where JAX
# still has the older emitters of fusions, those are used, which take a quarter of the time of the MLIR ones.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jax").startswith("0.10.") else ""))

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parent.parent
# Real checkpoints and text may lie beside the repository.
os.environ.setdefault("MFA_JAX_DATA", str(ROOT.parent / "shared" / "data"))

# Every function of the package checks its shape annotations, also in modules that tests import later.
install_import_hook("mfa_jax", "shapecheck.typechecked")

# The same examples in every run, and no deadline: the first example of a test pays for compilation.
settings.register_profile("project", deadline=None, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True, scope="module")
def keeps_few_programs() -> Iterator[None]:
    """Each compiled program takes some ten mappings of memory. Where a process has as many as the system lets it have
    (`vm.max_map_count`), XLA dies of the next one: a worker of this suite, after some 1300 tests."""
    yield
    limit, mapped = Path("/proc/sys/vm/max_map_count"), Path("/proc/self/maps")
    if limit.exists() and mapped.read_bytes().count(b"\n") > int(limit.read_text()) / 2:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def compiles_for_itself() -> Iterator[None]:
    """A test that keeps compiled programs (`experiments.conversion` does) keeps none of the tests after it: XLA's CPU
    client has died of writing one of theirs."""
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    if jax.config.values["jax_compilation_cache_dir"] != before:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of external data (real checkpoints, text); tests that need it are skipped without it."""
    path = Path(os.environ["MFA_JAX_DATA"])
    if not path.is_dir():
        pytest.skip(f"no external data at {path}; MFA_JAX_DATA names the folder")
    return path
