"""The tensors of an engine's step, from the rows of its requests on the device; and its tokens back into the rows.

A row of `matrix` is a request, in int32:

    length | options | tokens | block table

`length` counts the tokens that are known on the device; options are numbers of 32 or, in two columns, 64 bits (their
bits are copied, whatever they mean). What the host says of a step is `steps`, four rows of numbers, a column a
sequence: the request's row; the first token to compute, or -1 for the last one that is known; whether it gets a token;
and where the sequence's tokens begin in the batch (one column more: where they end). See `engine/batch.py`.

So the host need not know how many tokens the step before has given: a step that guesses and verifies gives one or more.

Bytes: a few KB. What takes time is launches: torch's 27 small kernels took 50 µs a step, as long as two layers of
SmolLM2 (`benchmarks/NOTES.md`).
"""

import torch
from torch import Tensor

from .common import ceil_div, operation, pdl, previous_done, tl, triton

__all__ = ["append_tokens", "step_inputs"]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(
    steps: Tensor, matrix: Tensor, options: Tensor, lengths: Tensor, first_token: int, first_block: int, wide: int,
    block_size: int, tokens: int, sequences: int,
) -> Inputs:  # fmt: skip
    """Number by number."""
    out = _empty(steps, matrix, options, lengths, first_token, first_block, wide, block_size, tokens, sequences)
    token_ids, positions, slots, context_lens, block_tables, logit_rows = out
    rows, given, _, bounds = steps.tolist()
    firsts = [int(matrix[r, 0]) - 1 if first < 0 else first for r, first in zip(rows, given, strict=True)]
    for t in range(tokens):
        owners = [i for i in range(sequences) if bounds[i] <= t < bounds[i + 1]]
        row = matrix[rows[owners[0]] if owners else rows[sequences - 1]]
        position = firsts[owners[0]] + t - bounds[owners[0]] if owners else 0
        block, offset = divmod(position, block_size)
        token_ids[t], positions[t] = row[first_token + position], position
        slots[t] = int(row[first_block + block]) * block_size + offset if owners else -1
    for i in range(sequences):
        row = matrix[rows[i]]
        context_lens[i] = firsts[i] + bounds[i + 1] - bounds[i]
        block_tables[i] = row[first_block:]
        logit_rows[i] = max(bounds[i + 1] - 1, 0)
        lengths[i] = row[0]
        for k in range(wide):
            options[2 * k : 2 * k + 2].view(-1)[2 * i : 2 * i + 2] = row[1 + 2 * k : 3 + 2 * k]
        options[2 * wide :, i] = row[1 + 2 * wide : first_token]
    return out


