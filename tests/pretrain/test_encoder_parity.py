"""Training with encoders equals one plain torch process: images on one rank, sounds on the other, in turns."""

from functools import cache
from pathlib import Path

import pytest

TASKS = Path(__file__).with_name("encoder_tasks.py")
ENCODERS = ("attention", "convolution", "perceiver", "mfcc")


@pytest.fixture(scope="session")
def tasks(rank_pool):
    """The module encoder_tasks, as the ranks load it."""
    return rank_pool.load(TASKS)


@pytest.fixture(scope="session")
def reference(tasks):
    """The plain torch trainer, each encoder once."""
    return cache(
        lambda encoder: tasks.engine(encoder).reference_case(case="image_against_audio", ranks=2, accumulation=1)
    )


def test_the_parity_cells_are_of_every_encoder(tasks):
    assert set(tasks.ENCODERS) == set(ENCODERS)


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("stage", [2, 3])
def test_engine_equals_plain_torch(rank_pool, tasks, reference, encoder, stage):
    answers = rank_pool.pool(2).run(
        TASKS, "train_case", encoder=encoder, case="image_against_audio", zero_stage=stage, accumulation=1
    )
    parity = rank_pool.load(Path(__file__).with_name("test_parity.py"))
    parity.assert_parity(tasks.engine(encoder), answers, reference(encoder))
