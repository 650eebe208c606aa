"""Adapters behind a sublayer: nothing at first, the formula, training, and what they cost."""

import pytest
import torch

from minillm.adapters.bottleneck import BottleneckLinear, bottlenecked, without_bottlenecks
from minillm.adapters.training import train

from .test_lora import EXAMPLES, logits, tiny


@pytest.mark.parametrize(("architecture", "count"), [("houlsby", 4), ("pfeiffer", 2)])
def test_new_ones_change_nothing_and_train_alone(architecture, count):
    model = tiny()
    before = logits(model)
    bottlenecked(model, architecture, reduction_factor=4)
    assert torch.equal(logits(model), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * count
    assert sum(p.numel() for p in trained) == count * 2 * 32 * 8
    losses = train(model, EXAMPLES, 60, lr=2e-2, progress=False)
    assert losses[-1] < 0.6 * losses[0]
    assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(without_bottlenecks(model)), before)


@pytest.mark.parametrize("nonlinearity", ["relu", "gelu", "silu"])
def test_the_layer_is_the_formula(nonlinearity):
    model, x = bottlenecked(tiny(), "pfeiffer", 8, nonlinearity), torch.randn(3, 64)
    layer = model.layers[1].mlp.down_proj
    assert isinstance(layer, BottleneckLinear)
    layer.up.data.normal_()
    h = x @ layer.base.weight.T
    f = {"relu": lambda z: z.clamp(min=0), "gelu": torch.nn.functional.gelu, "silu": lambda z: z * z.sigmoid()}[
        nonlinearity
    ]
    torch.testing.assert_close(layer(x), h + f(h @ layer.down.T) @ layer.up.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"architecture": "x"}, "architecture: expected one of houlsby, pfeiffer"),
        ({"nonlinearity": "x"}, "nonlinearity"),
        ({"reduction_factor": 0}, "reduction_factor: expected 1 to 32"),
        ({"reduction_factor": 33}, "reduction_factor"),
    ],
)
def test_bad_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        bottlenecked(tiny(), **options)
    with pytest.raises(ValueError, match="without bottlenecks"):
        bottlenecked(bottlenecked(tiny()))
