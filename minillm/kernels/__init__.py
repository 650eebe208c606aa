"""The operations of inference, each with a torch path, a Triton kernel and a reference: see `common.py`.

Forward only: where a gradient is wanted, the torch path runs. Importing this never fails for want of Triton or a GPU.
"""

from .common import HAS_TRITON, INTERPRETED, KERNELS, Operation, dependent_launch, trusted, use
from .draw_tokens import count_tokens, draw_tokens, set_counts
from .flash_attention import flash_attention
from .fused_linear import linear, norm_linear
from .gumbel_argmax import GREEDY_BELOW, gumbel_argmax, gumbel_noise
from .lessons import softmax
from .mask_logits import mask_logits
from .matmul import matmul, matmul_swiglu
from .multi_lora import LoraPlan, multi_lora
from .paged_attention import AttentionPlan, paged_attention
from .quantize_rows import norm_quantize_rows, quantize_rows, swiglu_quantize_rows
from .rms_norm import add_rms_norm, rms_norm
from .rope import apply_rope, rope, rope_and_cache, rope_factors
from .step_inputs import append_tokens, step_inputs
from .swiglu import swiglu
from .top_logprobs import top_logprobs
from .w4a16 import repack, unpack, w4a16
from .w8a8 import w8a8
from .w8a16 import w8a16

__all__ = [
    "GREEDY_BELOW",
    "HAS_TRITON",
    "INTERPRETED",
    "KERNELS",
    "AttentionPlan",
    "LoraPlan",
    "Operation",
    "add_rms_norm",
    "append_tokens",
    "apply_rope",
    "count_tokens",
    "dependent_launch",
    "draw_tokens",
    "flash_attention",
    "gumbel_argmax",
    "gumbel_noise",
    "linear",
    "mask_logits",
    "matmul",
    "matmul_swiglu",
    "multi_lora",
    "norm_linear",
    "norm_quantize_rows",
    "paged_attention",
    "quantize_rows",
    "repack",
    "rms_norm",
    "rope",
    "rope_and_cache",
    "rope_factors",
    "set_counts",
    "softmax",
    "step_inputs",
    "swiglu",
    "swiglu_quantize_rows",
    "top_logprobs",
    "trusted",
    "unpack",
    "use",
    "w4a16",
    "w8a8",
    "w8a16",
]
