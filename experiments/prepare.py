"""Make token shards of a text before there is a run: on a machine without accelerators, say, while none is paid for.

    python -m experiments.prepare --data.source FILE --data.tokenizer tokenizer.json --data.prepared shards
    python -m experiments.train --data.source FILE --data.tokenizer tokenizer.json --data.prepared shards ...

Without it a run makes its own at its first start. Shards that are there already, of the same settings, are left alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys

from experiments import cli
from mfa_jax.config import DataConfig, require
from mfa_jax.data import load_tokenizer, prepare
from mfa_jax.data.prepare import telling


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Which text, which tokenizer, and where to: of the fields of a run's data, those that shards depend on."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)


def main(config: PrepareConfig) -> None:
    data = config.data
    require(data.prepared is not None, "data.prepared", None, "give the folder of the token shards")
    assert data.prepared is not None
    prepared = prepare(data, data.prepared, load_tokenizer(data.tokenizer),
                       telling(lambda message: print(message, file=sys.stderr, flush=True)))
    print(json.dumps({"prepared": data.prepared, **{
        split: dataclasses.asdict(prepared.size(split)) for split in ("train", "held_out")}}))


if __name__ == "__main__":
    cli.run(lambda: main(cli.parse(PrepareConfig)))
