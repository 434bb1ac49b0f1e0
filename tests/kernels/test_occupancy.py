"""The occupancy model at points worked out by hand from the chips' published limits."""

from __future__ import annotations

import pytest

from triweave.kernels.compiler.occupancy import CHIPS, occupancy


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "expected"),
    [
        ("sm_80", 4, 32, 0, 1.0),
        ("sm_80", 4, 255, 0, 8 / 64),  # 8192 registers a warp: 8 warps
        ("sm_80", 8, 92, 0, 16 / 64),  # 3072 a warp: 21, in fours 20, of which two blocks of 8
        ("sm_80", 4, 32, 81 << 10, 8 / 64),  # 82 KiB with the reserved one: two in 164
        ("sm_80", 4, 32, 82 << 10, 4 / 64),
        ("sm_80", 1, 32, 0, 32 / 64),  # 32 blocks
        ("sm_90", 8, 168, 200 << 10, 8 / 64),
        ("sm_90", 4, 32, 228 << 10, 0.0),  # more than a block may ask for
        ("sm_120", 1, 32, 0, 24 / 48),  # 24 blocks
        ("sm_86", 1, 32, 0, 16 / 48),
        ("sm_120", 4, 128, 99 << 10, 4 / 48),
        ("sm_120", 4, 128, 100 << 10, 0.0),
        ("gfx942", 4, 128, 16 << 10, 16 / 32),
        ("gfx942", 4, 70, 8192, 28 / 32),
    ],
)
def test_the_scarcest_resource_decides(
    arch: str, warps: int, registers: int, shared_bytes: int, expected: float
) -> None:
    found = occupancy(CHIPS[arch], warps=warps, registers=registers, shared_bytes=shared_bytes)
    assert found == pytest.approx(expected)


def test_blocks_share_the_tensor_memory() -> None:
    def resident(columns: int) -> float:
        return occupancy(CHIPS["sm_100"], warps=4, registers=64, shared_bytes=1024, tensor_memory_columns=columns)

    assert resident(0) == 32 / 64
    assert resident(256) == 8 / 64
    assert resident(512) == 4 / 64
