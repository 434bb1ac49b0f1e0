"""The process a loader is measured in: one line of JSON in, one line out, until its input ends.

    {"contender", "shards", "tokenizer", "sequence_length", "samples", "folder", "store"}  ->  {"version"} or {"error"}
    {"do": "raw"}, {"do": "resume"}, {"do": "prepare_resume", "share": 0.5}, ...  ->  {"seconds", "cpu_s", "result"}

What a library prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from triweave.data_pipeline.bench.contenders.base import Setting
from triweave.data_pipeline.bench.contenders.registry import CONTENDERS, make_contender
from triweave.data_pipeline.config import DataConfig, SourceConfig
from triweave.data_pipeline.machine import installed_versions
from triweave.data_pipeline.stream.transport import tune_memory
from triweave.data_pipeline.worker_process import use_one_blas_thread


def serve(replies: TextIO) -> None:
    """Answer until stdin ends."""
    request = json.loads(sys.stdin.readline())
    setting = Setting(
        config=DataConfig(
            sources=[SourceConfig(name="bench", shards=request["shards"])],
            tokenizer=request["tokenizer"],
            sequence_length=request["sequence_length"],
            workers=0,
        ),
        samples=request["samples"],
        folder=Path(request["folder"]),
        store=request["store"],
    )
    package = CONTENDERS[request["contender"]].package
    try:
        contender = make_contender(request["contender"], setting)
    except Exception as error:  # whatever keeps a peer from running here is its row
        _reply(replies, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return
    # As every loader worker of ours does; here for all alike.
    tune_memory()
    use_one_blas_thread()
    _reply(replies, {"version": installed_versions([package])[package] if package else ""})
    for line in sys.stdin:
        order = json.loads(line)
        call = getattr(contender, order.pop("do"))
        began, cpu = time.perf_counter(), time.process_time()
        try:
            result = call(**order)
        except Exception as error:  # a peer's failure must not end the others' run
            _reply(replies, {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            return
        seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
        _reply(replies, {"seconds": seconds, "cpu_s": cpu_s, "result": result})


def _reply(replies: TextIO, content: dict[str, Any]) -> None:
    replies.write(json.dumps(content) + "\n")
    replies.flush()


if __name__ == "__main__":
    with os.fdopen(os.dup(1), "w") as own:
        os.dup2(2, 1)
        serve(own)
