"""The learning rate of every step."""

import pytest

from utils.training.optim import Schedule, scaled_rate


class TestLearningRate:
    def test_decays_at_the_scheduled_epochs(self):
        schedule = Schedule(0.1, [81, 122], 0.1)
        rates = [schedule.learning_rate(epoch, 0, 391) for epoch in (0, 80, 81, 121, 122, 163)]
        assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])

    def test_warms_up_for_exactly_the_given_steps(self):
        constant = Schedule(0.1, [10], 0.1, warmup_steps=400)
        assert constant.learning_rate(0, 0, 391) == pytest.approx(0.01)
        assert constant.learning_rate(1, 8, 391) == pytest.approx(0.01)
        assert constant.learning_rate(1, 9, 391) == pytest.approx(0.1)
        linear = Schedule(1.0, [10], 0.1, warmup_steps=100, warmup="linear")
        rates = [linear.learning_rate(0, k, 391) for k in (0, 50, 100)]
        assert rates == pytest.approx([0.1, 0.55, 1.0])

    def test_scaling_is_relative_to_128_images(self):
        assert scaled_rate(0.1, 512, "none") == 0.1
        assert scaled_rate(0.1, 512, "linear") == pytest.approx(0.4)
        assert scaled_rate(0.1, 512, "sqrt") == pytest.approx(0.2)
