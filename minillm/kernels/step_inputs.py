"""The tensors of an engine's step, from the rows of its requests on the device; and its tokens back into the rows.

A row of `matrix` is a request: its tokens, its block table, and in three int32 the bits of its temperature and seed.
What the host says of a step is `steps`, four rows of numbers, a column a sequence: the request's row, the first token
to compute, the place of the token to be sampled, and where the sequence's tokens begin in the batch (one column more:
where they end). See `engine/batch.py`.

Bytes: a few KB. What takes time is launches: torch's 27 small kernels took 50 µs a step, as long as two layers of
SmolLM2 (`benchmarks/NOTES.md`).
"""

import torch
from torch import Tensor

from .common import ceil_div, operation, pdl, previous_done, tl, triton

__all__ = ["append_tokens", "step_inputs"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(
    steps: Tensor, matrix: Tensor, first_block: int, first_option: int, block_size: int, tokens: int, sequences: int
) -> Inputs:
    """Number by number."""
    out = _empty(steps, matrix, first_block, first_option, block_size, tokens, sequences)
    token_ids, positions, slots, context_lens, block_tables, last, temperatures, seeds = out
    rows, firsts, _, bounds = steps.tolist()
    for t in range(tokens):
        owners = [i for i in range(sequences) if bounds[i] <= t < bounds[i + 1]]
        row = matrix[rows[owners[0]] if owners else rows[sequences - 1]].tolist()
        position = firsts[owners[0]] + t - bounds[owners[0]] if owners else 0
        block, offset = divmod(position, block_size)
        token_ids[t], positions[t] = row[position], position
        slots[t] = row[first_block + block] * block_size + offset if owners else -1
    for i in range(sequences):
        row = matrix[rows[i]]
        context_lens[i] = firsts[i] + bounds[i + 1] - bounds[i]
        block_tables[i] = row[first_block:first_option]
        last[i] = max(bounds[i + 1] - 1, 0)
        temperatures[i] = row[first_option : first_option + 1].view(torch.float32)[0]
        seeds[i] = row[first_option + 1 : first_option + 3].clone().view(torch.int64)[0]
    return out


def torch_path(
    steps: Tensor, matrix: Tensor, first_block: int, first_option: int, block_size: int, tokens: int, sequences: int
) -> Inputs:
    """All tokens at once, then all sequences."""
    rows, firsts, bounds = steps[0, :sequences].long(), steps[1, :sequences], steps[3, : sequences + 1]
    index = torch.arange(tokens, dtype=torch.int32, device=steps.device)
    owner = torch.searchsorted(bounds[1:], index, right=True).clamp_(max=sequences - 1)  # [N]
    row, real = rows[owner], index < bounds[-1]
    positions = torch.where(real, firsts[owner] + index - bounds[owner], 0).long()
    slots = matrix[row, first_block + positions // block_size].long() * block_size + positions % block_size
    options = matrix[rows, first_option : first_option + 3]  # [S, 3]
    return (
        matrix[row, positions].long(),
        positions,
        torch.where(real, slots, -1),
        firsts + bounds.diff(),
        matrix[rows, first_block:first_option],
        (bounds[1:] - 1).clamp(min=0).long(),
        options[:, 0].contiguous().view(torch.float32),
        (options[:, 2].long() << 32) | (options[:, 1].long() & 0xFFFFFFFF),
    )


def check(
    steps: Tensor, matrix: Tensor, first_block: int, first_option: int, block_size: int, tokens: int, sequences: int
) -> None:
    """Raise unless steps are [4, S or more, and one], matrix [rows, first_option + 3 or more], both int32."""
    _int32("steps", steps)
    _int32("matrix", matrix)
    if not 1 <= sequences < steps.shape[1] or len(steps) != 4:
        raise ValueError(f"steps: expected [4, {sequences} sequences, and one], got {list(steps.shape)}")
    if not 0 < first_block < first_option <= matrix.shape[1] - 3:
        raise ValueError(
            f"first_option: expected 0 < first_block < first_option and 3 columns behind it, got {first_block} and"
            f" {first_option} of {matrix.shape[1]}"
        )


def _int32(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.dtype != torch.int32 or not x.is_contiguous():
        raise ValueError(f"{name}: expected two axes of int32, contiguous, got {list(x.shape)} of {x.dtype}")


def _empty(
    steps: Tensor, matrix: Tensor, first_block: int, first_option: int, block_size: int, tokens: int, sequences: int
) -> Inputs:
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=steps.device)

    return (
        *(empty(torch.int64, tokens) for _ in range(3)),
        empty(torch.int32, sequences),
        empty(torch.int32, sequences, first_option - first_block),
        empty(torch.int64, sequences),
        empty(torch.float32, sequences),
        empty(torch.int64, sequences),
    )


@triton.jit
def step_inputs_kernel(
    steps_ptr, matrix_ptr,
    token_ptr, position_ptr, slot_ptr, context_ptr, table_ptr, last_ptr, temperature_ptr, seed_ptr,
    tokens, sequences, stride_steps, stride_matrix, first_block, first_option,
    BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token a program, and one sequence."""
    previous_done(PDL)
    i = tl.program_id(0)
    first_ptr, bound_ptr = steps_ptr + stride_steps, steps_ptr + 3 * stride_steps
    if i < tokens:
        low, high = 0, sequences - 1  # the first sequence that ends behind token i, or the last
        while low < high:
            middle = (low + high) // 2
            if tl.load(bound_ptr + middle + 1) <= i:
                low = middle + 1
            else:
                high = middle
        real = i < tl.load(bound_ptr + sequences)
        position = tl.where(real, tl.load(first_ptr + low) + i - tl.load(bound_ptr + low), 0)
        row_ptr = matrix_ptr + tl.load(steps_ptr + low).to(tl.int64) * stride_matrix
        block = tl.load(row_ptr + first_block + position // BLOCK_SIZE).to(tl.int64)
        tl.store(token_ptr + i, tl.load(row_ptr + position).to(tl.int64))
        tl.store(position_ptr + i, position.to(tl.int64))
        tl.store(slot_ptr + i, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    if i < sequences:
        begin, end = tl.load(bound_ptr + i), tl.load(bound_ptr + i + 1)
        tl.store(context_ptr + i, tl.load(first_ptr + i) + end - begin)
        tl.store(last_ptr + i, tl.maximum(end - 1, 0).to(tl.int64))
        row_ptr = matrix_ptr + tl.load(steps_ptr + i).to(tl.int64) * stride_matrix
        tl.store(temperature_ptr + i, tl.load(row_ptr + first_option))  # as bits
        tl.store(seed_ptr + 2 * i, tl.load(row_ptr + first_option + 1))  # low half, high half
        tl.store(seed_ptr + 2 * i + 1, tl.load(row_ptr + first_option + 2))
        width = first_option - first_block
        for at in range(0, width, BLOCK):
            offs = at + tl.arange(0, BLOCK)
            blocks = tl.load(row_ptr + first_block + offs, mask=offs < width)
            tl.store(table_ptr + i.to(tl.int64) * width + offs, blocks, mask=offs < width)


@operation("step_inputs", reference=reference, torch=torch_path, check=check, fake=_empty)
def step_inputs(
    steps: Tensor, matrix: Tensor, first_block: int, first_option: int, block_size: int, tokens: int, sequences: int
) -> Inputs:
    """What one step of `tokens` tokens and `sequences` sequences needs, padding included.

    steps [4, S + 1 or more] int32 and matrix [rows, columns] int32, see above; tokens, block table and options of a row
    begin at columns 0, first_block, first_option -> token_ids, positions, slots [N] int64 (slot -1: padding),
    context_lens [S] int32, block_tables [S, W] int32, last [S] int64 (each sequence's last token in the batch),
    temperatures [S] fp32, seeds [S] int64. Raises ValueError with the argument's name.
    """
    out = _empty(steps, matrix, first_block, first_option, block_size, tokens, sequences)
    step_inputs_kernel[(max(tokens, sequences),)](
        steps, matrix, *out[:-2], out[-2].view(torch.int32), out[-1].view(torch.int32), tokens, sequences,
        steps.stride(0), matrix.stride(0), first_block, first_option,
        BLOCK_SIZE=block_size, BLOCK=256, num_warps=1, **pdl(steps.device),
    )  # fmt: skip
    return out


def append_reference(steps: Tensor, matrix: Tensor, sampled: Tensor) -> None:
    """One by one."""
    for i, token in enumerate(sampled.tolist()):
        matrix[steps[0, i], steps[2, i]] = token


def append_torch_path(steps: Tensor, matrix: Tensor, sampled: Tensor) -> None:
    """All at once."""
    rows, columns = steps[0, : len(sampled)].long(), steps[2, : len(sampled)].long()
    matrix.index_put_((rows, columns), sampled.int())


def append_check(steps: Tensor, matrix: Tensor, sampled: Tensor) -> None:
    """Raise unless steps are [4, S or more], matrix [rows, columns], both int32, and sampled [S] int64."""
    _int32("steps", steps)
    _int32("matrix", matrix)
    if sampled.dtype != torch.int64 or sampled.dim() != 1 or len(sampled) > steps.shape[1]:
        raise ValueError(
            f"sampled: expected [S] of int64, S up to {steps.shape[1]}, got {list(sampled.shape)} of {sampled.dtype}"
        )


@triton.jit
def append_kernel(
    steps_ptr, matrix_ptr, sampled_ptr, sequences, stride_steps, stride_matrix,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK sequences a program."""
    previous_done(PDL)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = offs < sequences
    row = tl.load(steps_ptr + offs, mask=used).to(tl.int64)
    column = tl.load(steps_ptr + 2 * stride_steps + offs, mask=used)
    token = tl.load(sampled_ptr + offs, mask=used).to(tl.int32)
    tl.store(matrix_ptr + row * stride_matrix + column, token, mask=used)


@operation(
    "append_tokens",
    reference=append_reference,
    torch=append_torch_path,
    check=append_check,
    fake=lambda steps, matrix, sampled: None,
    in_place=("matrix",),
)
def append_tokens(steps: Tensor, matrix: Tensor, sampled: Tensor) -> None:
    """Write each sequence's new token into its row, at the place that `steps` says.

    steps and matrix as for `step_inputs`; sampled [S] int64. Padding columns of steps may name one row and place all
    alike: nobody reads it.
    """
    if len(sampled):
        append_kernel[(ceil_div(len(sampled), 256),)](
            steps, matrix, sampled, len(sampled), steps.stride(0), matrix.stride(0),
            BLOCK=256, num_warps=4, **pdl(steps.device),
        )  # fmt: skip
