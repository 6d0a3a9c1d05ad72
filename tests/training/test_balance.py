"""What is said of an update whose loss or gradient is mostly another stream's than the target's."""

import pytest

from prom_jax.training.balance import line, warnings
from prom_jax.training.methods.bactrian import Bactrian
from prom_jax.training.methods.prom import PROM
from prom_jax.training.methods.xllama2 import XLLaMA2

METHOD = PROM(3, weight=0.1)
UPDATE = {
    "loss": 13.0114,
    "loss_english": 95.71,
    "weight_english": 120.0,
    "loss_target": 3.4404,
    "weight_target": 300.0,
    "grad_norm": 150.0,
}


def test_a_line_has_the_parts_of_the_loss():
    assert line(UPDATE) == "loss 13.011  target 3.44  english 95.7"
    assert line({"loss": 3.4404, "loss_target": 3.4404, "weight_target": 300.0}) == "loss 3.440"


def test_english_that_outweighs_target():
    found = warnings(METHOD, UPDATE, clip=0.0)
    assert found.keys() == {"loss"}
    assert "english outweighs target in the loss: 0.1 · 95.7 = 9.57 against 3.44" in found["loss"]
    assert not warnings(PROM(3, weight=0.03), UPDATE, clip=0.0)  # 2.9
    assert not warnings(XLLaMA2(), UPDATE, clip=0.0)  # one mean over both
    without = {key: value for key, value in UPDATE.items() if "english" not in key}
    assert not warnings(METHOD, without, clip=0.0)  # an update that has none


@pytest.mark.parametrize(
    ("alone", "together", "clip", "smaller"),
    [
        (8.0, 150.0, 1.0, "18.8"),
        (0.5, 3.0, 1.0, "3.0"),  # alone it would not be clipped at all
        (8.0, 15.0, 1.0, None),  # less than twice
        (0.1, 0.9, 1.0, None),  # nothing is clipped
        (8.0, 150.0, 0.0, None),  # no clipping
    ],
)
def test_clipping_by_the_gradient_of_english(alone, together, clip, smaller):
    update = {"loss": 3.0, "loss_target": 3.0, "weight_target": 9.0, "grad_norm": together}
    found = warnings(METHOD, update | {"grad_norm_target": alone}, clip)
    assert found.keys() == ({"clipping"} if smaller else set())
    assert smaller is None or f"gradient of target {smaller} times smaller" in found["clipping"]
    assert not warnings(METHOD, update, clip)  # not measured
    assert not warnings(Bactrian(), update, clip)
