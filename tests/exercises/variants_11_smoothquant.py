"""Implementations that the checks of exercises 11 must refuse, and others that they must accept."""

import torch
import triton
import triton.language as tl

from minillm.learn.testing import alternative, wrong

# ---- 11.1 -----------------------------------------------------------------------------------------------------------


@wrong("11.1", "divides by 127")
def which_scale():
    tokens, static = [51 / 127, 2.55 / 127], 25.5 / 127
    own = [round(x / tokens[1]) * tokens[1] for x in (2.55, 1.1, 0.3, -0.06)]
    return tokens, tokens[0], own, [round(x / tokens[0]) * tokens[0] for x in (2.55, 1.1, 0.3, -0.06)], 127 * static


@wrong("11.1", "divides by the number of steps, 255")
def which_scale():
    return [0.2, 0.01], 0.2, [2.55, 1.1, 0.3, -0.06], [2.6, 1.2, 0.4, 0.0], 25.5


@wrong("11.1", "the tensor's scale is the mean of the tokens'")
def which_scale():
    return [0.4, 0.02], 0.21, [2.54, 1.1, 0.3, -0.06], [2.52, 1.05, 0.21, 0.0], 25.4


@wrong("11.1", "a scale for each channel")
def which_scale():
    return [0.4, 2 / 127.5], 0.4, [2.54, 1.1, 0.3, -0.06], [2.4, 1.2, 0.4, 0.0], 25.4


@wrong("11.1", "does not cut: 127.5 is read back as 128 steps")
def which_scale():
    return [0.4, 0.02], 0.4, [2.56, 1.1, 0.3, -0.06], [2.4, 1.2, 0.4, 0.0], 25.4


@wrong("11.1", "rounds down")
def which_scale():
    return [0.4, 0.02], 0.4, [2.54, 1.1, 0.3, -0.06], [2.4, 0.8, 0.0, -0.4], 25.4


@wrong("11.1", "answers with integers")
def which_scale():
    return [0.4, 0.02], 0.4, [127, 55, 15, -3], [6, 3, 1, 0], 127


@wrong("11.1", "the static scale grows with what comes")
def which_scale():
    return [0.4, 0.02], 0.4, [2.54, 1.1, 0.3, -0.06], [2.4, 1.2, 0.4, 0.0], 50.8


@alternative("11.1", "reckoned, not written down")
def which_scale():
    def back(row, scale):
        return [max(-128, min(127, round(x / scale))) * scale for x in row]

    one, two = [51, 2, -1, 0.4], [2.55, 1.1, 0.3, -0.06]
    scales = [max(map(abs, row)) / 127.5 for row in (one, two)]
    whole = max(scales)
    return scales, whole, back(two, scales[1]), back(two, whole), back([51], 25.5 / 127.5)[0]


@alternative("11.1", "tensors")
def which_scale():
    two = torch.tensor([2.55, 1.1, 0.3, -0.06])
    own = (two / 0.02).round().clamp(-128, 127) * 0.02
    shared = (two / 0.4).round().clamp(-128, 127) * 0.4
    return torch.tensor([0.4, 0.02]), torch.tensor(0.4), own, shared, torch.tensor(25.4)


# ---- 11.2 -----------------------------------------------------------------------------------------------------------

RIGHT = ([8.0, 1.0], [2.0, 1.0], [2.0, 1.0], [-5.0, 2.5], [0.25, 0.5], [16.0, 1.0])


def but(**parts):
    """The right answer but for some parts, by number."""
    return tuple(parts.get(f"_{i}", part) for i, part in enumerate(RIGHT))


@wrong("11.2", "the maxima keep their signs: channel 1 counts with 8, column 2 with 0.5")
def migrate():
    return but(_0=[32**0.5, 2**0.5], _5=[8.0, 1.0])


@wrong("11.2", "no root")
def migrate():
    return but(_0=[64.0, 1.0], _1=[0.25, 1.0], _2=[16.0, 1.0])


@wrong("11.2", "alpha belongs to the weights")
def migrate():
    return but(_5=[4.0, 1.0])


@wrong("11.2", "multiplies X and divides W")
def migrate():
    return but(_1=[128.0, 1.0], _2=[1 / 32, 1.0])


@wrong("11.2", "rows of W instead of columns")
def migrate():
    return but(_0=[4.0, 2**0.5], _1=[4.0, 1 / 2**0.5])


@wrong("11.2", "W is not scaled, so y changes")
def migrate():
    return but(_2=[0.25, 1.0], _3=[-1.5, 0.75])


@wrong("11.2", "y is that of the second token")
def migrate():
    return but(_3=[1.5, -0.75])


@wrong("11.2", "the norm's weight is multiplied")
def migrate():
    return but(_4=[16.0, 0.5])


@wrong("11.2", "sizes with their signs")
def migrate():
    return but(_1=[-2.0, 1.0], _2=[2.0, -1.0])


@alternative("11.2", "reckoned, not written down")
def migrate():
    x, w = torch.tensor([[-16.0, 1.0], [8.0, 0.5]]), torch.tensor([[0.25, -1.0], [-0.125, 0.5]])
    x_max, w_max = x.abs().amax(0), w.abs().amax(0)
    s = (x_max / w_max).sqrt()
    y = (x[0] / s) @ (w * s).T
    return s, (x / s).abs().amax(0), (w * s).abs().amax(0), y, torch.tensor([2.0, 0.5]) / s, x_max


@alternative("11.2", "whole numbers and tuples")
def migrate():
    return (8, 1), (2, 1), (2, 1), (-5, 5 / 2), (1 / 4, 1 / 2), (16, 1)


# ---- 11.3 -----------------------------------------------------------------------------------------------------------


class RightFactors:
    """As the statement says; what subclasses change is what can be wrong."""

    def __call__(self, batches, weights, alpha):
        self.refuse(alpha)
        return self.result(self.largest(batches), self.of_weights(weights), alpha)

    def refuse(self, alpha):
        if not 0 <= alpha <= 1:
            raise ValueError("alpha: expected 0 to 1")

    def size(self, x):
        return x.float().abs()

    def real(self, x, lengths):
        return x[torch.arange(x.shape[1]) < lengths[:, None]]  # [tokens, K]

    def largest(self, batches):
        x_max = None
        for x, lengths in batches:
            rows = self.size(self.real(x, lengths))
            if len(rows):
                new = rows.amax(0)
                x_max = new if x_max is None else torch.maximum(x_max, new)
        if x_max is None:
            raise ValueError("batches: expected a token")
        return x_max

    def of_weights(self, weights):
        return torch.stack([w.float().abs().amax(0) for w in weights]).amax(0)

    def result(self, x_max, w_max, alpha):
        s = x_max**alpha / w_max ** (1 - alpha)
        return x_max, torch.where((x_max == 0) | (w_max == 0), 1.0, s)


def of(cls):
    """The function that a subclass stands for."""

    def smoothing_factors(batches, weights, alpha):
        return cls()(batches, weights, alpha)

    return smoothing_factors


def variant(mark):
    """Mark the function of a class."""
    return lambda cls: mark(of(cls))


@variant(alternative("11.3", "a running maximum"))
class Running(RightFactors):
    pass


@variant(alternative("11.3", "sequence by sequence, without a mask; logarithms"))
class Sequences(RightFactors):
    def real(self, x, lengths):
        return torch.cat([row[:n] for row, n in zip(x, lengths.tolist(), strict=True)])

    def result(self, x_max, w_max, alpha):
        dead = (x_max == 0) | (w_max == 0)
        log = alpha * x_max.masked_fill(dead, 1).log() - (1 - alpha) * w_max.masked_fill(dead, 1).log()
        return x_max, log.exp()


@variant(alternative("11.3", "padding filled with 0, and tokens counted apart"))
class Filled(RightFactors):
    def largest(self, batches):
        pairs = list(batches)
        if not sum(int(n.sum()) for _, n in pairs):
            raise ValueError("batches: no token")
        rows = [x.float().masked_fill(torch.arange(x.shape[1])[:, None] >= n[:, None, None], 0) for x, n in pairs]
        return torch.stack([x.abs().amax((0, 1)) for x in rows]).amax(0)


@variant(wrong("11.3", "no abs"))
class NoAbs(RightFactors):
    def size(self, x):
        return x.float()


@variant(wrong("11.3", "abs after the maximum"))
class AbsLate(RightFactors):
    def size(self, x):
        return x.float()

    def largest(self, batches):
        return super().largest(batches).abs()


@variant(wrong("11.3", "the weights' maxima without abs"))
class WeightsNoAbs(RightFactors):
    def of_weights(self, weights):
        return torch.stack([w.float().amax(0) for w in weights]).amax(0)


@variant(wrong("11.3", "the weights' maxima, abs late"))
class WeightsAbsLate(RightFactors):
    def of_weights(self, weights):
        return torch.stack([w.float().amax(0) for w in weights]).amax(0).abs()


@variant(wrong("11.3", "the last batch replaces the others"))
class LastBatch(RightFactors):
    def largest(self, batches):
        return super().largest(list(batches)[-1:])


@variant(wrong("11.3", "the first batch alone"))
class FirstBatch(RightFactors):
    def largest(self, batches):
        return super().largest(list(batches)[:1])


