"""The walk through a model: which inputs a layer is shown, and what becomes of the model."""

import copy

import pytest
import torch

from minillm.config import ModelConfig
from minillm.model import Transformer
from minillm.model.layers import PaddedBatch
from minillm.model.linear import Linear
from minillm.quant.calibrate import (
    gptq_model,
    quantize_layers,
    replace_weight,
    rtn_model,
    sites,
    walk,
    windows,
)
from minillm.quant.gptq import fit_grid
from minillm.quant.rtn import QuantizedTensor, Scheme

LLAMA = ModelConfig(60, 32, 64, 2, 4, 2, 8, max_position_embeddings=64, tie_word_embeddings=True)
QWEN = ModelConfig(60, 32, 64, 2, 4, 2, 8, max_position_embeddings=64, qk_norm=True, qkv_bias=True, sliding_window=5)
NAMES = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]
ALL = [f"layers.{i}.{name}" for i in range(2) for name in NAMES]
SCHEME = Scheme(3, "int", False, "group", 16)


def tiny(config: ModelConfig = LLAMA, seed: int = 0) -> Transformer:
    """A model that does something: its weights are not small, its norms' not 1."""
    torch.manual_seed(seed)
    model = Transformer(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        spread = 0.3 if parameter.dim() == 2 else 0.2
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=spread)
    return model.eval()


