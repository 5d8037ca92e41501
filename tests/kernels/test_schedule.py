"""How the keys are split: enough to fill a GPU, and no further."""

from __future__ import annotations

import math

import pytest

from kvpatch.kernels.schedule import MOST_SPLITS, splits_for

H200 = 132  # streaming multiprocessors, each of which runs two programs at once


@pytest.mark.parametrize(
    ("programs", "tiles", "splits"),
    [
        (8, 128, 29),  # one sequence of 8 KV heads: 232 of 264 programs in one wave
        (1, 512, 109),  # one latent cache: 128 would be the most
        (1, 3, 1),  # short: not worth a merge
        (1, 8, 4),  # two tiles each
        (264, 512, 1),  # one wave without splits
        (256, 512, 1),  # nearly
        (133, 512, 7),  # 931 programs in four waves; two splits would leave a wave nearly empty
        (4096, 512, 1),  # many waves
    ],
)
def test_splits_of_a_large_gpu(programs: int, tiles: int, splits: int) -> None:
    assert splits_for(programs, tiles, H200) == splits


@pytest.mark.parametrize("programs", [1, 3, 8, 20, 100, 200, 300, 1000])
@pytest.mark.parametrize("tiles", [0, 1, 2, 9, 64, 1000])
def test_waves_are_full(programs: int, tiles: int) -> None:
    """Fuller by little at most with any other number of splits, and not as full with fewer."""

    def idle(splits: int) -> float:
        waves = programs * splits / (2 * H200)
        return 1 - waves / math.ceil(waves)

    most = min(MOST_SPLITS, max(1, tiles // 2))
    splits = splits_for(programs, tiles, H200)
    assert 1 <= splits <= most
    best = min(map(idle, range(1, most + 1)))
    enough = 1 - 0.85 * (1 - best)
    assert idle(splits) <= enough + 1e-12
    assert all(idle(fewer) > enough for fewer in range(1, splits))