@variant(wrong("11.3", "the mean of the batches' maxima"))
class MeanOfBatches(RightFactors):
    def largest(self, batches):
        return torch.stack([super(MeanOfBatches, self).largest([pair]) for pair in batches]).mean(0)


@variant(wrong("11.3", "the mean over tokens"))
class MeanOverTokens(RightFactors):
    def largest(self, batches):
        return self.size(torch.cat([self.real(*pair) for pair in batches])).mean(0)


@variant(wrong("11.3", "padding counts"))
class Padding(RightFactors):
    def real(self, x, lengths):
        return x.flatten(0, 1)


@variant(wrong("11.3", "padding times 0: NaN and infinity stay NaN"))
class TimesMask(RightFactors):
    def real(self, x, lengths):
        return (x * (torch.arange(x.shape[1]) < lengths[:, None])[..., None]).flatten(0, 1)


@variant(wrong("11.3", "NaN alone is taken for padding"))
class NanIsPadding(RightFactors):
    def real(self, x, lengths):
        rows = x.flatten(0, 1)
        return rows[~rows.isnan().any(-1)]


@variant(wrong("11.3", "one token too many a sequence"))
class OneMore(RightFactors):
    def real(self, x, lengths):
        return x[torch.arange(x.shape[1]) <= lengths[:, None]]


@variant(wrong("11.3", "one token too few a sequence"))
class OneLess(RightFactors):
    def real(self, x, lengths):
        return x[torch.arange(x.shape[1]) < lengths[:, None] - 1]


@variant(wrong("11.3", "padding lies in front"))
class PaddingLeft(RightFactors):
    def real(self, x, lengths):
        return x[torch.arange(x.shape[1]) >= x.shape[1] - lengths[:, None]]


@variant(wrong("11.3", "lengths of the first sequence for all"))
class FirstLength(RightFactors):
    def real(self, x, lengths):
        return x[:, : lengths[0]].flatten(0, 1)


@variant(wrong("11.3", "the first weight alone"))
class FirstWeight(RightFactors):
    def of_weights(self, weights):
        return super().of_weights(weights[:1])


@variant(wrong("11.3", "the mean of the weights' maxima"))
class MeanOfWeights(RightFactors):
    def of_weights(self, weights):
        return torch.stack([w.float().abs().amax(0) for w in weights]).mean(0)


@variant(wrong("11.3", "alpha and 1 - alpha exchanged"))
class Exchanged(RightFactors):
    def result(self, x_max, w_max, alpha):
        return super().result(x_max, w_max, 1 - alpha)


