"""What chapter 1 quotes: the digits, the price of a gradient, and what backward must keep.

    python benchmarks/chapter_01.py

Everything runs on one thread, and times are CPU seconds of this process: on an idle machine they equal wall-clock time,
on a shared one they leave out what others took. `threads` alone is in wall-clock seconds: it shows what a second thread
does to small matrices, alone and beside other programs.
"""

import multiprocessing
import os
import time
import tracemalloc
from collections.abc import Callable

import numpy as np
import torch
from common import record
from threadpoolctl import threadpool_limits

from minillm.autograd import Tensor, no_grad, saved_bytes
from minillm.autograd.nn import MLP, cross_entropy
from minillm.autograd.optim import AdamW
from minillm.config import ModelConfig
from minillm.data import digits
from minillm.model.transformer import Transformer

SIZES, BATCH, EPOCHS, LR = [64, 128, 64, 10], 64, 30, 3e-3
WIDE = [1024] * 9  # eight equal layers, where time goes into matmuls and not into Python
SMOLLM2 = ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    tie_word_embeddings=True,
)


def median_seconds(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of each run, the median of `repeats`; in turns, so that a change of clock speed meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: float(np.median(measured[1:])) for name, measured in times.items()}  # the first is the warm-up


def torch_twin(model: MLP, sizes: list[int]) -> torch.nn.Sequential:
    """The same network in torch, with the same weights."""
    layers: list[torch.nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [torch.nn.ReLU()] * (i > 0) + [torch.nn.Linear(sizes[i], sizes[i + 1])]
    twin = torch.nn.Sequential(*layers)
    state = {name.removeprefix("layers."): torch.tensor(value) for name, value in model.state_dict().items()}
    twin.load_state_dict(state)
    return twin


def batches(count: int, epochs: int, seed: int) -> list[np.ndarray]:
    """The minibatches of all epochs, as index arrays: the same for both libraries."""
    rng = np.random.default_rng(seed)
    return [
        order[i : i + BATCH]
        for order in (rng.permutation(count) for _ in range(epochs))
        for i in range(0, count, BATCH)
    ]


def train_ours(seed: int) -> dict:
    """Train on the digits with minillm.autograd."""
    data, model = digits(), MLP(SIZES, np.random.default_rng(seed))
    optimizer, losses = AdamW(model.parameters(), LR), []
    start = time.process_time()
    for rows in batches(len(data.train_x), EPOCHS, seed):
        loss = cross_entropy(model(Tensor(data.train_x[rows])), data.train_y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    seconds = time.process_time() - start
    with no_grad():
        test, train = model(Tensor(data.test_x)).data, model(Tensor(data.train_x)).data
    predicted = test.argmax(axis=1)
    wrong = np.flatnonzero(predicted != data.test_y)
    return {
        "seconds": seconds,
        "losses": losses,
        "test_accuracy": float((predicted == data.test_y).mean()),
        "train_accuracy": float((train.argmax(axis=1) == data.train_y).mean()),
        "wrong": wrong.tolist(),
        "wrong_predicted": predicted[wrong].tolist(),
    }


def train_torch(seed: int) -> dict:
    """The same training with torch: same start, same batches, same optimizer."""
    data, model = digits(), torch_twin(MLP(SIZES, np.random.default_rng(seed)), SIZES)
    x, y = torch.tensor(data.train_x), torch.tensor(data.train_y)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    start = time.process_time()
    for rows in batches(len(x), EPOCHS, seed):
        rows = torch.from_numpy(rows)
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.process_time() - start
    with torch.no_grad():
        predicted = model(torch.tensor(data.test_x)).argmax(1).numpy()
    return {"seconds": seconds, "test_accuracy": float((predicted == data.test_y).mean())}


def training() -> dict:
    """Five trainings of each, in turns; the curve and the errors are those of seed 0."""
    train_torch(0)  # warm-up: torch loads its optimizers on first use
    ours, theirs = [], []
    for seed in range(5):
        ours.append(train_ours(seed))
        theirs.append(train_torch(seed))
    return {
        "sizes": SIZES,
        "parameters": sum(p.data.size for p in MLP(SIZES, np.random.default_rng(0)).parameters()),
        "batch": BATCH,
        "epochs": EPOCHS,
        "steps": len(ours[0]["losses"]),
        "seconds": float(np.median([r["seconds"] for r in ours])),
        "torch_seconds": float(np.median([r["seconds"] for r in theirs])),
        "test_accuracies": [r["test_accuracy"] for r in ours],
        "torch_test_accuracies": [r["test_accuracy"] for r in theirs],
        "test_images": len(digits().test_y),
        **{name: ours[0][name] for name in ("losses", "test_accuracy", "train_accuracy", "wrong", "wrong_predicted")},
    }


def _spin() -> None:
    while True:
        pass


def threads() -> dict:
    """Wall-clock seconds of the same training with one BLAS thread and with two: alone, and beside a busy process a
    core.
    """
    found: dict = {"cores": len(os.sched_getaffinity(0))}
    for name, others in {"alone": 0, "busy": found["cores"]}.items():
        spinning = [multiprocessing.Process(target=_spin, daemon=True) for _ in range(others)]
        for process in spinning:
            process.start()
        times: dict[str, list[float]] = {"one": [], "two": []}
        for _ in range(3):
            for count, seconds in times.items():
                with threadpool_limits(1 if count == "one" else 2):
                    start = time.perf_counter()
                    train_ours(0)
                    seconds.append(time.perf_counter() - start)
        for process in spinning:
            process.terminate()
        found[name] = {count: float(np.median(seconds)) for count, seconds in times.items()}
    return found


def price_of_a_gradient() -> dict:
    """The gradient of one minibatch of digits by central differences and by backward."""
    data, model = digits(), MLP(SIZES, np.random.default_rng(0))
    x, y = Tensor(data.train_x[:BATCH]), data.train_y[:BATCH]

    def backward() -> None:
        for parameter in model.parameters():
            parameter.zero_grad()
        cross_entropy(model(x), y).backward()

    def forward() -> float:
        with no_grad():
            return cross_entropy(model(x), y).item()

    backward()
    start, passes, worst, eps = time.process_time(), 0, 0.0, 1e-2
    for parameter in model.parameters():
        values = parameter.data.copy()
        for at in np.ndindex(parameter.shape):
            sides = []
            for sign in (1, -1):
                moved = values.copy()
                moved[at] += sign * eps
                parameter.data = moved
                sides.append(forward())
                passes += 1
            worst = max(worst, abs((sides[0] - sides[1]) / (2 * eps) - parameter.grad[at]))
        parameter.data = values
    numeric = time.process_time() - start
    fast = median_seconds({"forward": forward, "backward": backward}, repeats=101)
    return {
        "parameters": passes // 2,
        "forward_passes": passes,
        "numeric_seconds": numeric,
        "worst_difference": float(worst),  # float32 and a step of 0.01: the two agree to about this
        "forward_seconds": fast["forward"],
        "backward_seconds": fast["backward"],
    }


def forward_and_backward(batch: int = 256) -> dict:
    """Seconds of a forward pass, and of forward and backward together, for eight layers of 1024."""
    rng = np.random.default_rng(0)
    model = MLP(WIDE, rng)
    twin = torch_twin(model, WIDE)
    x, y = rng.standard_normal((batch, WIDE[0]), np.float32), rng.integers(0, WIDE[-1], batch)
    tx, ty = torch.tensor(x), torch.tensor(y)

    def ours_forward() -> float:
        with no_grad():
            return cross_entropy(model(Tensor(x)), y).item()

    def ours_both() -> None:
        model.zero_grad()
        cross_entropy(model(Tensor(x)), y).backward()

    def torch_forward() -> float:
        with torch.no_grad():
            return torch.nn.functional.cross_entropy(twin(tx), ty).item()

    def torch_both() -> None:
        twin.zero_grad()
        torch.nn.functional.cross_entropy(twin(tx), ty).backward()

    assert abs(ours_forward() - torch_forward()) < 1e-3
    ours_both()
    torch_both()
    for p, t in zip(model.parameters(), twin.parameters(), strict=True):
        difference = np.linalg.norm(p.grad - t.grad.numpy())
        # Rounding decides which side of 0 a few ReLU inputs lie on, so eight float32 layers agree no better than this.
        assert difference < 1e-2 * np.linalg.norm(p.grad), difference
    layers = len(WIDE) - 1
    runs = {"forward": ours_forward, "both": ours_both, "torch_forward": torch_forward, "torch_both": torch_both}
    return {
        "sizes": WIDE,
        "batch": batch,
        "flops_forward": 2 * batch * layers * WIDE[0] ** 2,
        "theory": (3 * layers - 1) / layers,  # the first layer has no use for the gradient of its input
        **median_seconds(runs, repeats=9),
    }


def kept_formula(batch: int, sizes: list[int]) -> int:
    """Bytes: the input of every layer and the log-probabilities, float32; two int64 indices a row."""
    return 4 * batch * sum(sizes) + 2 * 8 * batch


def kept_by_an_mlp() -> list[dict]:
    """Bytes that the graph keeps, measured and by formula, and the peak of a forward pass without a graph."""
    rows = []
    for batch, depth in [(1, 8), (64, 8), (256, 8), (1024, 8), (256, 2), (256, 4), (256, 16)]:
        sizes = [256] * (depth + 1)
        model, rng = MLP(sizes, np.random.default_rng(0)), np.random.default_rng(1)
        x, y = rng.standard_normal((batch, 256), np.float32), rng.integers(0, 256, batch)
        loss = cross_entropy(model(Tensor(x)), y)
        kept = saved_bytes(loss)
        del loss
        tracemalloc.start()
        with no_grad():
            cross_entropy(model(Tensor(x)), y)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        rows.append(
            {
                "batch": batch,
                "depth": depth,
                "kept": kept,
                "formula": kept_formula(batch, sizes),
                "inference_peak": peak,
            }
        )
    return rows


def memory_over_time(batch: int = 1024, depth: int = 8, width: int = 256) -> dict:
    """Bytes allocated since the start after each layer, forward and backward, and the same for inference."""
    rng = np.random.default_rng(0)
    model = MLP([width] * (depth + 1), rng)
    x, y = Tensor(rng.standard_normal((batch, width), np.float32)), rng.integers(0, width, batch)

    def forward(curve: list[int]) -> Tensor:
        h = x
        for layer in model.layers:
            h = layer(h)
            curve.append(tracemalloc.get_traced_memory()[0])
        loss = cross_entropy(h, y)
        del h
        curve.append(tracemalloc.get_traced_memory()[0])
        return loss

    def backward(loss: Tensor, curve: list[int]) -> None:
        # The engine's own loop, with a look at the memory after each matmul's backward.
        from minillm.autograd import RULES

        original = RULES["matmul"]

        def watched(g, a, shape):
            curve.append(tracemalloc.get_traced_memory()[0])
            return original.backward[1](g, a, shape)

        RULES["matmul"] = original._replace(backward=(original.backward[0], watched))
        loss.backward()
        RULES["matmul"] = original
        curve.append(tracemalloc.get_traced_memory()[0])

    curves: dict[str, list[int]] = {"inference": [], "forward": [], "backward": []}
    tracemalloc.start()
    with no_grad():
        forward(curves["inference"])
    tracemalloc.stop()
    tracemalloc.start()
    loss = forward(curves["forward"])
    backward(loss, curves["backward"])
    tracemalloc.stop()
    gradients = sum(p.data.nbytes for p in model.parameters())
    return {"batch": batch, "depth": depth, "width": width, "gradient_bytes": gradients, **curves}


def kept_by_smollm2(tokens: int = 128) -> dict:
    """Bytes a token and layer that PyTorch keeps for the backward of SmolLM2's shape, float32.

    From the difference between four and two layers, so that embedding, last norm and tables drop out.
    """

    def kept(layers: int) -> int:
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**vars(SMOLLM2), "num_hidden_layers": layers, "vocab_size": 100}))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(torch.randint(0, 100, (1, tokens)))  # held until counted: no address is used twice
        assert out.requires_grad
        return sum(storages.values())

    c = SMOLLM2
    minimum = 4 * c.hidden_size + 2 * c.q_size + 2 * c.kv_size + 3 * c.intermediate_size
    return {
        "tokens": tokens,
        "bytes_per_token_and_layer": (kept(4) - kept(2)) // (2 * tokens),
        "formula_bytes_per_token_and_layer": 4 * minimum,
        "kv_bytes_per_token_and_layer": c.kv_bytes_per_token("float32") // c.num_hidden_layers,
    }


def main() -> None:
    """Measure everything, print it, record it."""
    torch.set_num_threads(1)
    results: dict = {}
    with threadpool_limits(1):
        for run in (
            training,
            threads,
            price_of_a_gradient,
            forward_and_backward,
            kept_by_an_mlp,
            memory_over_time,
            kept_by_smollm2,
        ):
            start = time.perf_counter()
            results[run.__name__] = run()
            shown = results[run.__name__]
            if isinstance(shown, dict):
                shown = {k: v for k, v in shown.items() if not isinstance(v, list) or len(v) < 20}
            print(f"{run.__name__} ({time.perf_counter() - start:.0f} s): {shown}", flush=True)
    print(record("chapter_01", results, packages=("numpy", "torch")))


if __name__ == "__main__":
    main()
