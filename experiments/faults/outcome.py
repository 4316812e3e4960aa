"""What is counted, how often a fault was tried, survived, lost; and the record of it."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mfa_jax.config import require


@dataclasses.dataclass
class Outcome:
    """The counts of one fault."""

    fault: str
    tried: int = 0
    survived: int = 0
    lost: list[str] = dataclasses.field(default_factory=list)
    """What was lost, a line for each try."""
    skipped: str | None = None
    """Why it could not be tried on this machine."""
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, lost: str | None) -> None:
        """Counts one try; `lost` says what went wrong, None that nothing did."""
        self.tried += 1
        if lost is None:
            self.survived += 1
        else:
            self.lost.append(lost)


@dataclasses.dataclass(frozen=True)
class Signals:
    """How often, and where the counts go; the scripts say to whom."""

    kills: int
    """SIGKILLs."""
    terminations: int
    """SIGTERMs."""
    seed: int = 0
    """Of the moments."""
    output: str | None = None
    """Folder of the JSON file; none prints only."""

    def __post_init__(self) -> None:
        for name in ("kills", "terminations"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must not be negative")


def measure(name: str, config: Signals, parts: Mapping[str, Callable[[], Iterable[Outcome]]]) -> None:
    """Measures each part, and writes `<output>/<name>.json` after each that is complete, beside the others in it.

    Raises:
      ArithmeticError: something was lost.
    """
    path = None if config.output is None else Path(config.output, f"{name}.json")
    records: dict[str, Any] = json.loads(path.read_text()) if path is not None and path.exists() else {}
    all_found: list[Outcome] = []
    for part, outcomes in parts.items():
        print(f"{part} ...", file=sys.stderr)
        began, found = time.monotonic(), list(outcomes())
        records[part] = {
            "date": datetime.date.today().isoformat(), "jax": jax.__version__, "python": platform.python_version(),
            "cpus": os.cpu_count(), "seed": config.seed, "seconds": round(time.monotonic() - began),
            "outcomes": [dataclasses.asdict(outcome) for outcome in found]}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(records, indent=2) + "\n")
            unfinished.replace(path)
        all_found += found
    print(table(all_found))
    if any(outcome.lost for outcome in all_found):
        raise ArithmeticError("something was lost: see the table")


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    rows = ["| fault | tried | survived | lost | |", "| --- | ---: | ---: | ---: | --- |"]
    for outcome in outcomes:
        notes = [f"skipped: {outcome.skipped}"] if outcome.skipped else []
        notes += [f"{name}: {value}" for name, value in outcome.notes.items()]
        rows.append(f"| {outcome.fault} | {outcome.tried} | {outcome.survived} | {len(outcome.lost)} | "
                    f"{'; '.join(notes)} |")
    return "\n".join(rows)