@variant(wrong("11.3", "1 / s"))
class Inverse(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, 1 / super().result(x_max, w_max, alpha)[1]


@variant(wrong("11.3", "multiplied by the weights' power"))
class Times(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, super().result(x_max, 1 / w_max.clamp(min=1e-30), alpha)[1]


@variant(wrong("11.3", "scaled to a geometric mean of 1"))
class Scaled(RightFactors):
    def result(self, x_max, w_max, alpha):
        _, s = super().result(x_max, w_max, alpha)
        return x_max, s / s.log().mean().exp()


@variant(wrong("11.3", "channels of zeros get 0 or infinity"))
class Dead(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, x_max**alpha / w_max ** (1 - alpha)


@variant(wrong("11.3", "zeros of x alone are looked at"))
class DeadX(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, torch.where(x_max == 0, 1.0, x_max**alpha / w_max ** (1 - alpha))


@variant(wrong("11.3", "zeros of w alone are looked at"))
class DeadW(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, torch.where(w_max == 0, 1.0, x_max**alpha / w_max ** (1 - alpha))


@variant(wrong("11.3", "clamped to 1e-5, as the paper's code does"))
class Clamped(RightFactors):
    def result(self, x_max, w_max, alpha):
        return x_max, (x_max**alpha / w_max.clamp(min=1e-5) ** (1 - alpha)).clamp(min=1e-5)


@variant(wrong("11.3", "x_max of a dead channel is 1, too"))
class DeadIsOne(RightFactors):
    def result(self, x_max, w_max, alpha):
        _, s = super().result(x_max, w_max, alpha)
        return torch.where(x_max == 0, 1.0, x_max), s


@variant(wrong("11.3", "small numbers count as 0"))
class SmallIsZero(RightFactors):
    def result(self, x_max, w_max, alpha):
        small = (x_max < 1e-6) | (w_max < 1e-6)
        return x_max, torch.where(small, 1.0, super().result(x_max, w_max, alpha)[1])


@variant(wrong("11.3", "walks through the batches twice"))
class Twice(RightFactors):
    def largest(self, batches):
        tokens = sum(int(n.sum()) for _, n in batches)
        if tokens == 0:
            raise ValueError("batches: no token")
        return super().largest(batches)


@variant(wrong("11.3", "in the inputs' dtype"))
class InHalf(RightFactors):
    def size(self, x):
        return x.abs()


@variant(wrong("11.3", "powers in the inputs' dtype"))
class PowersInHalf(RightFactors):
    def __call__(self, batches, weights, alpha):
        x_max, s = super().__call__(batches, weights, alpha)
        return x_max, s.to(weights[0].dtype).float()


@variant(wrong("11.3", "takes any alpha"))
class AnyAlpha(RightFactors):
    def refuse(self, alpha):
        pass


@variant(wrong("11.3", "refuses alpha 0 and 1"))
class OpenAlpha(RightFactors):
    def refuse(self, alpha):
        if not 0 < alpha < 1:
            raise ValueError("alpha")


@variant(wrong("11.3", "no token: zeros"))
class NoToken(RightFactors):
    def largest(self, batches):
        x_max = torch.zeros(6)
        for x, lengths in batches:
            rows = self.size(self.real(x, lengths))
            if len(rows):
                x_max = rows.amax(0) if x_max.shape != rows.shape[1:] else torch.maximum(x_max, rows.amax(0))
        return x_max


@variant(wrong("11.3", "abs in place"))
class InPlace(RightFactors):
    def largest(self, batches):
        pairs = [(x.abs_(), n) for x, n in batches]
        return super().largest(pairs)


@variant(wrong("11.3", "fills the padding in place"))
class FillsInPlace(RightFactors):
    def real(self, x, lengths):
        x[torch.arange(x.shape[1]) >= lengths[:, None]] = 0
        return super().real(x, lengths)


@variant(wrong("11.3", "alpha may be NaN"))
class NanAlpha(RightFactors):
    def refuse(self, alpha):
        if alpha < 0 or alpha > 1:
            raise ValueError("alpha")


@variant(wrong("11.3", "alpha is checked roughly"))
class RoughAlpha(RightFactors):
    def refuse(self, alpha):
        super().refuse(round(alpha, 1) if abs(alpha) < 2 else alpha)


@variant(wrong("11.3", "a batch of padding alone is an error"))
class NoEmptyBatch(RightFactors):
    def real(self, x, lengths):
        if not lengths.any():
            raise ValueError("batches: no token")
        return super().real(x, lengths)


@variant(wrong("11.3", "a batch of padding alone ends the walk"))
class EmptyBatchEnds(RightFactors):
    def largest(self, batches):
        pairs = []
        for x, lengths in batches:
            if not lengths.any():
                break
            pairs.append((x, lengths))
        return super().largest(pairs)


@variant(wrong("11.3", "zeros are taken for no token"))
class ZerosAreNothing(RightFactors):
    def largest(self, batches):
        x_max = super().largest(batches)
        if not x_max.any():
            raise ValueError("batches: no token")
        return x_max


@variant(wrong("11.3", "an empty sequence counts with a token if its batch has a full one"))
class OneAtLeast(RightFactors):
    def real(self, x, lengths):
        return super().real(x, lengths.clamp(min=1) if lengths.max() == x.shape[1] else lengths)


@variant(wrong("11.3", "dead channels are those of the first batch"))
class DeadAtFirst(RightFactors):
    def largest(self, batches):
        pairs = list(batches)
        self.first = super().largest(pairs[:1]) if pairs else None
        return super().largest(pairs)

    def result(self, x_max, w_max, alpha):
        return x_max, torch.where(self.first == 0, 1.0, super().result(x_max, w_max, alpha)[1])


@variant(wrong("11.3", "maxima are 1e-12 at least"))
class TinyClamped(RightFactors):
    def result(self, x_max, w_max, alpha):
        _, s = super().result(x_max.clamp(min=1e-12), w_max.clamp(min=1e-12), alpha)
        return x_max, torch.where((x_max == 0) | (w_max == 0), 1.0, s)


@variant(wrong("11.3", "1e-12 is added to w_max"))
class TinyAdded(RightFactors):
    def result(self, x_max, w_max, alpha):
        _, s = super().result(x_max, w_max + 1e-12, alpha)
        return x_max, torch.where(w_max == 0, 1.0, s)


@variant(wrong("11.3", "s is 1e-5 at least"))
class FactorFloor(RightFactors):
    def result(self, x_max, w_max, alpha):
        x_max, s = super().result(x_max, w_max, alpha)
        return x_max, s.clamp(min=1e-5)


@variant(wrong("11.3", "s is 1e4 at most"))
class FactorCeiling(RightFactors):
    def result(self, x_max, w_max, alpha):
        x_max, s = super().result(x_max, w_max, alpha)
        return x_max, s.clamp(max=1e4)


@variant(wrong("11.3", "sizes by way of squares, which underflow"))
class BySquares(RightFactors):
    def size(self, x):
        return x.float().square().sqrt()


@variant(wrong("11.3", "a single channel loses its axis"))
class Squeezed(RightFactors):
    def result(self, x_max, w_max, alpha):
        x_max, s = super().result(x_max, w_max, alpha)
        return x_max.squeeze(), s.squeeze()


@variant(wrong("11.3", "all weights in the dtype of the first"))
class FirstWeightsDtype(RightFactors):
    def of_weights(self, weights):
        return super().of_weights([w.to(weights[0].dtype) for w in weights])


@variant(wrong("11.3", "all batches in the dtype of the first"))
class FirstBatchsDtype(RightFactors):
    dtype = None

    def real(self, x, lengths):
        self.dtype = self.dtype or x.dtype
        return super().real(x, lengths).to(self.dtype)


@variant(wrong("11.3", "contiguous activations alone"))
class ContiguousX(RightFactors):
    def real(self, x, lengths):
        return x.view(-1, x.shape[-1])[(torch.arange(x.shape[1]) < lengths[:, None]).flatten()]


@variant(wrong("11.3", "empties the list of weights"))
class PopsWeights(RightFactors):
    def of_weights(self, weights):
        return super().of_weights([weights.pop() for _ in range(len(weights))])


@variant(wrong("11.3", "the first four batches"))
class FourBatches(RightFactors):
    def largest(self, batches):
        return super().largest(list(batches)[:4])


# ---- 11.4 -----------------------------------------------------------------------------------------------------------


class RightFold:
    """As the statement says; what subclasses change is what can be wrong."""

    FIRST, SECOND = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "router")
    NORM_PARTS = ("weight", "bias")
    DEAD = False

    def __call__(self, layer, s_attention, s_mlp):
        out = dict(layer)
        halves = (("input_layernorm", self.FIRST, s_attention), ("post_attention_layernorm", self.SECOND, s_mlp))
        for norm, readers, s in halves:
            if s is None:
                continue
            for part in self.NORM_PARTS:
                name = f"{norm}.{part}"
                if name in out:
                    out[name] = self.divide(out[name], s)
            for reader in readers:
                name = f"{reader}.weight"
                if name in out:
                    out[name] = self.times(out[name], s)
        return out

    def divide(self, x, s):
        return (x.float() / s).to(x.dtype)

    def times(self, w, s):
        return (w.float() * s).to(w.dtype)


def fold_variant(mark):
    def marked(cls):
        def fold(layer, s_attention, s_mlp):
            return cls()(layer, s_attention, s_mlp)

        return mark(fold)

    return marked


@fold_variant(alternative("11.4", "loops over halves and parts"))
class FoldRight(RightFold):
    pass


@fold_variant(alternative("11.4", "a name at a time; a diagonal matrix; in fp64"))
class FoldByName(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = {}
        for name, x in layer.items():
            module, part = name.split(".")
            first = module == "input_layernorm" or module in self.FIRST
            s = s_attention if first else s_mlp if module not in ("o_proj", "down_proj") else None
            if s is None or (part == "bias" and "norm" not in module):
                out[name] = x.clone()
            elif "norm" in module:
                out[name] = (x.double() / s.double()).to(x.dtype)
            else:
                out[name] = (x.double() @ torch.diag(s.double())).to(x.dtype)
        return out


@fold_variant(wrong("11.4", "forgets k_proj"))
class NoK(RightFold):
    FIRST = ("q_proj", "v_proj")


@fold_variant(wrong("11.4", "forgets v_proj"))
class NoV(RightFold):
    FIRST = ("q_proj", "k_proj")


@fold_variant(wrong("11.4", "forgets up_proj"))
class NoUp(RightFold):
    SECOND = ("gate_proj", "router")


@fold_variant(wrong("11.4", "forgets the router"))
class NoRouter(RightFold):
    SECOND = ("gate_proj", "up_proj")


@fold_variant(wrong("11.4", "q_proj alone"))
class QAlone(RightFold):
    FIRST = ("q_proj",)


@fold_variant(wrong("11.4", "o_proj is taken for a reader"))
class ReadsO(RightFold):
    FIRST = (*RightFold.FIRST, "o_proj")


@fold_variant(wrong("11.4", "down_proj's rows are scaled"))
class WithDown(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        if s_mlp is not None:
            out["down_proj.weight"] = (out["down_proj.weight"].float() / s_mlp[:, None]).to(
                out["down_proj.weight"].dtype
            )
        return out


@fold_variant(wrong("11.4", "norms are multiplied, readers divided"))
class Upside(RightFold):
    def divide(self, x, s):
        return super().times(x, s)

    def times(self, w, s):
        return super().divide(w, s)


@fold_variant(wrong("11.4", "readers alone"))
class ReadersAlone(RightFold):
    NORM_PARTS = ()


@fold_variant(wrong("11.4", "norms alone"))
class NormsAlone(RightFold):
    FIRST = SECOND = ()


@fold_variant(wrong("11.4", "a norm's bias stays"))
class NormBias(RightFold):
    NORM_PARTS = ("weight",)


@fold_variant(wrong("11.4", "projections' biases are scaled where they fit"))
class Biases(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        if s_attention is not None and "q_proj.bias" in out:
            out["q_proj.bias"] = self.times(out["q_proj.bias"], s_attention)
        return out


@fold_variant(wrong("11.4", "needs biases"))
class NeedsBiases(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        layer["input_layernorm.bias"]
        return super().__call__(layer, s_attention, s_mlp)


@fold_variant(wrong("11.4", "rows are scaled where that is possible"))
class Rows(RightFold):
    def times(self, w, s):
        return super().times(w.T, s).T if len(w) == len(s) else super().times(w, s)


@fold_variant(wrong("11.4", "both halves with the first s"))
class OneS(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        return super().__call__(layer, s_attention, s_attention)


@fold_variant(wrong("11.4", "the halves' s exchanged"))
class Exchange(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        return super().__call__(layer, s_mlp, s_attention)


@fold_variant(wrong("11.4", "readers of the second half follow the first norm"))
class Crossed(RightFold):
    FIRST, SECOND = RightFold.SECOND, RightFold.FIRST


@fold_variant(wrong("11.4", "None is taken for an s of 1, which fails"))
class NeedsS(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        assert s_attention is not None
        return super().__call__(layer, s_attention, s_mlp)


@fold_variant(wrong("11.4", "None leaves both halves alone"))
class NoneForBoth(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        if s_attention is None or s_mlp is None:
            return dict(layer)
        return super().__call__(layer, s_attention, s_mlp)


@fold_variant(wrong("11.4", "everything in fp32"))
class ToFloat(RightFold):
    def times(self, w, s):
        return w.float() * s


@fold_variant(wrong("11.4", "the norm in fp32"))
class NormToFloat(RightFold):
    def divide(self, x, s):
        return x.float() / s


@fold_variant(wrong("11.4", "s is rounded to the weights' dtype"))
class RoundsS(RightFold):
    def times(self, w, s):
        return w * s.to(w.dtype)

    def divide(self, x, s):
        return x / s.to(x.dtype)


@fold_variant(wrong("11.4", "1 / s is rounded before the norm is multiplied by it"))
class RoundsInverse(RightFold):
    def divide(self, x, s):
        return x * (1 / s).to(x.dtype)


@fold_variant(wrong("11.4", "in place"))
class FoldInPlace(RightFold):
    def times(self, w, s):
        return w.mul_(s) if w.dtype == s.dtype else super().times(w, s)


@fold_variant(wrong("11.4", "norms in place"))
class NormInPlace(RightFold):
    def divide(self, x, s):
        return x.div_(s) if x.dtype == s.dtype else super().divide(x, s)


@fold_variant(wrong("11.4", "into the given dictionary"))
class SameDictionary(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        layer.update(super().__call__(layer, s_attention, s_mlp))
        return layer


@fold_variant(wrong("11.4", "returns what has changed alone"))
class ChangedAlone(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        return {name: x for name, x in out.items() if x is not layer[name]}


@fold_variant(wrong("11.4", "hands back the given dictionary where nothing changes"))
class SameIfNone(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        return layer if s_attention is None and s_mlp is None else super().__call__(layer, s_attention, s_mlp)


@fold_variant(wrong("11.4", "into the given dictionary if the second half stays"))
class SameIfOne(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        if s_mlp is None:
            layer.update(out)
        return out


class FoldNames(RightFold):
    """Computes some tensors in another way than the rest."""

    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        for name, x in layer.items():
            if out[name] is not x:
                s = s_attention if name.startswith("input") or name.split(".")[0] in self.FIRST else s_mlp
                out[name] = self.again(name, x, s, out[name], layer)
        return out


@fold_variant(wrong("11.4", "a norm's bias in fp32"))
class BiasToFloat(FoldNames):
    def again(self, name, x, s, y, layer):
        return x.float() / s if name.endswith("bias") else y


@fold_variant(wrong("11.4", "a norm's bias is divided in its dtype"))
class BiasRounded(FoldNames):
    def again(self, name, x, s, y, layer):
        return x / s.to(x.dtype) if name.endswith("bias") else y


@fold_variant(wrong("11.4", "the second norm is divided in its dtype"))
class SecondRounded(FoldNames):
    def again(self, name, x, s, y, layer):
        return x / s.to(x.dtype) if name.startswith("post") else y


@fold_variant(wrong("11.4", "k, up and router are scaled in their dtype"))
class SomeRounded(FoldNames):
    def again(self, name, x, s, y, layer):
        return x * s.to(x.dtype) if name[0] in "kur" else y


@fold_variant(wrong("11.4", "the router in fp32"))
class RouterToFloat(FoldNames):
    def again(self, name, x, s, y, layer):
        return x.float() * s if name.startswith("router") else y


@fold_variant(wrong("11.4", "everything in q_proj's dtype"))
class DtypeOfQ(FoldNames):
    def again(self, name, x, s, y, layer):
        return y.to(layer["q_proj.weight"].dtype)


@fold_variant(wrong("11.4", "readers in the dtype of their norm"))
class DtypeOfNorm(FoldNames):
    def again(self, name, x, s, y, layer):
        return y.to(layer["input_layernorm.weight"].dtype)


@fold_variant(wrong("11.4", "biases of norms if the first norm has one"))
class FirstNormsBias(FoldNames):
    def again(self, name, x, s, y, layer):
        return x if name.endswith("bias") and "input_layernorm.bias" not in layer else y


@fold_variant(wrong("11.4", "the second norm's bias stays where there is a router"))
class BiasBesideRouter(FoldNames):
    def again(self, name, x, s, y, layer):
        return x if name == "post_attention_layernorm.bias" and "router.weight" in layer else y


@fold_variant(wrong("11.4", "a square down_proj is scaled, too"))
class SquareDown(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        down = out["down_proj.weight"]
        if s_mlp is not None and down.shape[0] == down.shape[1]:
            out["down_proj.weight"] = self.times(down, s_mlp)
        return out


@fold_variant(wrong("11.4", "up_proj's bias is divided where it fits"))
class UpBias(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        if s_mlp is not None and len(out.get("up_proj.bias", [])) == len(s_mlp):
            out["up_proj.bias"] = self.divide(out["up_proj.bias"], s_mlp)
        return out


@fold_variant(wrong("11.4", "a router's bias is divided"))
class RouterBias(RightFold):
    def __call__(self, layer, s_attention, s_mlp):
        out = super().__call__(layer, s_attention, s_mlp)
        if s_mlp is not None and "router.bias" in out:
            out["router.bias"] = self.divide(out["router.bias"], s_mlp[: len(out["router.bias"])])
        return out


@fold_variant(alternative("11.4", "times the inverse, in fp32"))
class TimesInverse(RightFold):
    def divide(self, x, s):
        return (x.float() * (1 / s)).to(x.dtype)


# ---- 11.5 -----------------------------------------------------------------------------------------------------------


@alternative("11.5", "pointers that move along; the scales' product first")
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    ks = tl.arange(0, BLOCK_K)
    x_ptrs, w_ptrs = x_ptr + rows * stride_x + ks[None, :], w_ptr + columns * stride_w + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(tl.cdiv(k, BLOCK_K)):
        left = k - step * BLOCK_K
        x = tl.load(x_ptrs, mask=(rows < m) & (ks[None, :] < left), other=0)
        w = tl.load(w_ptrs, mask=(columns < n) & (ks[:, None] < left), other=0)
        acc += tl.dot(x, w, out_dtype=tl.int32)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < n, other=0.0)
    y = acc.to(tl.float32) * (x_scale * w_scale) + tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    tl.store(y_ptr + rows * n + columns, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


@alternative("11.5", "w loaded as it lies, and turned")
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, k, BLOCK_K):
        ks = (start + tl.arange(0, BLOCK_K))[None, :]
        x = tl.load(x_ptr + rows[:, None] * stride_x + ks, mask=(rows[:, None] < m) & (ks < k), other=0)
        w = tl.load(w_ptr + columns[:, None] * stride_w + ks, mask=(columns[:, None] < n) & (ks < k), other=0)
        acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
    y = acc.to(tl.float32) * tl.load(w_scale_ptr + columns, mask=columns < n)[None, :]
    y = y * tl.load(x_scale_ptr + rows, mask=rows < m)[:, None]
    y += tl.load(bias_ptr + columns, mask=columns < n)[None, :]
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@alternative("11.5", "int32 by itself, and scales by promotion; the store casts")
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for step in tl.range(0, tl.cdiv(k, BLOCK_K)):
        ks = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * stride_x + ks[None, :], mask=(rows < m) & (ks[None, :] < k), other=0)
        w = tl.load(w_ptr + columns * stride_w + ks[:, None], mask=(columns < n) & (ks[:, None] < k), other=0)
        acc += tl.dot(x, w)
    y = acc * tl.load(x_scale_ptr + rows, mask=rows < m) * tl.load(w_scale_ptr + columns, mask=columns < n)
    y += tl.load(bias_ptr + columns, mask=columns < n)
    tl.store(y_ptr + rows * n + columns, y, mask=(rows < m) & (columns < n))


@triton.jit
def flawed_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, MISTAKE: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if MISTAKE == "axes of the grid exchanged":
        rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if MISTAKE == "rows lie k apart":
        stride_x = k
        stride_w = k
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < n, other=0.0)
    if MISTAKE == "scales without a mask":
        x_scale = tl.load(x_scale_ptr + rows)
        w_scale = tl.load(w_scale_ptr + columns)
    if MISTAKE == "the first row's scale for all":
        x_scale = tl.load(x_scale_ptr + 0 * rows)
    if MISTAKE == "x's scales along the columns":
        x_scale = tl.load(x_scale_ptr + rows * 0 + columns % m, mask=rows < m, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    if MISTAKE == "sums in fp32" or MISTAKE == "scales x first" or MISTAKE == "scales within the sum":
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    end = k
    x_end = k
    w_end = k
    if MISTAKE == "masks x along k by the rows' distance" or MISTAKE == "masks both along k by the rows' distance":
        x_end = stride_x
    if MISTAKE == "masks both along k by the rows' distance":
        w_end = stride_w
    if MISTAKE == "walks to the rows' distance":
        x_end = stride_x
        end = stride_x
    if MISTAKE == "whole blocks of k alone":
        end = k // BLOCK_K * BLOCK_K
    for start in range(0, end, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_mask = (rows[:, None] < m) & (ks[None, :] < x_end)
        w_mask = (ks[:, None] < w_end) & (columns[None, :] < n)
        if MISTAKE == "no mask along k":
            x_mask = (rows[:, None] < m) & (ks[None, :] >= 0)
            w_mask = (columns[None, :] < n) & (ks[:, None] >= 0)
        if MISTAKE == "no mask of x's rows":
            x_mask = (rows[:, None] >= 0) & (ks[None, :] < k)
        if MISTAKE == "no mask of w's rows":
            w_mask = (columns[None, :] >= 0) & (ks[:, None] < k)
        x = tl.load(x_ptr + rows[:, None] * stride_x + ks[None, :], mask=x_mask, other=0)
        w = tl.load(w_ptr + columns[None, :] * stride_w + ks[:, None], mask=w_mask, other=0)
        if MISTAKE == "loads twice":
            x = tl.load(x_ptr + rows[:, None] * stride_x + ks[None, :], mask=x_mask, other=0)
        if MISTAKE == "sums in fp32":
            acc = tl.dot(x.to(tl.float32), w.to(tl.float32), acc, input_precision="ieee")
        elif MISTAKE == "scales x first":
            acc = tl.dot(x.to(tl.float32) * x_scale[:, None], w.to(tl.float32), acc, input_precision="ieee")
        elif MISTAKE == "scales within the sum":
            product = tl.dot(x, w, out_dtype=tl.int32).to(tl.float32)
            acc = acc * x_scale[:, None] * w_scale[None, :] + product
        elif MISTAKE == "keeps the last step":
            acc = tl.dot(x, w, out_dtype=tl.int32)
        elif MISTAKE == "sums wrap in int16":
            acc = tl.dot(x, w, acc, out_dtype=tl.int32).to(tl.int16).to(tl.int32)
        else:
            acc = tl.dot(x, w, acc, out_dtype=tl.int32)
    sums = acc.to(tl.float32)
    if MISTAKE == "24 bits of the sums":
        sums = ((acc << 8) >> 8).to(tl.float32)
    if MISTAKE == "the bias rounded to y's dtype":
        bias = bias.to(y_ptr.dtype.element_ty).to(tl.float32)
    if MISTAKE == "x's scales rounded to y's dtype":
        x_scale = x_scale.to(y_ptr.dtype.element_ty).to(tl.float32)
    if MISTAKE == "w's scales rounded to y's dtype":
        w_scale = w_scale.to(y_ptr.dtype.element_ty).to(tl.float32)
    if y_ptr.dtype.element_ty == tl.bfloat16:
        if MISTAKE == "x's scales rounded to bf16":
            x_scale = x_scale.to(tl.bfloat16).to(tl.float32)
        if MISTAKE == "the bias rounded to bf16":
            bias = bias.to(tl.bfloat16).to(tl.float32)
    if MISTAKE == "sums to y's dtype before the scales":
        sums = acc.to(y_ptr.dtype.element_ty).to(tl.float32)
    y = sums * x_scale[:, None] * w_scale[None, :] + bias[None, :]
    if MISTAKE == "no bias":
        y = sums * x_scale[:, None] * w_scale[None, :]
    if MISTAKE == "the bias is scaled":
        y = (sums + bias[None, :]) * x_scale[:, None] * w_scale[None, :]
    if MISTAKE == "no scales of x":
        y = sums * w_scale[None, :] + bias[None, :]
    if MISTAKE == "no scales of w":
        y = sums * x_scale[:, None] + bias[None, :]
    if MISTAKE == "divides by the scales":
        y = sums / tl.where(x_scale > 0, x_scale, 1.0)[:, None] / tl.where(w_scale > 0, w_scale, 1.0)[None, :]
        y += bias[None, :]
    if MISTAKE == "rounds before the bias":
        y = (sums * x_scale[:, None] * w_scale[None, :]).to(y_ptr.dtype.element_ty).to(tl.float32) + bias[None, :]
    if MISTAKE == "rounds y to whole numbers":
        y = y.to(tl.int32).to(tl.float32)
    if MISTAKE == "bf16 by way of fp16" and y_ptr.dtype.element_ty == tl.bfloat16:
        y = y.to(tl.float16).to(tl.float32)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    if MISTAKE == "stores without a mask of rows":
        inside = (rows[:, None] >= 0) & (columns[None, :] < n)
    if MISTAKE == "stores without a mask of columns":
        inside = (rows[:, None] < m) & (columns[None, :] >= 0)
    tl.store(y_ptr + rows[:, None] * n + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


class Flawed:
    """`flawed_kernel` with one of its mistakes, launched as the kernel is."""

    def __init__(self, mistake):
        self.mistake = mistake

    def __getitem__(self, grid):
        return lambda *args, **sizes: flawed_kernel[grid](*args, MISTAKE=self.mistake, **sizes)


for mistake in (
    "axes of the grid exchanged", "rows lie k apart", "scales without a mask", "the first row's scale for all",
    "x's scales along the columns", "sums in fp32", "scales x first", "scales within the sum",
    "whole blocks of k alone", "no mask along k", "no mask of x's rows", "no mask of w's rows", "loads twice",
    "keeps the last step", "sums wrap in int16", "sums to y's dtype before the scales", "no bias",
    "the bias is scaled", "no scales of x", "no scales of w", "divides by the scales", "rounds before the bias",
    "rounds y to whole numbers", "stores without a mask of rows", "stores without a mask of columns",
    "masks x along k by the rows' distance", "masks both along k by the rows' distance", "walks to the rows' distance",
    "24 bits of the sums", "the bias rounded to y's dtype", "x's scales rounded to y's dtype",
    "w's scales rounded to y's dtype", "x's scales rounded to bf16", "the bias rounded to bf16", "bf16 by way of fp16",
):  # fmt: skip
    wrong("11.5", mistake)(Flawed(mistake))
alternative("11.5", "the kernel of the mistakes, without one")(Flawed(""))


@alternative("11.5", "block pointers")
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    top, left = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    xs = tl.make_block_ptr(x_ptr, (m, k), (stride_x, 1), (top, 0), (BLOCK_M, BLOCK_K), (1, 0))
    ws = tl.make_block_ptr(w_ptr, (k, n), (1, stride_w), (0, left), (BLOCK_K, BLOCK_N), (0, 1))
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for _ in range(0, k, BLOCK_K):
        x = tl.load(xs, boundary_check=(0, 1), padding_option="zero")
        w = tl.load(ws, boundary_check=(0, 1), padding_option="zero")
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        xs, ws = tl.advance(xs, (0, BLOCK_K)), tl.advance(ws, (BLOCK_K, 0))
    rows, columns = top + tl.arange(0, BLOCK_M), left + tl.arange(0, BLOCK_N)
    y = acc * tl.load(x_scale_ptr + rows, mask=rows < m)[:, None]
    y = y * tl.load(w_scale_ptr + columns, mask=columns < n) + tl.load(bias_ptr + columns, mask=columns < n)
    ys = tl.make_block_ptr(y_ptr, (m, n), (n, 1), (top, left), (BLOCK_M, BLOCK_N), (1, 0))
    tl.store(ys, y.to(y_ptr.dtype.element_ty), boundary_check=(0, 1))


@wrong("11.5", "does not compile: an accumulator that is a number before the loop")
@triton.jit
def int8_matmul_kernel(
    x_ptr, w_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, y_ptr, m, n, k, stride_x, stride_w,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    acc = 0
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * stride_x + ks[None, :], mask=(rows < m) & (ks[None, :] < k), other=0)
        w = tl.load(w_ptr + columns * stride_w + ks[:, None], mask=(columns < n) & (ks[:, None] < k), other=0)
        acc += tl.dot(x, w, out_dtype=tl.int32)
    x_scale = tl.load(x_scale_ptr + rows, mask=rows < m, other=0.0)
    w_scale = tl.load(w_scale_ptr + columns, mask=columns < n, other=0.0)
    y = acc.to(tl.float32) * x_scale * w_scale + tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    tl.store(y_ptr + rows * n + columns, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


# ---- 11.6 -----------------------------------------------------------------------------------------------------------


class RightLayer:
    """As it is meant to be; what subclasses change is what can be wrong."""

    @classmethod
    def factors(cls, x, w, alpha):
        return cls.x_max(x) ** alpha / cls.w_max(w) ** (1 - alpha)

    @classmethod
    def x_max(cls, x):
        return x.flatten(0, 1).abs().amax(0)

    @classmethod
    def w_max(cls, w):
        return w.abs().amax(0)

    @classmethod
    def half(cls, bits):
        return (2**bits - 1) / 2

    @classmethod
    def quantize(cls, rows, bits):
        scale = rows.abs().amax(1, keepdim=True) / cls.half(bits)
        return cls.whole(rows / scale, bits), scale

    @classmethod
    def whole(cls, x, bits):
        return x.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)

    @classmethod
    def product(cls, x, w, s, bits):
        x_q, x_scale = cls.quantize_tokens(x / s, bits)
        w_q, w_scale = cls.quantize(w * s, bits)
        return (x_q.float() @ w_q.float().T) * x_scale * w_scale[:, 0]

    @classmethod
    def quantize_tokens(cls, x, bits):
        q, scale = cls.quantize(x.flatten(0, 1), bits)
        return q.view(x.shape), scale.view(*x.shape[:-1], 1)


@alternative("11.6", "small methods, products in fp32")
class Mended(RightLayer):
    pass


@alternative("11.6", "reads back first, then multiplies")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        x_q, x_scale = cls.quantize_tokens(x / s, bits)
        w_q, w_scale = cls.quantize(w * s, bits)
        return (x_q * x_scale) @ (w_q * w_scale).T


@alternative("11.6", "2 |x| over the number of steps; logarithms; token by token")
class Mended(RightLayer):
    @classmethod
    def factors(cls, x, w, alpha):
        return (alpha * cls.x_max(x).log() - (1 - alpha) * cls.w_max(w).log()).exp()

    @classmethod
    def quantize(cls, rows, bits):
        scale = 2 * torch.maximum(rows.amax(1), -rows.amin(1))[:, None] / (2**bits - 1)
        return cls.whole(rows / scale, bits), scale

    @classmethod
    def quantize_tokens(cls, x, bits):
        parts = [cls.quantize(token[None], bits) for sequence in x for token in sequence]
        q, scale = torch.cat([q for q, _ in parts]), torch.cat([scale for _, scale in parts])
        return q.view(x.shape), scale.view(*x.shape[:-1], 1)


@alternative("11.6", "multiplies by the inverse of the scale; products in fp64")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        largest = rows.abs().max(1, keepdim=True).values
        return cls.whole(rows * (cls.half(bits) / largest), bits), largest / cls.half(bits)

    @classmethod
    def product(cls, x, w, s, bits):
        x_q, x_scale = cls.quantize_tokens(x / s, bits)
        w_q, w_scale = cls.quantize(w * s, bits)
        return (x_q.double() @ w_q.double().T * x_scale * w_scale[:, 0]).float()


class SequenceScales(RightLayer):
    @classmethod
    def quantize_tokens(cls, x, bits):
        q, scale = cls.quantize(x.flatten(1), bits)
        return q.view(x.shape), scale[:, None]


@wrong("11.6", "as it was")
class Mended(SequenceScales):
    @classmethod
    def x_max(cls, x):
        return x.flatten(0, 1).amax(0).abs()

    @classmethod
    def half(cls, bits):
        return 2 ** (bits - 1) - 1


@wrong("11.6", "abs still after the maximum")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return x.flatten(0, 1).amax(0).abs()


@wrong("11.6", "no abs at all")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return x.flatten(0, 1).amax(0)


@wrong("11.6", "the sign of the weights' largest number is looked at late")
class Mended(RightLayer):
    @classmethod
    def w_max(cls, w):
        return w.amax(0).abs()


@wrong("11.6", "maxima of the first sequence")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return x[0].abs().amax(0)


@wrong("11.6", "the mean of the sequences' maxima")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return x.abs().amax(1).mean(0)


@wrong("11.6", "still 7")
class Mended(RightLayer):
    @classmethod
    def half(cls, bits):
        return 2 ** (bits - 1) - 1


@wrong("11.6", "8")
class Mended(RightLayer):
    @classmethod
    def half(cls, bits):
        return 2 ** (bits - 1)


@wrong("11.6", "127.5 whatever the bits")
class Mended(RightLayer):
    @classmethod
    def half(cls, bits):
        return 127.5


@wrong("11.6", "7.5, and cut to -7 ... 7")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return x.round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1).to(torch.int8)


@wrong("11.6", "7.5, and not cut at the upper end")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return x.round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)


@wrong("11.6", "does not cut")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return x.round().to(torch.int8)


@wrong("11.6", "cut to 8 bits whatever the bits")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return x.round().clamp(-128, 127).to(torch.int8)


@wrong("11.6", "truncates")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return x.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)


@wrong("11.6", "7.5 for the integers, 7 in the scale that is returned")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        q, scale = super().quantize(rows, bits)
        return q, scale * cls.half(bits) / (2 ** (bits - 1) - 1)


@wrong("11.6", "still a scale a sequence")
class Mended(SequenceScales):
    pass


@wrong("11.6", "a scale for the whole batch")
class Mended(RightLayer):
    @classmethod
    def quantize_tokens(cls, x, bits):
        q, scale = cls.quantize(x.reshape(1, -1), bits)
        return q.view(x.shape), scale[None]


@wrong("11.6", "a scale for each place in the sequences, over the batch")
class Mended(RightLayer):
    @classmethod
    def quantize_tokens(cls, x, bits):
        q, scale = cls.quantize(x.transpose(0, 1).flatten(1), bits)
        return q.view(x.shape[1], x.shape[0], -1).transpose(0, 1), scale[None]


@wrong("11.6", "mended by not rounding x")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        w_q, w_scale = cls.quantize(w * s, bits)
        return (x / s) @ (w_q * w_scale).T


@wrong("11.6", "multiplies x and divides w: exact, and worse")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x, w, 1 / s, bits)


@wrong("11.6", "leaves s out")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x, w, torch.ones_like(s), bits)


@wrong("11.6", "one scale for all of w")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        x_q, x_scale = cls.quantize_tokens(x / s, bits)
        w_q, w_scale = cls.quantize((w * s).reshape(1, -1), bits)
        return (x_q.float() @ w_q.view(w.shape).float().T) * x_scale * w_scale


@wrong("11.6", "sums of int8 in int8")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        x_q, x_scale = cls.quantize_tokens(x / s, bits)
        w_q, w_scale = cls.quantize(w * s, bits)
        sums = (x_q[:, :, None].int() * w_q.int()).to(torch.int8).sum(-1)
        return sums * x_scale * w_scale[:, 0]


@wrong("11.6", "8 bits whatever was asked")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x, w, s, 8)


@wrong("11.6", "divides x in place")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x.div_(s), w, torch.ones_like(s), bits) if bits > 8 else cls._in_place(x, w, s, bits)

    @classmethod
    def _in_place(cls, x, w, s, bits):
        y = RightLayer.product(x, w, s, bits)
        x.div_(s)
        return y


@wrong("11.6", "a step is 1e-8 at least")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        scale = (rows.abs().amax(1, keepdim=True) / cls.half(bits)).clamp(min=1e-8)
        return cls.whole(rows / scale, bits), scale


@wrong("11.6", "1e-8 is added to a step")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        scale = rows.abs().amax(1, keepdim=True) / cls.half(bits) + 1e-8
        return cls.whole(rows / scale, bits), scale


@wrong("11.6", "steps of 6 bits are rounded to bf16")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        q, scale = super().quantize(rows, bits)
        return q, scale.bfloat16().float() if bits == 6 else scale


@wrong("11.6", "scales without their axis")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        q, scale = super().quantize(rows, bits)
        return q, scale[:, 0]

    @classmethod
    def product(cls, x, w, s, bits):
        return RightLayer.product(x, w, s, bits)


@wrong("11.6", "a single row by its largest number, sign and all")
class Mended(RightLayer):
    @classmethod
    def quantize(cls, rows, bits):
        if len(rows) > 1:
            return super().quantize(rows, bits)
        scale = rows.amax(1, keepdim=True) / cls.half(bits)
        return cls.whole(rows / scale, bits), scale


@wrong("11.6", "ties away from zero")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return super().whole(x.sign() * (x.abs() + 0.5).floor(), bits)


@wrong("11.6", "cut to the ends of 2, 4 and 8 bits alone")
class Mended(RightLayer):
    @classmethod
    def whole(cls, x, bits):
        return super().whole(x, bits if bits in (2, 4) else 8)


@wrong("11.6", "maxima of factors are 1e-5 at least")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return super().x_max(x).clamp(min=1e-5)

    @classmethod
    def w_max(cls, w):
        return super().w_max(w).clamp(min=1e-5)


@wrong("11.6", "factors are 1e-5 at least")
class Mended(RightLayer):
    @classmethod
    def factors(cls, x, w, alpha):
        return super().factors(x, w, alpha).clamp(min=1e-5)


@wrong("11.6", "a square w by its rows")
class Mended(RightLayer):
    @classmethod
    def w_max(cls, w):
        return super().w_max(w.T if w.shape[0] == w.shape[1] else w)


@wrong("11.6", "one scale for the batch where sequences have one token")
class Mended(RightLayer):
    @classmethod
    def quantize_tokens(cls, x, bits):
        if x.shape[1] > 1:
            return super().quantize_tokens(x, bits)
        q, scale = cls.quantize(x.reshape(1, -1), bits)
        return q.view(x.shape), scale


@wrong("11.6", "contiguous activations alone")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x.view(-1, x.shape[-1]).view(x.shape), w, s, bits)


@wrong("11.6", "factors leave out the last token of long sequences")
class Mended(RightLayer):
    @classmethod
    def x_max(cls, x):
        return super().x_max(x[:, :-1] if x.shape[1] > 2 else x)


@wrong("11.6", "divides by s + 1e-6")
class Mended(RightLayer):
    @classmethod
    def product(cls, x, w, s, bits):
        return super().product(x / (s + 1e-6) * s, w, s, bits)


# ---- 11.7 -----------------------------------------------------------------------------------------------------------


class RightCache:
    """As the statement says; what subclasses change is what can be wrong."""

    HALF = 127.5

    def __init__(self, slots, heads, dim):
        self.k, self.v = torch.zeros(2, slots, heads, dim, dtype=torch.int8).unbind(0)
        self.k_scale, self.v_scale = torch.zeros(2, slots, heads).unbind(0)

    def write(self, k, v, slots):
        k, v, slots = self.kept(k, v, slots)
        for name, x in (("k", k), ("v", v)):
            scale = self.scale(x.float())
            getattr(self, name)[slots] = self.whole(x.float() / scale[..., None])
            getattr(self, f"{name}_scale")[slots] = scale

    def kept(self, k, v, slots):
        kept = torch.nonzero(slots != -1).flatten()
        return k[kept], v[kept], slots[kept]

    def scale(self, x):
        scale = x.abs().amax(-1) / self.HALF
        return scale.masked_fill(scale == 0, 1)

    def whole(self, x):
        return x.round().clamp(-128, 127).to(torch.int8)

    def attend(self, q, slots):
        k = self.k[slots] * self.k_scale[slots][..., None]  # [S, H, D]
        v = self.v[slots] * self.v_scale[slots][..., None]
        return self.attention(q, k, v)

    def attention(self, q, k, v):
        groups = len(q) // k.shape[1]
        k, v = (self.spread(x, groups) for x in (k, v))  # [S, H G, D]
        weights = (torch.einsum("hd,shd->hs", q.float(), k) / q.shape[-1] ** 0.5).softmax(-1)
        return torch.einsum("hs,shd->hd", weights, v)

    def spread(self, x, groups):
        return x.repeat_interleave(groups, 1)


@alternative("11.7", "reads back, then einsum")
class Int8Cache(RightCache):
    pass


@alternative("11.7", "row by row, head by head")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        for i, slot in enumerate(slots.tolist()):
            if slot >= 0:
                for h in range(k.shape[1]):
                    for x, held, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
                        row = x[i, h].float()
                        largest = float(row.abs().max())
                        scales[slot, h] = largest / 127.5 or 1.0
                        held[slot, h] = (row / scales[slot, h]).round().clamp(-128, 127).to(torch.int8)


@alternative("11.7", "torch's attention")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        q, k, v = (x.float().transpose(0, 1)[None] for x in (q[None], k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return out[0, :, 0]


@wrong("11.7", "one scale a token, over its heads")
class Int8Cache(RightCache):
    def scale(self, x):
        return super().scale(x).amax(-1, keepdim=True).expand(x.shape[:2]).clone()


@wrong("11.7", "one scale a head, over the tokens that come together")
class Int8Cache(RightCache):
    def scale(self, x):
        scale = super().scale(x)
        return scale.amax(0).expand_as(scale).clone() if len(x) else scale


@wrong("11.7", "one scale for everything that comes")
class Int8Cache(RightCache):
    def scale(self, x):
        scale = super().scale(x)
        return torch.full_like(scale, float(scale.max())) if len(x) else scale


@wrong("11.7", "a static scale")
class Int8Cache(RightCache):
    def scale(self, x):
        return torch.full(x.shape[:2], 0.5)


@wrong("11.7", "over 127")
class Int8Cache(RightCache):
    HALF = 127


@wrong("11.7", "no abs")
class Int8Cache(RightCache):
    def scale(self, x):
        scale = x.amax(-1) / 127.5
        return scale.masked_fill(scale == 0, 1)


@wrong("11.7", "does not cut: 128 wraps to -128")
class Int8Cache(RightCache):
    def whole(self, x):
        return x.round().to(torch.int16).to(torch.int8)


@wrong("11.7", "truncates")
class Int8Cache(RightCache):
    def whole(self, x):
        return x.clamp(-128, 127).to(torch.int8)


@wrong("11.7", "a head of zeros gives NaN")
class Int8Cache(RightCache):
    def scale(self, x):
        return x.abs().amax(-1) / 127.5


@wrong("11.7", "a head of zeros gets a tiny scale")
class Int8Cache(RightCache):
    def scale(self, x):
        return (x.abs().amax(-1) / 127.5).clamp(min=1e-8)


@wrong("11.7", "small heads are cut off at a scale of 0.01")
class Int8Cache(RightCache):
    def scale(self, x):
        return super().scale(x).clamp(min=0.01)


@wrong("11.7", "slot -1 is the last one")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        return k, v, slots


@wrong("11.7", "slot -1 is slot 0")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        return k, v, slots.clamp(min=0)


@wrong("11.7", "slot -1 ends the write")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        count = next((i for i, slot in enumerate(slots.tolist()) if slot < 0), len(slots))
        return k[:count], v[:count], slots[:count]


@wrong("11.7", "rows go to the slots in ascending order")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        k, v, slots = super().kept(k, v, slots)
        return k, v, slots.sort().values


@wrong("11.7", "appends, whatever the slots")
class Int8Cache(RightCache):
    count = 0

    def kept(self, k, v, slots):
        k, v, slots = super().kept(k, v, slots)
        first, self.count = self.count, self.count + len(slots)
        return k, v, torch.arange(first, self.count) % len(self.k)


@wrong("11.7", "the values' scales are the keys'")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        super().write(k, v, slots)
        self.v_scale = self.k_scale


@wrong("11.7", "larger scales stay when a slot is written again")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        before = self.k_scale.clone()
        super().write(k, v, slots)
        self.k_scale = torch.maximum(self.k_scale, before)


@wrong("11.7", "stores fp16 instead of int8")
class Int8Cache(RightCache):
    def __init__(self, slots, heads, dim):
        super().__init__(slots, heads, dim)
        self.k, self.v = self.k.half(), self.v.half()


@wrong("11.7", "scales in fp16")
class Int8Cache(RightCache):
    def __init__(self, slots, heads, dim):
        super().__init__(slots, heads, dim)
        self.k_scale, self.v_scale = self.k_scale.half(), self.v_scale.half()


@wrong("11.7", "scales [slots, H, 1]")
class Int8Cache(RightCache):
    def __init__(self, slots, heads, dim):
        super().__init__(slots, heads, dim)
        self.k_scale = self.k_scale[..., None]


@wrong("11.7", "attends to all slots")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        return super().attend(q, torch.arange(len(self.k)))


@wrong("11.7", "attends to the first slots, as many as are named")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        return super().attend(q, torch.arange(len(slots)))


@wrong("11.7", "attends to the slots up to the largest")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        return super().attend(q, torch.arange(int(slots.max()) + 1))


@wrong("11.7", "query heads are dealt out: h % H")
class Int8Cache(RightCache):
    def spread(self, x, groups):
        return x.repeat(1, groups, 1)


@wrong("11.7", "scores are not divided by √D")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        return super().attention(q * q.shape[-1] ** 0.5, k, v)


@wrong("11.7", "scores are divided by D")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        return super().attention(q / q.shape[-1] ** 0.5, k, v)


@wrong("11.7", "leaves out the keys' scales")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        return self.attention(q, self.k[slots].float(), self.v[slots] * self.v_scale[slots][..., None])


@wrong("11.7", "the values' scales before the softmax")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        k = self.k[slots] * (self.k_scale * self.v_scale)[slots][..., None]
        return self.attention(q, k, self.v[slots].float())


@wrong("11.7", "in q's dtype")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        k, v = (
            (x[slots] * s[slots][..., None]).to(q.dtype) for x, s in ((self.k, self.k_scale), (self.v, self.v_scale))
        )
        return self.attention(q, k.float(), v.float()).to(q.dtype)


@wrong("11.7", "rows are scaled in their own dtype")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        k, v, slots = self.kept(k, v, slots)
        for name, x in (("k", k), ("v", v)):
            scale = self.scale(x)
            getattr(self, name)[slots] = self.whole(x / scale[..., None])
            getattr(self, f"{name}_scale")[slots] = scale.float()


@wrong("11.7", "divides the rows in place")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        super().write(k, v, slots)
        k /= 2


@wrong("11.7", "changes the slots")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        found = super().kept(k, v, slots)
        slots.clamp_(min=0)
        return found


@wrong("11.7", "all caches are one")
class Int8Cache(RightCache):
    held = {}

    def __init__(self, slots, heads, dim):
        super().__init__(slots, heads, dim)
        self.k, self.v, self.k_scale, self.v_scale = self.held.setdefault(
            (slots, heads, dim), (self.k, self.v, self.k_scale, self.v_scale)
        )


@wrong("11.7", "scales are 1e-8 at least")
class Int8Cache(RightCache):
    def scale(self, x):
        return super().scale(x).clamp(min=1e-8)


@wrong("11.7", "a head of small numbers counts as zeros")
class Int8Cache(RightCache):
    def scale(self, x):
        scale = super().scale(x)
        return scale.masked_fill(scale < 1e-8, 1)


@wrong("11.7", "ties away from zero")
class Int8Cache(RightCache):
    def whole(self, x):
        return super().whole(x.sign() * (x.abs() + 0.5).floor())


@wrong("11.7", "cut to -127")
class Int8Cache(RightCache):
    def whole(self, x):
        return super().whole(x).clamp(min=-127)


@wrong("11.7", "one token at least comes in")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        slots.max()
        return super().kept(k, v, slots)


@wrong("11.7", "fp64 is not turned into fp32")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        k, v, slots = self.kept(k, v, slots)
        for name, x in (("k", k), ("v", v)):
            x = x.float() if x.element_size() < 4 else x
            scale = self.scale(x)
            getattr(self, name)[slots] = self.whole(x / scale[..., None])
            getattr(self, f"{name}_scale")[slots] = scale


@wrong("11.7", "values are cast to the keys' dtype")
class Int8Cache(RightCache):
    def write(self, k, v, slots):
        super().write(k, v.to(k.dtype), slots)


@wrong("11.7", "the root of 8, whatever D")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        return super().attention(q * (q.shape[-1] / 8) ** 0.5, k, v)


@wrong("11.7", "three key heads, whatever H")
class Int8Cache(RightCache):
    def spread(self, x, groups):
        return super().spread(x, groups * x.shape[1] // 3)


@wrong("11.7", "one key head is read by one query head")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        return super().attention(q[:1] if k.shape[1] == 1 else q, k, v)


@wrong("11.7", "eight slots a read at most")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        return super().attend(q, slots[:8])


@wrong("11.7", "contiguous rows alone")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        return super().kept(k.view(len(k), -1).view(k.shape), v, slots)


@wrong("11.7", "remembers what it read back")
class Int8Cache(RightCache):
    def attend(self, q, slots):
        self.memory = getattr(self, "memory", {})
        key = tuple(slots.tolist())
        if key not in self.memory:
            self.memory[key] = (
                self.k[slots] * self.k_scale[slots][..., None],
                self.v[slots] * self.v_scale[slots][..., None],
            )
        return self.attention(q, *self.memory[key])


class KeepsSome(RightCache):
    """Puts some of what was there before a write back."""

    def write(self, k, v, slots):
        old = {name: getattr(self, name).clone() for name in ("k", "v", "k_scale", "v_scale")}
        super().write(k, v, slots)
        self.put_back(old, slots)


@wrong("11.7", "a slot that held numbers keeps its scale when zeros come")
class Int8Cache(KeepsSome):
    def put_back(self, old, slots):
        for name in ("k", "v"):
            zeros = ~getattr(self, name).any(-1) & old[name].any(-1)
            getattr(self, f"{name}_scale")[zeros] = old[f"{name}_scale"][zeros]


@wrong("11.7", "a head of zeros does not replace what was there")
class Int8Cache(KeepsSome):
    def put_back(self, old, slots):
        for name in ("k", "v"):
            zeros = ~getattr(self, name).any(-1)
            for part in (name, f"{name}_scale"):
                getattr(self, part)[zeros] = old[part][zeros]


@wrong("11.7", "a token of slot -1 is kept in the last slot if that is free")
class Int8Cache(RightCache):
    def kept(self, k, v, slots):
        kept = (slots >= 0) | ((slots == -1) & ~self.k[-1].any())
        return k[kept], v[kept], slots[kept]


@wrong("11.7", "scales q in place, which fp32 alone survives")
class Int8Cache(RightCache):
    def attention(self, q, k, v):
        if q.dtype != torch.float32:
            q /= 2
            return super().attention(2 * q, k, v)
        return super().attention(q, k, v)


# ---- 11.8 -----------------------------------------------------------------------------------------------------------


class RightRotation:
    """As the statement says; what subclasses change is what can be wrong."""

    def __call__(self, x, size):
        self.refuse(x, size)
        y = x.double() if x.dtype == torch.float64 else x.float()
        y = y.reshape(*x.shape[:-1], x.shape[-1] // size, size)
        return (y @ self.matrix(size).to(y.dtype)).reshape(x.shape).to(x.dtype)

    def refuse(self, x, size):
        if size < 1 or bin(size).count("1") != 1 or x.shape[-1] % size != 0:
            raise ValueError(f"size: got {size}")

    def matrix(self, size):
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
        return h / size**0.5


def rotation(mark):
    def marked(cls):
        def rotate(x, size):
            return cls()(x, size)

        return mark(rotate)

    return marked


@rotation(alternative("11.8", "with the matrix"))
class WithMatrix(RightRotation):
    pass


@alternative("11.8", "recursion from the largest distance down; normalized step by step")
def rotate(x, size):
    if size <= 0 or (size & -size) != size or x.shape[-1] % size:
        raise ValueError(f"size: {size}")

    def turn(y):
        half = y.shape[-1] // 2
        if half == 0:
            return y
        a, b = y[..., :half] / 2**0.5, y[..., half:] / 2**0.5
        return torch.cat((turn(a + b), turn(a - b)), -1)

    y = x if x.dtype == torch.float64 else x.float()
    return turn(y.unflatten(-1, (-1, size))).flatten(-2).to(x.dtype)


@rotation(wrong("11.8", "not normalized"))
class NotNormalized(RightRotation):
    def matrix(self, size):
        return super().matrix(size) * size**0.5


@rotation(wrong("11.8", "over the size, not its root"))
class OverSize(RightRotation):
    def matrix(self, size):
        return super().matrix(size) / size**0.5


@rotation(wrong("11.8", "over the root of K"))
class OverK(RightRotation):
    def __call__(self, x, size):
        return super().__call__(x, size) * (size / x.shape[-1]) ** 0.5


@rotation(wrong("11.8", "rows in another order"))
class Sequency(RightRotation):
    def matrix(self, size):
        h = super().matrix(size)
        return h[(h[:, 1:] * h[:, :-1] < 0).sum(1).argsort()]


@rotation(wrong("11.8", "bits of the result reversed"))
class BitReversed(RightRotation):
    def matrix(self, size):
        bits = size.bit_length() - 1
        order = [int(bin(i)[2:].zfill(bits)[::-1], 2) if bits else 0 for i in range(size)]
        return super().matrix(size)[:, order]


@rotation(wrong("11.8", "the minus in the wrong corner"))
class Corner(RightRotation):
    def matrix(self, size):
        h = torch.ones(1, 1, dtype=torch.float64)
        while len(h) < size:
            h = torch.cat((torch.cat((-h, h), 1), torch.cat((h, h), 1)))
        return h / size**0.5


@rotation(wrong("11.8", "a step is missing"))
class StepMissing(RightRotation):
    def matrix(self, size):
        half = max(size // 2, 1)
        return torch.block_diag(*[super().matrix(half)] * (size // half))


@rotation(wrong("11.8", "random signs"))
class Signs(RightRotation):
    def matrix(self, size):
        signs = torch.randint(2, (size,), generator=torch.Generator().manual_seed(1)) * 2 - 1
        return super().matrix(size) * signs


@rotation(wrong("11.8", "groups are every so many-th element"))
class Strided(RightRotation):
    def __call__(self, x, size):
        self.refuse(x, size)
        y = x.unflatten(-1, (size, -1)).transpose(-1, -2).flatten(-2)
        return super().__call__(y, size).unflatten(-1, (-1, size)).transpose(-1, -2).flatten(-2)


@rotation(wrong("11.8", "the first group alone"))
class FirstGroup(RightRotation):
    def __call__(self, x, size):
        turned = super().__call__(x, size)
        return torch.cat((turned[..., :size], x[..., size:]), -1)


@rotation(wrong("11.8", "matrices alone"))
class MatricesAlone(RightRotation):
    def __call__(self, x, size):
        rows, k = x.shape
        return super().__call__(x, size).view(rows, k)


@rotation(wrong("11.8", "contiguous tensors alone"))
class ContiguousAlone(RightRotation):
    def __call__(self, x, size):
        x.view(-1)
        return super().__call__(x, size)


@rotation(wrong("11.8", "at least one row"))
class OneRow(RightRotation):
    def __call__(self, x, size):
        x.abs().max()
        return super().__call__(x, size)


@rotation(wrong("11.8", "in the input's dtype"))
class InDtype(RightRotation):
    def __call__(self, x, size):
        self.refuse(x, size)
        y, reach = x.reshape(-1, size), 1
        while reach < size:
            a, b = y.unflatten(1, (-1, 2, reach)).unbind(2)
            y, reach = torch.stack((a + b, a - b), 2).flatten(1), 2 * reach
        return (y / size**0.5).reshape(x.shape)


@rotation(wrong("11.8", "returns fp32"))
class ReturnsFloat(RightRotation):
    def __call__(self, x, size):
        return super().__call__(x.float(), size)


@rotation(wrong("11.8", "fp64 in fp32"))
class DoubleInFloat(RightRotation):
    def __call__(self, x, size):
        return super().__call__(x.float(), size).to(x.dtype)


@rotation(wrong("11.8", "any size: the next power of 2, cut off"))
class AnySize(RightRotation):
    def refuse(self, x, size):
        if size < 1 or x.shape[-1] % size:
            raise ValueError("size")

    def matrix(self, size):
        return super().matrix(1 << (size - 1).bit_length())[:size, :size]


@rotation(wrong("11.8", "what does not divide K raises another error"))
class OtherError(RightRotation):
    def refuse(self, x, size):
        if size < 1 or size & (size - 1):
            raise ValueError("size")
        assert x.shape[-1] % size == 0


@rotation(wrong("11.8", "0 is a power of 2 to `size & (size - 1)`"))
class Zero(RightRotation):
    def refuse(self, x, size):
        if size & (size - 1) or (size and x.shape[-1] % size):
            raise ValueError("size")

    def __call__(self, x, size):
        self.refuse(x, size)
        return x.clone() if size == 0 else super().__call__(x, size)


@rotation(wrong("11.8", "refuses a size of 1"))
class NotOne(RightRotation):
    def refuse(self, x, size):
        if size < 2:
            raise ValueError("size")
        super().refuse(x, size)


@rotation(wrong("11.8", "in place"))
class RotatesInPlace(RightRotation):
    def __call__(self, x, size):
        return x.copy_(super().__call__(x, size))


@rotation(wrong("11.8", "six steps at most"))
class SixSteps(RightRotation):
    def matrix(self, size):
        half = min(size, 64)
        return torch.block_diag(*[super().matrix(half)] * (size // half))


@rotation(wrong("11.8", "seven steps at most"))
class SevenSteps(RightRotation):
    def matrix(self, size):
        half = min(size, 128)
        return torch.block_diag(*[super().matrix(half)] * (size // half))


@rotation(wrong("11.8", "contiguous tensors alone where there are more than two axes"))
class ContiguousDeep(RightRotation):
    def __call__(self, x, size):
        return (
            super().__call__(x.view(-1, x.shape[-1]), size).view(x.shape) if x.ndim > 2 else super().__call__(x, size)
        )


@rotation(wrong("11.8", "divided by the root before, in the input's dtype"))
class DividesFirst(RightRotation):
    def __call__(self, x, size):
        root = size**0.5 if size > 0 else 1.0
        wide = torch.promote_types(x.dtype, torch.float32)
        return (super().__call__((x / root).to(wide), size) * root).to(x.dtype)


@rotation(wrong("11.8", "fp64 in place"))
class DoubleInPlace(RightRotation):
    def __call__(self, x, size):
        turned = super().__call__(x, size)
        return x.copy_(turned) if x.dtype == torch.float64 else turned


@rotation(wrong("11.8", "fp16 is scaled in place"))
class HalfInPlace(RightRotation):
    def __call__(self, x, size):
        turned = super().__call__(x, size)
        if x.dtype == torch.float16:
            x *= 0.5
        return turned


@rotation(wrong("11.8", "a size beyond K is cut to K"))
class CutSize(RightRotation):
    def __call__(self, x, size):
        return super().__call__(x, min(size, x.shape[-1]))


@rotation(wrong("11.8", "a negative size is taken for a positive one"))
class NegativeSize(RightRotation):
    def __call__(self, x, size):
        return super().__call__(x, abs(size))


@rotation(wrong("11.8", "the root is rounded to fp32"))
class RootInFloat(RightRotation):
    def matrix(self, size):
        return super().matrix(size) * size**0.5 / float(torch.tensor(size**0.5))
