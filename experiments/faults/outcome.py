"""What is counted: how often a fault was tried, survived, lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


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


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown."""
    rows = ["| fault | tried | survived | lost | |", "| --- | ---: | ---: | ---: | --- |"]
    for outcome in outcomes:
        notes = [f"skipped: {outcome.skipped}"] if outcome.skipped else []
        notes += [f"{name}: {value}" for name, value in outcome.notes.items()]
        rows.append(f"| {outcome.fault} | {outcome.tried} | {outcome.survived} | {len(outcome.lost)} | "
                    f"{'; '.join(notes)} |")
    return "\n".join(rows)
