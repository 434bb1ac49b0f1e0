"""The roofline model as the tuner's timer: candidates are compiled for a chip that is not here; none is executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from triweave.kernels.attention_tiles import CONFIGS
from triweave.kernels.compiler.compile_triton import Variant
from triweave.kernels.compiler.shipped_triton import variants
from triweave.kernels.errors import KernelError, KernelInputError
from triweave.kernels.roofline import roofline_rows
from triweave.kernels.roofline.chips import peaks
from triweave.kernels.roofline.loop_mix import CompiledLoops
from triweave.kernels.roofline.loop_mix_triton import compiled_loops
from triweave.kernels.roofline.roofline_rows import Case, Masks
from triweave.kernels.tuning import tune
from triweave.kernels.tuning.pinned import Config
from triweave.kernels.tuning.tune import CandidateError, Choice


def retiled(variant: Variant, config: Config) -> Variant:
    """Return an attention variant with another tile, warps and stages."""
    tile = {"QUERY_TILE": config["query_tile"], "KEY_TILE": config["key_tile"]}
    options = {"num_warps": config["warps"], "num_stages": config["stages"]}
    if "registers" in config:
        options["maxnreg"] = config["registers"]
    kept = {name: value for name, value in variant.options.items() if name != "maxnreg"}
    return replace(
        variant,
        constants={**variant.constants, **tile},
        options={**kept, **options},
        config=tune.described({**tile, **options}),
    )


def model_choice(
    kernel: str,
    case: Case,
    chip_name: str,
    *,
    candidates: Sequence[Config] | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> tuple[Choice, dict[str, CompiledLoops]]:
    """Return which tile of `forward`, `dq` or `dkv` the model expects to be fastest, and what was compiled, by config.

    The dtype and width are the case's. Raises KernelInputError for one that no attention kernel is shipped for.
    """
    chip, masks = peaks(chip_name), Masks(case)
    shipped = [
        one
        for one in variants(["attention"])
        if (one.kernel, one.dtype, one.head_dim) == (kernel, case.dtype, case.head_dim)
    ]
    if not shipped:
        raise KernelInputError(
            f"kernels tune: no attention kernel {kernel!r} of {case.dtype} and head width {case.head_dim} is shipped; "
            f"kernels are {', '.join(CONFIGS)}, widths 32, 64, 72, 80, 96, 128 and 256"
        )
    made: dict[str, CompiledLoops] = {}

    def timer(config: Config, runs: int) -> Sequence[float]:
        try:
            compiled = compiled_loops(retiled(shipped[0], config), chip.arch)
        except KernelError as error:
            raise CandidateError(str(error)) from error
        made[tune.described(config)] = compiled
        if compiled.blocks == 0 or len(compiled.loops) != 2:
            raise CandidateError(
                "not even one block fits" if compiled.blocks == 0 else "its loops cannot be told apart"
            )
        bound = roofline_rows.kernel_bound(
            kernel, compiled, config["query_tile"], config["key_tile"], case, masks, chip
        )
        return [bound.expected_ms] * runs

    choice = tune.search(
        candidates or tune.attention_candidates(kernel, case.number_bytes, case.head_dim),
        timer,
        pinned=tune.pinned_attention(kernel, case.number_bytes, case.head_dim),
        rounds=1,
        repeats=1,
        progress=progress,
    )
    return choice, made
