"""The model with every kernel on: small ones in Triton's interpreter, SmolLM2 on a GPU against transformers."""

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from minillm.kernels import HAS_TRITON, use

from .test_transformer import random_pair

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed here")
GPU = torch.cuda.is_available()


@pytest.mark.skipif(GPU, reason="this machine compiles the kernels")
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_small_model_in_the_interpreter(tmp_path, kind):
    theirs, model = random_pair(tmp_path, kind, 2, True, None)
    token_ids = torch.randint(0, 131, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), use("triton"):
        logits = model.logits(model(token_ids))
    with torch.inference_mode():
        assert (logits - theirs(token_ids).logits).abs().max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_small_model_in_fp32(tmp_path, kind):
    theirs, model = random_pair(tmp_path, kind, 2, True, None)
    token_ids = torch.randint(0, 131, (3, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(token_ids).logits
        logits = model.cuda().logits(model(token_ids.cuda())).cpu()
    assert (logits - expected).abs().max() < 1e-3


@pytest.mark.gpu
def test_smollm2_in_bf16(smollm_path):
    """No further from transformers' fp32 logits than transformers' own bf16 ones, give or take a quarter."""
    from transformers import AutoModelForCausalLM

    from minillm.data import reference_text
    from minillm.model.tokenizer import Tokenizer
    from minillm.model.weights import load

    tokenizer = Tokenizer.from_pretrained(smollm_path)
    texts = ["The capital of France is", *(text[:2000] for text in list(reference_text().values())[:6])]
    prompts = [torch.tensor([tokenizer.encode(text)[:512]], device="cuda") for text in texts]
    ours = load(smollm_path, device="cuda", dtype="bfloat16")
    exact = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.float32).cuda().eval()
    rounded = AutoModelForCausalLM.from_pretrained(smollm_path, dtype=torch.bfloat16).cuda().eval()
    errors = {"ours": 0.0, "transformers": 0.0}
    with torch.inference_mode():
        for token_ids in prompts:
            expected = exact(token_ids).logits
            for name, logits in (("ours", ours.logits(ours(token_ids))), ("transformers", rounded(token_ids).logits)):
                errors[name] += float((logits.float() - expected).pow(2).mean())
    assert errors["ours"] < 1.25 * errors["transformers"], errors
    print(errors)
