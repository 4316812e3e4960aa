"""What the pages tell a reader to type must be what `experiments.train` and `experiments.plan` take."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from experiments import cli, plan
from mfa_jax.config import TrainConfig
from mfa_jax.plan import chips
from mfa_jax.presets import model_preset

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "experiments").rglob("*.md"))]
COMMAND = re.compile(r"experiments\.(train|plan)\b((?:[ \t]+(?:\\\n[ \t]*)?[^\s`;|&>\"]+)*)")


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, script and words of each command with flags; what follows a comment or is left out (`...`) is not one."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|yaml)\n(.*?)```", page.read_text(), re.DOTALL):
            # A folded block of YAML is one line.
            text = re.sub(r"\n +(?=--)", " ", block) if "apiVersion" in block else block
            for name, rest in COMMAND.findall(text):
                words = shlex.split(rest.replace("\\\n", " "), comments=True)
                if words and "..." not in words and words != ["--help"]:
                    found.append((f"{page.relative_to(ROOT)}: {name} {' '.join(words[:4])}", name, words))
    return found


@pytest.mark.parametrize(("name", "words"), [
    pytest.param(name, words, id=label) for label, name, words in commands()])
def test_a_command_of_a_page_is_one_that_the_script_takes(name: str, words: list[str]) -> None:
    if name == "train":
        config: Any = cli.parse(TrainConfig, words, presets=model_preset)
        split = config.mesh.data * config.mesh.fsdp * config.mesh.expert
        assert config.data.batch_size // config.accumulate % abs(split) == 0, "rows must divide over the mesh"
        if config.preset is not None and not config.preset.startswith("tiny"):
            assert config.data.source != "stdlib", "a model of this size needs a text of its own"
    else:
        arguments = cli.parse(plan.Arguments, words)
        sizes = dataclasses.astuple(plan.mesh_config(arguments.mesh))
        assert chips.parse_topology(arguments.topology).size % abs(math.prod(sizes)) == 0, "chips of the slice"


def test_the_pages_have_commands() -> None:
    pages = {label.partition(":")[0] for label, _, _ in commands()}
    assert {"README.md", "experiments/training_on_pods.md"} <= pages and len(commands()) >= 12
