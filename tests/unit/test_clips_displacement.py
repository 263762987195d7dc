"""Displacement errors."""

import numpy as np
import pytest

from alpamayo_dflash.clips.window import constant_velocity, min_ade


def test_min_ade_takes_the_best_sample_and_ignores_height() -> None:
    future = np.zeros((64, 3), np.float32)
    offsets = np.array([[3.0, 4.0, 0.0], [0.0, 1.0, 9.0]], np.float32)
    predicted = future + offsets[:, None]
    assert min_ade(predicted, future) == pytest.approx(1.0)


def test_constant_velocity_goes_on_as_the_last_step() -> None:
    history = np.zeros((16, 3), np.float32)
    history[:, 0] = np.arange(-15, 1) * 0.5
    history[0] = 7.0  # only the last step counts
    path = constant_velocity(history, 64)
    assert path.shape == (1, 64, 3)
    np.testing.assert_allclose(path[0, :, 0], np.arange(1, 65) * 0.5, rtol=1e-6)
    assert min_ade(path, path[0]) == 0.0
