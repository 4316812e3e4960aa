"""Who may import whom, which part of Flax we stand on, and how long a file may be: read from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "mfa_jax").rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 300, 60

_VARIANT = {"config", "axes", "cache", "positions", "kernels", "layers", "attention.core", "attention.cached",
            "attention.encoding"}
_CORE = {"positions", "kernels", "attention.core", "attention.blockwise", "attention.library", "attention.context"}
_MODEL = {"attention", "config", "axes", "cache", "layers", "positions", "model"}
_USES_MODEL = _MODEL | {"capacity", "data", "kernels"}
# Room (a module or package of mfa_jax) -> the rooms it may import; a package's name stands for all that is in it.
# A module obeys its most specific row. A room may import its own submodules only where it lists itself.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    "config": {"config"},
    "axes": set(),
    "positions": set(),
    "words": set(),
    "kernels": {"kernels", "words"},
    "capacity": {"config"},
    "presets": {"config", "capacity"},
    "data": {"config", "data"},
    "cache": {"axes", "words"},
    "layers": {"axes"},
    "attention": {"attention", "config", "cache", "kernels"},
    "attention.core": _CORE,
    "attention.blockwise": _CORE,
    "attention.library": _CORE,
    "attention.context": _CORE,
    "attention.cached": _CORE | {"cache"},
    "attention.encoding": {"config", "positions"},
    "attention.gqa": _VARIANT,
    "attention.mla": _VARIANT,
    "attention.mfa": _VARIANT,
    "attention.mfa_kr": _VARIANT | {"attention.mfa"},
    "circuits": {"config", "positions", "layers"},
    "attention_maps": {"config", "layers", "attention.encoding", "model"},
    "model": _MODEL | {"kernels"},
    "train": _USES_MODEL | {"train"},
    "generate": _USES_MODEL | {"generate", "words"},
    "plan": _USES_MODEL | {"presets", "circuits", "train", "generate", "plan"},
    "evaluate": _USES_MODEL | {"train", "generate", "evaluate"},
    "convert": _USES_MODEL | {"presets", "circuits", "train", "generate", "convert"},
}
# Pure `init`/`apply` and little else, so that the framework could be changed in a day.
LINEN = {
    "Module", "compact", "nowrap", "setup", "initializers", "scan", "remat", "broadcast",
    "with_logical_partitioning", "LogicallyPartitioned", "unbox", "get_partition_spec", "logical_to_mesh_sharding",
    "PARTITION_NAME",
}


def module_name(path: Path) -> str:
    """Dotted name below `mfa_jax`; the package itself is the empty name."""
    parts = path.relative_to(ROOT / "mfa_jax").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything imported at any depth; `from a import b` gives `a.b`."""
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def offences(path: Path, source: str) -> list[str]:
    """What the imports of one source of the package break."""
    name = module_name(path)
    room = max((r for r in ALLOWED if within(name, r) or r == ""), key=len)
    if room == "" and name:
        return [f"{name}: no rule says what it may import; add a row to ALLOWED"]
    found = []
    for line, target in imported(ast.parse(source), path):
        top, _, ours = target.partition(".")
        if top in ("experiments", "tests", "notebooks"):
            found.append(f"{name}:{line} imports {target}: nothing imports {top}")
        if top == "mfa_jax":
            existing = _longest_module(ours)
            if not any(within(existing, allowed) for allowed in ALLOWED[room]):
                found.append(f"{name}:{line} imports {existing or 'mfa_jax'}; {room} may import "
                             f"{', '.join(sorted(ALLOWED[room])) or 'nothing of ours'}")
    return found


