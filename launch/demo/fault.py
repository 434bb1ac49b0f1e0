"""`triweave demo fault`: the participation fault of plain DeepSpeed, and what Triweave does on the same data.

Two ranks, one with pictures only and one with sounds only, start under the DeepSpeed launcher, once for each loop of
`pretrain/bench/fault_demo.py`. How far off a tower is:  |w - w*| / |w* - w0|,  w* being the weights of one plain torch
process over the same batches and w0 the initial ones.

    OUT/LOOP-zeroN.safetensors, .json   weights and losses of each run     OUT/LOOP.log   what its ranks printed
    OUT/result.json, OUT/result.txt     what this prints
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from triweave.launch.deepspeed_launcher import local_command, script_of
from triweave.launch.errors import DemoError
from triweave.launch.machine import Machine, free_port, inspect_machine
from triweave.launch.processes import run_to_end

LIMIT_S = 240.0
"""A launch that takes longer hangs; on gloo none does."""
LAUNCHES = (("plain", (0, 1, 2)), ("plain", (3,)), ("triweave", (0, 1, 2, 3)), ("broken", (1, 2, 3)))
"""(loop, ZeRO stages), each in processes of its own; plain ZeRO-3 fails and would take the others along."""
TITLES = {"plain": "DeepSpeed", "triweave": "Triweave", "broken": "no guards"}
EXPECTED = {"triweave": 0, "broken": 2}
"""Loop -> exit code; of plain DeepSpeed whatever happens is the answer."""


def run_fault_demo(out: Path, *, update: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run all loops and return what result.json holds: figures of one process and a list of runs.

    Raises DemoError where the folder cannot be written or a loop ends otherwise than this page says it does,
    KeyboardInterrupt where the user stops it.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # gloo says what is wrong; NCCL would hang
    try:
        out.mkdir(parents=True, exist_ok=True)
        for stale in [*out.glob("*-zero*"), *out.glob("*.log")]:
            stale.unlink()
    except OSError as error:
        raise DemoError(f"--out {out}: {error.strerror}; choose a folder that can be written") from None
    machine = inspect_machine()
    codes: dict[tuple[str, int], int] = {}
    for loop, stages in LAUNCHES:
        update(f"{TITLES[loop]}, ZeRO {', '.join(map(str, stages))}: 2 ranks")
        code = _launch(out, loop, stages, machine)
        if code != EXPECTED.get(loop, code):
            log = out / f"{loop}.log"
            raise DemoError(f"{TITLES[loop]} ended with exit code {code}: {_first_error(log)}; its output is in {log}")
        codes |= {(loop, stage): code for stage in stages}
    update("one plain torch process, for comparison")
    result = _compare(out, codes)
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def _launch(out: Path, loop: str, stages: tuple[int, ...], machine: Machine) -> int:
    """Start one loop under the DeepSpeed launcher and return its exit code."""
    from triweave.pretrain.bench.fault_demo import RANKS

    arguments = [loop, str(out.resolve()), *map(str, stages)]
    script = script_of("triweave.pretrain.bench.fault_demo")
    command = local_command(arguments, machine=machine, ranks=RANKS, port=free_port(), script=script)
    timers: list[threading.Timer] = []

    def limit(group: int) -> None:
        timers.append(threading.Timer(LIMIT_S, _end, (group,)))
        timers[0].start()

    try:
        with (out / f"{loop}.log").open("ab") as log:
            outcome = run_to_end(command, log=log, show=lambda _: None, started=limit)
    finally:
        for timer in timers:
            timer.cancel()
    if outcome.stopped_by is not None:
        raise KeyboardInterrupt
    return outcome.exit_code


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGTERM)


def _compare(out: Path, codes: dict[tuple[str, int], int]) -> dict[str, Any]:
    """Return the figures of every run beside those of one process."""
    import torch
    from safetensors.torch import load_file

    from triweave.pretrain.bench.fault_demo import STEPS, build_model, train_one_process

    torch.set_num_threads(1)
    truth, losses = train_one_process()
    start = {name: parameter.detach() for name, parameter in build_model().named_parameters()}
    runs = []
    for (loop, stage), code in codes.items():
        path = out / f"{loop}-zero{stage}.safetensors"
        run: dict[str, Any] = {"loop": loop, "zero_stage": stage, "exit_code": code}
        told = _read(path.with_suffix(".json"))
        if path.exists():
            found = load_file(path)
            run |= {
                "loss_last": told["losses"][-1],
                "off": {
                    part: _off(found, truth, start, prefix)
                    for part, prefix in (("image", "towers.image."), ("audio", "towers.audio."), ("all", ""))
                },
                "max_abs_diff": max(float((found[name] - truth[name]).abs().max()) for name in truth),
            }
        else:
            run["error"] = told.get("error") or _first_error(out / f"{loop}.log")
        runs.append(run)
    return {"steps": STEPS, "ranks": 2, "loss_first": losses[0], "loss_last": losses[-1], "runs": runs}


def _off(found: dict[str, Any], truth: dict[str, Any], start: dict[str, Any], prefix: str) -> float:
    """Return |w - w*| / |w* - w0| over the parameters whose names begin with `prefix`."""
    names = [name for name in truth if name.startswith(prefix)]
    wrong = sum(float((found[name] - truth[name]).double().square().sum()) for name in names)
    moved = sum(float((truth[name] - start[name]).double().square().sum()) for name in names)
    return float((wrong / moved) ** 0.5)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _first_error(log: Path) -> str:
    """Return the first line of a log that names an error of Python or of gloo."""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if "Error: " in line or "enforce fail" in line:
            return line.strip()
    return "no error line; see the log"


def print_fault_result(result: dict[str, Any], out: Path) -> None:
    """Print the table of all runs and what follows from it, and write the same to OUT/result.txt."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title="How far off the weights are from one plain torch process", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("loop", "ZeRO", "exit code", "image tower", "audio tower", "all weights", "last loss"):
        table.add_column(heading, justify="left" if heading == "loop" else "right")
    lines = []
    for run in result["runs"]:
        row = (TITLES[run["loop"]], str(run["zero_stage"]), str(run["exit_code"]))
        if "off" in run:
            shares = (f"{100 * run['off'][part]:.3g} %" for part in ("image", "audio", "all"))
            table.add_row(*row, *shares, f"{run['loss_last']:.4f}")
        else:
            table.add_row(*row, *["stopped"] * 3, "")
            lines.append(f"{row[0]}, ZeRO {row[1]}: {run['error']}")
    words = (
        f"{result['steps']} steps on 2 ranks, rank 0 with pictures only and rank 1 with sounds only; one process goes "
        f"from loss {result['loss_first']:.4f} to {result['loss_last']:.4f}. No guards: "
        "Triweave's engine with a model that breaks the contract on purpose. docs/participation.md says why."
    )
    with (out / "result.txt").open("w", encoding="utf-8") as file:
        for console in (Console(), Console(file=file, width=120)):
            console.print(table)
            console.print("\n".join([*lines, words]), highlight=False, markup=False, soft_wrap=True)