def torch_path(
    steps: Tensor, matrix: Tensor, options: Tensor, lengths: Tensor, first_token: int, first_block: int, wide: int,
    block_size: int, tokens: int, sequences: int,
) -> Inputs:  # fmt: skip
    """All tokens at once, then all sequences."""
    rows, bounds = steps[0, :sequences].long(), steps[3, : sequences + 1]
    head = matrix[rows, :first_token]  # [S, 1 + W]: length and options
    lengths[:sequences] = head[:, 0]
    if wide:
        pairs = options[: 2 * wide].view(wide, -1, 2)  # [wide, most, 2]
        pairs[:, :sequences] = head[:, 1 : 1 + 2 * wide].unflatten(1, (wide, 2)).transpose(0, 1)
    options[2 * wide :, :sequences] = head[:, 1 + 2 * wide :].T
    firsts = torch.where(steps[1, :sequences] < 0, head[:, 0] - 1, steps[1, :sequences])
    index = torch.arange(tokens, dtype=torch.int32, device=steps.device)
    owner = torch.searchsorted(bounds[1:], index, right=True).clamp_(max=sequences - 1)  # [N]
    row, real = rows[owner], index < bounds[-1]
    positions = torch.where(real, firsts[owner] + index - bounds[owner], 0).long()
    slots = matrix[row, first_block + positions // block_size].long() * block_size + positions % block_size
    return (
        matrix[row, first_token + positions].long(),
        positions,
        torch.where(real, slots, -1),
        firsts + bounds.diff(),
        matrix[rows, first_block:],
        (bounds[1:] - 1).clamp(min=0).long(),
    )


def check(
    steps: Tensor, matrix: Tensor, options: Tensor, lengths: Tensor, first_token: int, first_block: int, wide: int,
    block_size: int, tokens: int, sequences: int,
) -> None:  # fmt: skip
    """Raise unless steps are [4, S or more, and one], matrix [rows, columns], options [W, S or more], all int32."""
    for name, x in (("steps", steps), ("matrix", matrix), ("options", options)):
        _int32(name, x)
    if not 1 <= sequences < steps.shape[1] or len(steps) != 4:
        raise ValueError(f"steps: expected [4, {sequences} sequences, and one], got {list(steps.shape)}")
    if not 1 <= first_token < first_block < matrix.shape[1]:
        raise ValueError(
            f"first_block: expected 1 <= first_token < first_block < columns, got {first_token} and {first_block} of"
            f" {matrix.shape[1]}"
        )
    if len(options) != first_token - 1 or options.shape[1] < sequences or not 0 <= 2 * wide <= len(options):
        raise ValueError(
            f"options: expected [{first_token - 1} columns, of which {wide} pairs, {sequences} sequences or more], got"
            f" {list(options.shape)}"
        )
    if lengths.dim() != 1 or lengths.dtype != torch.int32 or len(lengths) < sequences:
        raise ValueError(f"lengths: expected [{sequences} or more] of int32, got {list(lengths.shape)}")


def _int32(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.dtype != torch.int32 or not x.is_contiguous():
        raise ValueError(f"{name}: expected two axes of int32, contiguous, got {list(x.shape)} of {x.dtype}")


def _empty(
    steps: Tensor, matrix: Tensor, options: Tensor, lengths: Tensor, first_token: int, first_block: int, wide: int,
    block_size: int, tokens: int, sequences: int,
) -> Inputs:  # fmt: skip
    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=steps.device)

    return (
        empty(torch.int64, tokens),
        empty(torch.int64, tokens),
        empty(torch.int64, tokens),
        empty(torch.int32, sequences),
        empty(torch.int32, sequences, matrix.shape[1] - first_block),
        empty(torch.int64, sequences),
    )


@triton.jit
def step_inputs_kernel(
    steps_ptr, matrix_ptr, option_ptr, length_ptr,
    token_ptr, position_ptr, slot_ptr, context_ptr, table_ptr, logit_row_ptr,
    tokens, sequences, stride_steps, stride_matrix, stride_option, first_token, first_block, width, wide,
    BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK: tl.constexpr,
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
        row_ptr = matrix_ptr + tl.load(steps_ptr + low).to(tl.int64) * stride_matrix
        first = tl.load(first_ptr + low)
        first = tl.where(first < 0, tl.load(row_ptr) - 1, first)
        position = tl.where(real, first + i - tl.load(bound_ptr + low), 0)
        block = tl.load(row_ptr + first_block + position // BLOCK_SIZE).to(tl.int64)
        tl.store(token_ptr + i, tl.load(row_ptr + first_token + position).to(tl.int64))
        tl.store(position_ptr + i, position.to(tl.int64))
        tl.store(slot_ptr + i, tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1))
    if i < sequences:
        begin, end = tl.load(bound_ptr + i), tl.load(bound_ptr + i + 1)
        row_ptr = matrix_ptr + tl.load(steps_ptr + i).to(tl.int64) * stride_matrix
        length = tl.load(row_ptr)
        first = tl.load(first_ptr + i)
        tl.store(length_ptr + i, length)
        tl.store(context_ptr + i, tl.where(first < 0, length - 1, first) + end - begin)
        tl.store(logit_row_ptr + i, tl.maximum(end - 1, 0).to(tl.int64))
        offs = tl.arange(0, BLOCK_W)  # a pair of columns stays a pair, so that it can be read as 64 bits
        at = tl.where(offs < 2 * wide, offs // 2 * 2 * stride_option + 2 * i + offs % 2, offs * stride_option + i)
        used = offs < first_token - 1
        tl.store(option_ptr + at, tl.load(row_ptr + 1 + offs, mask=used), mask=used)
        for start in range(0, width, BLOCK):
            offs_b = start + tl.arange(0, BLOCK)
            blocks = tl.load(row_ptr + first_block + offs_b, mask=offs_b < width)
            tl.store(table_ptr + i.to(tl.int64) * width + offs_b, blocks, mask=offs_b < width)


@operation(
    "step_inputs", reference=reference, torch=torch_path, check=check, fake=_empty, in_place=("options", "lengths")
)
def step_inputs(
    steps: Tensor, matrix: Tensor, options: Tensor, lengths: Tensor, first_token: int, first_block: int, wide: int,
    block_size: int, tokens: int, sequences: int,
) -> Inputs:  # fmt: skip
    """What one step of `tokens` tokens and `sequences` sequences needs, padding included.

    steps [4, S + 1 or more] int32 and matrix [rows, columns] int32, see above; tokens and block table of a row begin
    at the columns first_token and first_block. Written: lengths [S or more] int32; options [W, S or more] int32, option
    by option, the `wide` pairs of 64 bits first, each sequence's two halves side by side. -> token_ids, positions,
    slots [N] int64 (slot -1: padding), context_lens [S] int32, block_tables [S, blocks] int32, logit_rows [S] int64
    (each sequence's last token in the batch). Raises ValueError with the argument's name.
    """
    out = _empty(steps, matrix, options, lengths, first_token, first_block, wide, block_size, tokens, sequences)
    step_inputs_kernel[(max(tokens, sequences),)](
        steps, matrix, options, lengths, *out, tokens, sequences, steps.stride(0), matrix.stride(0), options.stride(0),
        first_token, first_block, matrix.shape[1] - first_block, wide,
        BLOCK_SIZE=block_size, BLOCK_W=max(2, 1 << (first_token - 2).bit_length()), BLOCK=256, num_warps=1,
        **pdl(steps.device),
    )  # fmt: skip
    return out


def append_reference(steps: Tensor, matrix: Tensor, sampled: Tensor, given: Tensor, first_token: int) -> None:
    """One by one."""
    for i, tokens in enumerate(sampled.tolist()):
        if steps[2, i]:
            row, count = matrix[steps[0, i]], int(given[i])
            start = first_token + int(row[0])
            row[start : start + count] = torch.tensor(tokens[:count], dtype=torch.int32)
            row[0] += count


def append_torch_path(steps: Tensor, matrix: Tensor, sampled: Tensor, given: Tensor, first_token: int) -> None:
    """All at once. Who gets no token, or fewer than the most, writes a number that nobody reads behind its tokens."""
    sequences, most = sampled.shape
    rows = steps[0, :sequences].long()
    lengths = matrix[rows, 0]
    new = torch.where(steps[2, :sequences] > 0, given, 0)
    columns = first_token + lengths.long()[:, None] + torch.arange(most, device=matrix.device)  # [S, K]
    kept = torch.arange(most, device=matrix.device) < new[:, None]
    matrix[rows[:, None], columns] = torch.where(kept, sampled.int(), matrix[rows[:, None], columns])
    matrix[rows, 0] = lengths + new


def append_check(steps: Tensor, matrix: Tensor, sampled: Tensor, given: Tensor, first_token: int) -> None:
    """Raise unless steps are [4, S or more], matrix [rows, columns], both int32, sampled [S, K] int64, given [S]."""
    _int32("steps", steps)
    _int32("matrix", matrix)
    if sampled.dtype != torch.int64 or sampled.dim() != 2 or len(sampled) > steps.shape[1]:
        raise ValueError(
            f"sampled: expected [S, K] of int64, S up to {steps.shape[1]}, got {list(sampled.shape)} of {sampled.dtype}"
        )
    if given.shape != sampled.shape[:1] or given.dtype != torch.int32:
        raise ValueError(f"given: expected [{len(sampled)}] of int32, got {list(given.shape)} of {given.dtype}")


@triton.jit
def append_kernel(
    steps_ptr, matrix_ptr, sampled_ptr, given_ptr, sequences, most, stride_steps, stride_matrix, first_token,
    PDL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK sequences a program."""
    previous_done(PDL)
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = offs < sequences
    gets = tl.load(steps_ptr + 2 * stride_steps + offs, mask=used, other=0) > 0
    row_ptr = matrix_ptr + tl.load(steps_ptr + offs, mask=used, other=0).to(tl.int64) * stride_matrix
    length = tl.load(row_ptr, mask=gets, other=0)
    count = tl.load(given_ptr + offs, mask=gets, other=0)
    for j in range(most):
        token = tl.load(sampled_ptr + offs * most + j, mask=gets).to(tl.int32)
        tl.store(row_ptr + first_token + length + j, token, mask=gets & (j < count))
    tl.store(row_ptr, length + count, mask=gets)


@operation(
    "append_tokens",
    reference=append_reference,
    torch=append_torch_path,
    check=append_check,
    fake=lambda steps, matrix, sampled, given, first_token: None,
    in_place=("matrix",),
)
def append_tokens(steps: Tensor, matrix: Tensor, sampled: Tensor, given: Tensor, first_token: int) -> None:
    """Write each sequence's new tokens behind its others, and count them: those of sequences that `steps` says get any.

    steps and matrix as for `step_inputs`; sampled [S, K] int64, of which the first given[s] (int32, [S]) are meant.
    No two sequences that get a token share a row.
    """
    if len(sampled):
        append_kernel[(ceil_div(len(sampled), 256),)](
            steps, matrix, sampled, given, *sampled.shape, steps.stride(0), matrix.stride(0), first_token,
            BLOCK=256, num_warps=4, **pdl(steps.device),
        )  # fmt: skip