def _longest_module(dotted: str) -> str:
    """The part of `dotted` that is a module: `config.require` is the module `config`."""
    parts = dotted.split(".") if dotted else []
    while parts:
        base = ROOT.joinpath("mfa_jax", *parts)
        if base.is_dir() or base.with_suffix(".py").is_file():
            break
        parts.pop()
    return ".".join(parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_obey_the_table(path: Path) -> None:
    assert not offences(path, path.read_text())


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("attention/gqa.py", "from mfa_jax.attention import mla"),
        ("attention/gqa.py", "from mfa_jax.attention.mfa import MFA"),
        ("attention/gqa.py", "from .mfa import MFA"),
        ("attention/mfa.py", "from . import mfa_kr"),
        ("attention/core.py", "from mfa_jax.config import require"),
        ("attention/core.py", "from .. import cache"),
        ("config/model.py", "def f():\n    import mfa_jax.axes"),
        ("config/model.py", "from .. import axes"),
        ("kernels/reference.py", "from ..positions import rope"),
        ("data/pipeline.py", "from mfa_jax.train import step"),
        ("model/transformer.py", "import mfa_jax.train.loop as loop"),
        ("train/loop.py", "from mfa_jax import generate"),
        ("train/loop.py", "import experiments.cli"),
        ("generate/loop.py", "from tests.contract import make"),
        ("convert/hf.py", "import mfa_jax"),
        ("unheard_of.py", ""),
    ],
)
def test_the_table_refuses(name: str, source: str) -> None:
    assert len(offences(ROOT / "mfa_jax" / name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("attention/mfa_kr.py", "from .mfa import MFA\nfrom mfa_jax.layers import RMSNorm\nimport numpy"),
        ("model/transformer.py", "from mfa_jax.attention import build\nfrom . import layers"),
        ("convert/hf.py", "from mfa_jax.train.checkpoint import save\nfrom mfa_jax.config import ModelConfig"),
    ],
)
def test_the_table_allows(name: str, source: str) -> None:
    assert offences(ROOT / "mfa_jax" / name, source) == []


def linen_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of each use of `flax`: attributes of `linen`, and imports of anything else."""
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flax":
            for alias in node.names:
                if node.module == "flax" and alias.name == "linen":
                    aliases.add(alias.asname or alias.name)
                else:
                    yield node.lineno, alias.name if node.module == "flax.linen" else f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "flax.linen" and alias.asname:
                    aliases.add(alias.asname)
                elif alias.name.split(".")[0] == "flax":
                    yield node.lineno, f"import {alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            yield node.lineno, node.attr


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_flax_is_used_through_the_allowed_names_only(path: Path) -> None:
    assert [use for use in linen_names(ast.parse(path.read_text())) if use[1] not in LINEN] == []


def test_other_flax_names_are_found() -> None:
    source = "import flax\nfrom flax import linen as nn, nnx\nfrom flax.training import train_state\nnn.Dense(3)"
    assert {name for _, name in linen_names(ast.parse(source))} == {"import flax", "flax.nnx",
                                                                   "flax.training.train_state", "Dense"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= MAX_FILE, f"{path.name} has {lines} lines: do two ideas share a room?"
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno}
    assert {name: n for name, n in lengths.items() if n > MAX_FUNCTION} == {}


# Built from parts, so that this file does not hold what it looks for.
FORBIDDEN = re.compile("|".join(("py" + r"pi\.org", "python" + "hosted", "/" + "work/", "/" + r"tmp/[a-z]", "TO" + "DO",
                                 "FIX" + "ME", r"\bissue" + r" #?[0-9]+")))
TEXT = ("*.py", "*.md", "*.toml", "*.txt", "Makefile", ".ci/run")


def project_texts() -> list[Path]:
    folders = ("mfa_jax", "experiments", "tests", "notebooks")
    files = [f for folder in folders for pattern in TEXT for f in (ROOT / folder).rglob(pattern)]
    return sorted([*files, *(f for pattern in TEXT for f in ROOT.glob(pattern))])


def test_the_text_speaks_of_the_project_only() -> None:
    found = [f"{path.relative_to(ROOT)}:{number}: {line.strip()}" for path in project_texts()
             for number, line in enumerate(path.read_text().splitlines(), 1) if FORBIDDEN.search(line)]
    assert found == []
