"""Two results of lm-eval beside each other: what is reported, and when they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.check_evaluation import CheckEvaluationConfig, compare


def results(metric: float, *answers: list[Any]) -> dict[str, Any]:
    """As lm-eval gives them, the items in another order."""
    samples = [{"doc_id": i, "resps": [[answer] for answer in item]} for i, item in enumerate(answers)]
    return {"results": {"task": {"alias": "task", "acc,none": metric, "acc_stderr,none": 0.5}},
            "samples": {"task": samples[::-1]}}


def test_choices() -> None:
    ours = results(0.5, [(-1.0, True), (-2.0, False)], [(-3.0, False)])
    found = compare(ours, results(0.5, [(-1.0, True), (-2.25, True)], [(-3.0, False)]), 0.25)
    assert found == {"items": 2, "requests": 3, "metrics": {"acc,none": [0.5, 0.5]}, "largest_difference": 0.25,
                     "equal_greedy": 2, "agree": True}
    assert not compare(ours, results(0.5, [(-1.0, True), (-2.25, True)], [(-3.0, False)]), 0.2)["agree"]
    assert not compare(ours, results(0.6, [(-1.0, True), (-2.0, False)], [(-3.0, False)]), 0.2)["agree"]
    assert not compare(results(0.5, [(np.nan, True)]), results(0.5, [(-1.0, True)]), 1.0)["agree"]
    assert not compare(results(0.5, [(-1.0, True), (np.nan, True)]), results(0.5, [(-1.0, True)] * 2), 1.0)["agree"]


def test_whole_texts_by_thousands_of_nats() -> None:
    found = compare(results(7.0, [-4000.0], [-10.0]), results(7.1, [-4002.001], [-10.4]), 0.5)
    np.testing.assert_allclose(found["largest_difference_per_1000_nats"], 0.5, atol=1e-6)
    assert found["agree"] and not compare(results(7.0, [-4000.0]), results(7.0, [-4003.0]), 0.5)["agree"]


def test_written_texts() -> None:
    found = compare(results(1.0, ["a"], ["b"]), results(1.0, ["a"], ["c"]), 0.0)
    assert found["equal_texts"] == 1 and found["agree"]
    assert not compare(results(1.0, ["a"]), results(0.0, ["a"]), 0.0)["agree"]


@pytest.mark.parametrize(("options", "message"), [
    ({"tolerance": -1.0}, "tolerance=-1.0"), ({"peer_batch_size": 0}, "peer_batch_size=0"),
    ({"output": "/nowhere/record.json"}, "output='/nowhere/record.json'"),
])
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CheckEvaluationConfig(**{"hf": "x", "tasks": "local_bbh", "output": "record.json", **options})