def text(count: int = 6, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(60, (count, length), generator=torch.Generator().manual_seed(seed))


def hooked(model: Transformer, *args) -> dict[str, torch.Tensor]:
    """The inputs that each layer really gets."""
    seen = {}
    handles = [
        m.register_forward_pre_hook(lambda _, x, name=n: seen.__setitem__(name, x[0])) for n, m in sites(model).items()
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return seen


@pytest.fixture(params=[LLAMA, QWEN], ids=["llama", "qwen"])
def model(request) -> Transformer:
    return tiny(request.param)


class TestWalk:
    def test_names_and_inputs_are_the_models(self, model):
        expected = hooked(model, text())
        found = list(walk(model, text().split(4)))
        assert [s.name for s in found] == ALL == list(sites(model))
        for site in found:
            assert site.linear is model.get_submodule(site.name)
            assert [len(x) for x in site.inputs] == [48, 24]
            torch.testing.assert_close(torch.cat(site.inputs), expected[site.name].flatten(0, 1))

    def test_goes_on_with_the_weights_as_they_have_become(self, model):
        """Every layer sees what the replaced ones before it give, in its own half of the layer, too."""
        shown = {}
        for site in walk(model, [text()]):
            shown[site.name] = site.inputs[0]
            replace_weight(model, site.linear, site.linear.weight.flip(0) * 0.5)
        expected = hooked(model, text())  # of the model in which all are replaced
        for name in ALL:
            torch.testing.assert_close(shown[name], expected[name].flatten(0, 1))

    def test_layers_are_shown_what_they_will_read(self, model):
        """Not only the first: what a layer gives comes of the rounded input, too."""

        def coarse(x: torch.Tensor) -> torch.Tensor:
            return (4 * x).round() / 4

        rounding = copy.deepcopy(model)
        handles = [m.register_forward_pre_hook(lambda _, x: (coarse(x[0]), *x[1:])) for m in sites(rounding).values()]
        expected = hooked(rounding, text())
        for site in walk(model, text().split(4), coarse):
            x = torch.cat(site.inputs)
            assert torch.equal(x, coarse(x)), site.name
            agree = torch.isclose(x, coarse(expected[site.name].flatten(0, 1))).float().mean()
            assert agree > 0.99, (site.name, agree)  # sums in another order may fall to the other side of a tie
        assert len(handles) == len(ALL)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_is_left_out(self, model, side):
        lengths = torch.tensor([12, 3, 7])
        place = torch.arange(12) if side == "right" else torch.arange(12).flip(0)
        mask = place < lengths[:, None]
        ids = text(3)
        for site in walk(model, [(ids, PaddedBatch(mask))]):
            assert [len(x) for x in site.inputs] == [22]
            rows = torch.cat([hooked(model, ids[i, mask[i]][None])[site.name][0] for i in range(3)])
            torch.testing.assert_close(site.inputs[0], rows, rtol=1e-4, atol=1e-4)

    def test_the_hessian_is_that_of_all_batches(self, model):
        for site in walk(model, text().split(1)):
            x = torch.cat(site.inputs)
            torch.testing.assert_close(site.hessian, x.T @ x / len(x))

    def test_attention_is_whole_again(self, model):
        """Also where the walk broke off."""
        before = [*model.modules()]
        for _, site in zip(range(3), walk(model, [text()]), strict=False):
            assert isinstance(site.linear, Linear)
        assert [*model.modules()] == before

    @pytest.mark.parametrize("batches", [[], [torch.zeros(0, 4, dtype=torch.long)], iter(())])
    def test_no_text(self, batches):
        with pytest.raises(ValueError, match="no token"):
            next(walk(tiny(), batches))

    def test_nothing_but_padding(self):
        with pytest.raises(ValueError, match="no token"):
            next(walk(tiny(), [(text(1), PaddedBatch(torch.zeros(1, 12, dtype=torch.bool)))]))

    @pytest.mark.parametrize(
        ("batches", "message"),
        [
            ([text()[0]], "expected token ids"),
            ([(text(), PaddedBatch(torch.ones(6, 11)))], "mask"),
            ([text() + 60], "vocabulary|0..59"),
            ([text(1, 65)], "at most 64"),
        ],
    )
    def test_refused(self, batches, message):
        with pytest.raises(ValueError, match=message):
            next(walk(tiny(), batches))

    def test_a_quantized_model_is_refused(self):
        model = tiny()
        model.layers[1].mlp.down_proj = Linear(64, {"down_proj": 32})
        with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj: expected a plain weight"):
            sites(model)


class TestModels:
    def test_each_weight_is_replaced_by_what_the_method_said(self, model):
        before = copy.deepcopy(model)
        told = []
        done = quantize_layers(
            model, [text()],
            lambda s: QuantizedTensor.round(s.linear.weight, fit_grid(s.linear.weight, SCHEME), SCHEME), told.append,
        )  # fmt: skip
        assert list(done) == told == ALL
        for name, linear in sites(model).items():
            assert torch.equal(linear.weight, done[name].dequantize())
            assert not torch.equal(linear.weight, before.get_submodule(name).weight)
        assert torch.equal(model.embed_tokens.weight, before.embed_tokens.weight)
        assert torch.equal(model.lm_head.weight, before.lm_head.weight)
        assert model.revision > before.revision

    def test_loaded_weights_are_not_written_to(self):
        """They may be the file itself."""
        model = tiny()
        old = {name: linear.weight for name, linear in sites(model).items()}
        copies = {name: weight.clone() for name, weight in old.items()}
        rtn_model(model, SCHEME)
        assert all(torch.equal(old[name], copies[name]) for name in ALL)

    def test_dtype_stays(self):
        model = tiny().bfloat16()
        gptq_model(model, [text()], SCHEME)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model(text()).isfinite().all()

    @pytest.mark.parametrize("order", [None, "activations"])
    def test_gptq_is_nearer_to_the_model_than_rounding(self, model, order):
        batches = text(40, 16).split(10)
        nearest, ours = copy.deepcopy(model), copy.deepcopy(model)
        rtn_model(nearest, SCHEME)
        done, reports = gptq_model(ours, batches, SCHEME, order=order)
        assert list(done) == list(reports) == ALL
        assert all(r.fallback is None and r.damping == 0.01 for r in reports.values())
        assert sum(r.loss < r.rtn_loss for r in reports.values()) >= 7
        test = text(20, 16, seed=2)
        error = [float((m(test) - model(test)).square().mean()) for m in (ours, nearest)]
        assert error[0] < 0.9 * error[1]

    def test_rtn_needs_no_text(self, model):
        other = copy.deepcopy(model)
        a = rtn_model(model, SCHEME)
        b = rtn_model(other, SCHEME, batches=[text()])
        assert all(torch.equal(a[name].q, b[name].q) for name in ALL)

    def test_rtn_by_what_the_inputs_say(self, model):
        weight = next(walk(model, [text()])).linear.weight
        importance = next(walk(model, [text()])).hessian.diagonal()
        done = rtn_model(copy.deepcopy(model), SCHEME, "error", [text()])
        expected = fit_grid(weight, SCHEME, "error", importance)
        assert torch.equal(done[ALL[0]].grid.scale, expected.scale)
        plain = rtn_model(model, SCHEME, "error")
        assert torch.equal(plain[ALL[0]].grid.scale, fit_grid(weight, SCHEME, "error").scale)
        assert not torch.equal(plain[ALL[0]].grid.scale, expected.scale)


class TestWindows:
    def test_are_pieces_of_the_text_in_order(self):
        found = windows(torch.arange(100), 8, 10)
        assert found.shape == (8, 10)
        assert (found.diff(dim=1) == 1).all()
        assert (found[:, 0].diff() >= 0).all()
        assert torch.equal(found, windows(torch.arange(100), 8, 10))
        assert not torch.equal(found, windows(torch.arange(100), 8, 10, seed=1))

    def test_a_text_of_one_window(self):
        assert windows(torch.arange(10), 3, 10).tolist() == [list(range(10))] * 3

    def test_too_short(self):
        with pytest.raises(ValueError, match="10 tokens or more, got 9"):
            windows(torch.arange(9), 3, 10)
