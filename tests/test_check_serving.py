"""An engine beside the model it serves: what is compared, and what is refused. The engine is a server of this file."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.check_parity import ParityError
from experiments.check_serving import CheckServingConfig, Continuation, compare, main
from mfa_jax.convert import save_run
from mfa_jax.data import ByteTokenizer
from tests.contract import compiled, model_config

PROMPTS = ("def ", "A text")
NEW = 6
Change = Callable[[dict[str, Any]], Any]


def engine(c: Any, change: Change, begin: list[int]) -> type[http.server.BaseHTTPRequestHandler]:
    """Completions of the model without a cache, `change`d before they are told; text is put behind `begin`."""
    tokenizer = ByteTokenizer()

    def complete(body: dict[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        ids = [*begin, *tokenizer.encode(prompt).tolist()] if isinstance(prompt, str) else list(prompt)
        start, logprobs = len(ids), []
        for _ in range(body["max_tokens"]):
            row = np.zeros((1, 32), np.int32)
            row[0, : len(ids)] = ids
            of_next = jax.nn.log_softmax(c.full(c.params, row)[0, len(ids) - 1, : tokenizer.vocab_size])
            ids.append(int(of_next.argmax()))
            logprobs.append(float(jax.nn.log_softmax(c.full(c.params, row)[0, len(ids) - 2]).max()))
        return {"choices": [{"text": tokenizer.decode(ids[start:]), "finish_reason": "length",
                             "logprobs": {"token_logprobs": logprobs}}], "usage": {"prompt_tokens": start}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply({"data": [{"id": "served"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if body["model"] != "served":
                self.send_error(404, f"no model {body['model']}")
                return
            self.reply(change(complete(body)))

        def reply(self, answer: Any) -> None:
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@contextlib.contextmanager
def serving(c: Any, change: Change = lambda answer: answer, begin: tuple[int, ...] = ()) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), engine(c, change, list(begin))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, CheckServingConfig]:
    c = compiled(model_config("mfa", vocab_size=264))
    run = tmp_path_factory.mktemp("served") / "run"
    save_run(run, c.config, c.params, ByteTokenizer())
    return c, CheckServingConfig(workdir=str(run), prompt=PROMPTS, max_new_tokens=NEW, tolerance=1e-4, timeout=60)


def test_an_engine_that_serves_the_model(
    served: tuple[Any, CheckServingConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    c, config = served
    with serving(c) as url:
        main(dataclasses.replace(config, url=url))
        found = json.loads(capsys.readouterr().out)
        assert [row["prompt"] for row in found["prompts"]] == list(PROMPTS)
        for row in found["prompts"]:
            assert row["same_text"] and row["tokens"] == [NEW, NEW] and row["disagree"] == []
            assert row["prompt_tokens"] == [len(row["prompt"])] * 2 and 0 <= row["largest_difference"] <= 1e-4
        with pytest.raises(ValueError, match="answered 404 no model other"):
            main(dataclasses.replace(config, url=url, served_model="other"))


def test_a_run_with_a_begin_token_is_asked_behind_it(
    served: tuple[Any, CheckServingConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    c, config = served
    save_run(tmp_path / "run", c.config, c.params, ByteTokenizer(), add_bos_token=True)
    with serving(c, begin=(ByteTokenizer.bos_id,)) as url:
        main(dataclasses.replace(config, url=url, workdir=str(tmp_path / "run")))
    for row in json.loads(capsys.readouterr().out)["prompts"]:
        assert row["same_text"] and row["prompt_tokens"] == [1 + len(row["prompt"])] * 2
    with serving(c) as url, pytest.raises(ParityError, match="disagrees in prompt_tokens"):
        main(dataclasses.replace(config, url=url, workdir=str(tmp_path / "run")))


def _other_logprobs(answer: dict[str, Any]) -> dict[str, Any]:
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    logprobs[-1] -= 2e-4
    return answer


def _other_text(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["text"] += "!"
    return answer


def _begin_token(answer: dict[str, Any]) -> dict[str, Any]:
    answer["usage"]["prompt_tokens"] += 1
    return answer


@pytest.mark.parametrize(("change", "error", "why"), [
    (_other_logprobs, ParityError, r"prompt 'def ': the engine disagrees in logprobs$"),
    (_other_text, ParityError, r"disagrees in text$"),
    (_begin_token, ParityError, r"disagrees in prompt_tokens$"),
    (lambda answer: {"choices": []}, ValueError, r"has no choices\.0"),
    (lambda answer: {"choices": {"text": ""}}, ValueError, r"has no choices\.0"),
    (lambda answer: {**answer, "choices": [{"text": "", "logprobs": None}]}, ValueError,
     r"has no logprobs\.token_logprobs"),
    (lambda answer: b"<html>", ValueError, r"something else than JSON"),
])
def test_what_an_engine_gets_wrong(
    served: tuple[Any, CheckServingConfig], change: Change, error: type[Exception], why: str
) -> None:
    c, config = served
    with serving(c, change) as url, pytest.raises(error, match=why):
        main(dataclasses.replace(config, url=url))


def test_no_engine(served: tuple[Any, CheckServingConfig]) -> None:
    c, config = served
    with serving(c) as url:
        pass
    with pytest.raises(ValueError, match=r"no engine answers at .*/v1/models .* start it first"):
        main(dataclasses.replace(config, url=url))


def test_continuations_by_hand() -> None:
    mine = Continuation(3, "ab", [-1.0, -2.0], stopped=False)
    assert compare(mine, Continuation(3, "ab", [-1.0, -2.25], stopped=False), 0.5)["disagree"] == []
    found = compare(mine, Continuation(3, "ac", [-1.0, float("nan")], stopped=False), 0.5)
    assert found["disagree"] == ["text", "logprobs"] and found["first_beyond"] == 1
    assert compare(mine, Continuation(4, "ab", [-1.0], stopped=True), 0.5)["disagree"] == ["prompt_tokens", "tokens"]
    assert compare(mine, Continuation(3, "ab", [], stopped=False), 0.5)["largest_difference"] is None
    ended = Continuation(3, "ab", [-1.0, -2.0, -0.5], stopped=True)
    assert compare(ended, dataclasses.replace(mine, stopped=True), 0.5)["disagree"] == []


@pytest.mark.parametrize(("field", "value", "why"), [
    ("url", "localhost:8000", "must begin with http"), ("max_new_tokens", 0, "must be positive"),
    ("tolerance", -1.0, "must not be negative"), ("prompt", ("",), "must not be empty"),
])
def test_settings_that_are_refused(field: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.*{why}"):
        CheckServingConfig(workdir="run", **{field: value})
