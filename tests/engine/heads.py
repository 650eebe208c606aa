"""Draft heads of the tiny models, trained for the tests that need one: on what these models say, until they are right
now and then.
"""

import functools
import tempfile
from pathlib import Path

from minillm.engine.draft_head import DraftHead, save_head
from minillm.engine.draft_training import new_head, own_outputs, train_head
from minillm.engine.engine import Engine
from minillm.model import Transformer
from minillm.sampling import SamplingParams

from .conftest import tiny_model

PROMPTS = [[1, 2, 3], [4, 5], [6] * 9, [1, 2, 3, 4, 9], [3], [0, 0, 1], [2, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9, 1]]


def trained(model: Transformer, prompts: list[list[int]], steps: int = 300) -> DraftHead:
    """A head that has learnt by heart what the model says to these prompts, more or less."""
    engine = Engine(model, num_blocks=200, block_size=4, max_num_seqs=len(prompts), enforce_eager=True)
    examples = own_outputs(engine, prompts, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    head = new_head(model, examples, most_token_ids=model.config.vocab_size - 5)
    train_head(head, examples, steps, lr=1e-2, batch_size=8, progress=False)
    return head


@functools.cache
def head_path(kind: str = "plain", device: str = "cpu") -> Path:
    """The folder of a head for a tiny model."""
    folder = Path(tempfile.mkdtemp(prefix="minillm-head-"))
    return save_head(trained(tiny_model(device, kind), PROMPTS), folder / "head")
