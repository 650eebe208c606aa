"""Wrong and alternative implementations for the exercises of chapter 4: they keep the checks honest."""

import torch
import triton
import triton.language as tl

from minillm.learn.testing import alternative, wrong

# ---- 4.w1


def _block(program, block, n, inside=lambda i, n: i < n):
    offsets = [program * block + lane for lane in range(block)]
    return offsets, [inside(offset, n) for offset in offsets]


@wrong("4.w1", "the mask lets element n in")
def block_of(program, block, n):
    return _block(program, block, n, lambda i, n: i <= n)


@wrong("4.w1", "leaves out the lanes that are off")
def block_of(program, block, n):
    offsets, mask = _block(program, block, n)
    return [i for i, on in zip(offsets, mask, strict=True) if on], [True] * sum(mask)


@wrong("4.w1", "begins at the program's number")
def block_of(program, block, n):
    offsets = [program + lane for lane in range(block)]
    return offsets, [offset < n for offset in offsets]


@wrong("4.w1", "counts programs from 1")
def block_of(program, block, n):
    return _block(program - 1, block, n)


@wrong("4.w1", "clips offsets to the last element")
def block_of(program, block, n):
    offsets, mask = _block(program, block, n)
    return [min(i, max(n - 1, 0)) for i in offsets], mask


@wrong("4.w1", "masks lanes by their number")
def block_of(program, block, n):
    return _block(program, block, n)[0], [lane < n for lane in range(block)]


@wrong("4.w1", "the mask as numbers of the lanes that are on")
def block_of(program, block, n):
    offsets, mask = _block(program, block, n)
    return offsets, [i for i, on in enumerate(mask) if on]


@alternative("4.w1", "torch")
def block_of(program, block, n):
    offsets = torch.arange(program * block, (program + 1) * block)
    return offsets.tolist(), (offsets < n).tolist()


@wrong("4.w1", "tensors")
def block_of(program, block, n):
    offsets = [program * block + lane for lane in range(block)]
    o = torch.tensor(offsets)
    return (o, o < n)


@wrong("4.w1", "ints")
def block_of(program, block, n):
    offsets = [program * block + lane for lane in range(block)]
    return (offsets, [int(offset < n) for offset in offsets])


@wrong("4.w1", "tensors inside lists")
def block_of(program, block, n):
    offsets = [program * block + lane for lane in range(block)]
    o = torch.tensor(offsets)
    return (list(o), list(o < n))


# ---- 4.w2


@wrong("4.w2", "multiplies the columns by the stride")
def tile_offsets(row, column, rows, columns, stride):
    i, j = row * rows + torch.arange(rows)[:, None], column * columns + torch.arange(columns)[None]
    return i + j * stride


@wrong("4.w2", "takes the tile's number for its first row")
def tile_offsets(row, column, rows, columns, stride):
    return (row + torch.arange(rows)[:, None]) * stride + column + torch.arange(columns)[None]


@wrong("4.w2", "rows as far apart as the tile is wide")
def tile_offsets(row, column, rows, columns, stride):
    i, j = row * rows + torch.arange(rows)[:, None], column * columns + torch.arange(columns)[None]
    return i * columns + j


@wrong("4.w2", "the transposed table")
def tile_offsets(row, column, rows, columns, stride):
    i, j = row * rows + torch.arange(rows)[None], column * columns + torch.arange(columns)[:, None]
    return i * stride + j


@wrong("4.w2", "exchanges the tile's sides")
def tile_offsets(row, column, rows, columns, stride):
    i, j = row * columns + torch.arange(rows)[:, None], column * rows + torch.arange(columns)[None]
    return i * stride + j


@wrong("4.w2", "fractions")
def tile_offsets(row, column, rows, columns, stride):
    i, j = row * rows + torch.arange(float(rows))[:, None], column * columns + torch.arange(columns)[None]
    return i * stride + j


@alternative("4.w2", "two loops")
def tile_offsets(row, column, rows, columns, stride):
    corner = row * rows * stride + column * columns
    return torch.tensor([[corner + i * stride + j for j in range(columns)] for i in range(rows)])


@alternative("4.w2", "a window of the whole matrix's numbers")
def tile_offsets(row, column, rows, columns, stride):
    whole = torch.arange((row + 1) * rows * stride).view(-1, stride)
    return whole[row * rows :, column * columns : (column + 1) * columns]


@wrong("4.w2", "int16")
def tile_offsets(row, column, rows, columns, stride):
    i = row * rows + torch.arange(rows)[:, None]
    j = column * columns + torch.arange(columns)[None, :]
    return (i * stride + j).to(torch.int16)


# ---- 4.w3


@wrong("4.w3", "lanes that are off read as 0")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + row, tl.max(x, 0))


@wrong("4.w3", "no mask: the next row counts")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs)
    tl.store(y_ptr + row, tl.max(x, 0))


@wrong("4.w3", "a large negative number in place of minus infinity")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-1e9)
    tl.store(y_ptr + row, tl.max(x, 0))


@wrong("4.w3", "rows as far apart as blocks")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * BLOCK + offs, mask=offs < n, other=-float("inf"))
    tl.store(y_ptr + row, tl.max(x, 0))


@wrong("4.w3", "all rows into y[0]")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
    tl.store(y_ptr, tl.max(x, 0))


@wrong("4.w3", "the place of the maximum")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
    tl.store(y_ptr + row, tl.argmax(x, 0).to(tl.float32))


@wrong("4.w3", "the largest absolute value")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + row, tl.max(tl.abs(x), 0))


@wrong("4.w3", "does not compile: Python's max over the block")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    best = [-float("inf")]
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
    best.append(tl.max(x, 0))
    tl.store(y_ptr + row, best.pop())


@wrong("4.w3", "program r does the row r places from the end")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.num_programs(0) - 1 - tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
    tl.store(y_ptr + row, tl.max(x, 0))


@alternative("4.w3", "loads lane 0's element where a lane is off")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + tl.where(offs < n, offs, 0))
    tl.store(y_ptr + row + offs, tl.max(x, 0), mask=offs == 0)


@alternative("4.w3", "a where after the load")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + row, tl.max(tl.where(offs < n, x, -float("inf")), 0))


@wrong("4.w3", "other by a sum")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n, other=-float("inf"))
    tl.store(y_ptr + row, tl.max(tl.where(x == float("inf"), 3e38, x), 0))


@wrong("4.w3", "n - 1")
@triton.jit
def row_max_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + offs, mask=offs < n - (n > 64), other=-float("inf"))
    tl.store(y_ptr + row, tl.max(x, 0))


# ---- 4.0


@triton.jit
def _core_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.maximum(a * x + y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "forgets the tail: n // 128 programs")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_kernel[(x.numel() // 128,)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "a program more than there are blocks")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_kernel[(x.numel() // 128 + 1,)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "one program of a large block")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_kernel[(1,)](x, y, out, a, x.numel(), BLOCK=1024)
    return out


@wrong("4.0", "blocks of 64")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_kernel[(triton.cdiv(x.numel(), 64),)](x, y, out, a, x.numel(), BLOCK=64)
    return out


@wrong("4.0", "writes over y")
def scaled_add_relu(a, x, y):
    _core_kernel[(triton.cdiv(x.numel(), 128),)](x, y, y, a, x.numel(), BLOCK=128)
    return y


@triton.jit
def _core_1_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.maximum(a * x + y, 0.0).to(out_ptr.dtype.element_ty))


@wrong("4.0", "no mask at the store")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_1_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_2_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.load(y_ptr + offs).to(tl.float32)
    tl.store(out_ptr + offs, tl.maximum(a * x + y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "no mask at the loads")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_2_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_3_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, (a * x + y).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "no maximum")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_3_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_4_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, (tl.maximum(a * x, 0.0) + y).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "the maximum before the sum")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_4_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_5_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.maximum(x + a * y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "multiplies y")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_5_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_6_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x, y = tl.load(x_ptr + offs, mask=inside), tl.load(y_ptr + offs, mask=inside)
    scaled = (a * x.to(tl.float32)).to(x_ptr.dtype.element_ty)
    out = (scaled.to(tl.float32) + y.to(tl.float32)).to(x_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, tl.maximum(out, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "computes in the inputs' dtype")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_6_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "the result in fp32, whatever the inputs are")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x, dtype=torch.float32)
    _core_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "the product by torch: an operation more, and two reads")
def scaled_add_relu(a, x, y):
    out, scaled = torch.empty_like(x), a * x.float()
    _core_kernel[(triton.cdiv(x.numel(), 128),)](scaled, y, out, 1.0, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "two launches")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    half = x.numel() // 256 * 128
    for first, last in ((0, half), (half, x.numel())):
        part = slice(first, last)
        programs = (triton.cdiv(last - first, 128),)
        _core_kernel[programs](x[part], y[part], out[part], a, last - first, BLOCK=128)
    return out


@wrong("4.0", "no kernel: torch")
def scaled_add_relu(a, x, y):
    return (a * x.float() + y.float()).clamp(min=0).to(x.dtype)


@wrong("4.0", "returns nothing")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)


@triton.jit
def _core_7_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    x = tl.maximum(x, tl.load(x_ptr + offs, mask=inside).to(tl.float32))
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.maximum(a * x + y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "reads x twice")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_7_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_8_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + offs, tl.maximum(a * x + y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "stores zeros first")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_8_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@wrong("4.0", "an empty vector is an error")
def scaled_add_relu(a, x, y):
    if x.numel() == 0:
        raise ValueError("empty")
    out = torch.empty_like(x)
    _core_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_9_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    parts = [tl.load(x_ptr + offs, mask=offs < n).to(tl.float32) * a]
    parts.append(tl.load(y_ptr + offs, mask=offs < n).to(tl.float32))
    total = parts.pop() + parts.pop()
    tl.store(out_ptr + offs, tl.maximum(total, 0.0).to(out_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.0", "does not compile: a list of partial results")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    _core_9_kernel[(triton.cdiv(x.numel(), 128),)](x, y, out, a, x.numel(), BLOCK=128)
    return out


@triton.jit
def _core_10_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    tl.store(out_ptr + offs, tl.where(a * x + y > 0, a * x + y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


@alternative("4.0", "a grid by a function, where in place of the maximum")
def scaled_add_relu(a, x, y):
    out, n = torch.zeros_like(x), len(x)
    _core_10_kernel[lambda meta: (triton.cdiv(n, meta["BLOCK"]),)](x, y, out, a, n, BLOCK=128)
    return out


@triton.jit
def _core_11_kernel(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    first = tl.program_id(0) * BLOCK
    lane = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + lane, mask=lane < n - first, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + first + lane, mask=lane < n - first, other=0.0).to(tl.float32)
    tl.store(out_ptr + first + lane, tl.maximum(x * a + y, 0.0), mask=lane < n - first)


@alternative("4.0", "pointers that move on, an empty vector apart")
def scaled_add_relu(a, x, y):
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(x):
        _core_11_kernel[(-(-len(x) // 128),)](x_ptr=x, y_ptr=y, out_ptr=out, a=a, n=len(x), BLOCK=128)
    return out


@triton.jit
def scaled_add_relu_kernel_4_0_7(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    out = tl.maximum(a * x + y, 0.0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "small n: a small block")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    n = x.numel()
    block = min(128, triton.next_power_of_2(max(n, 1)))
    scaled_add_relu_kernel_4_0_7[triton.cdiv(n, block),](x, y, out, a, n, BLOCK=block)
    return out


@triton.jit
def scaled_add_relu_kernel_4_0_8(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    out = tl.maximum(a * x + y, 0.0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "converts before")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    n = x.numel()
    scaled_add_relu_kernel_4_0_8[triton.cdiv(n, 128),](x.float(), y.float(), out, a, n, BLOCK=128)
    return out


@triton.jit
def scaled_add_relu_kernel_4_0_9(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    out = tl.maximum(a * x + y, 0.0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "one program for nothing")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    n = x.numel()
    scaled_add_relu_kernel_4_0_9[max(1, triton.cdiv(n, 128)),](x, y, out, a, n, BLOCK=128)
    return out


@triton.jit
def scaled_add_relu_kernel_4_0_10(x_ptr, y_ptr, out_ptr, a, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    x = tl.load(x_ptr + offs, mask=inside).to(tl.float32)
    y = tl.load(y_ptr + offs, mask=inside).to(tl.float32)
    out = tl.maximum(a * x + y, 0.0)
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask=inside)


@wrong("4.0", "two launches when large")
def scaled_add_relu(a, x, y):
    out = torch.empty_like(x)
    n = x.numel()
    h = n // 2 // 128 * 128
    if n > 1000:
        scaled_add_relu_kernel_4_0_10[triton.cdiv(h, 128),](x, y, out, a, h, BLOCK=128)
        scaled_add_relu_kernel_4_0_10[triton.cdiv(n - h, 128),](x[h:], y[h:], out[h:], a, n - h, BLOCK=128)
        return out
    scaled_add_relu_kernel_4_0_10[triton.cdiv(n, 128),](x, y, out, a, n, BLOCK=128)
    return out


# ---- 4.1


@wrong("4.1", "masks with n alone: the padding counts")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + offs, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "masked elements read as 0, and e^0 is 1")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=0.0).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + offs, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "a row of length 0 gives NaN")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(y_ptr + row * n + offs, (e / tl.sum(e, 0)).to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "stores only the elements that count: the rest of y is what lay there")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=keep)


@wrong("4.1", "stores without a mask: writes into the next row")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards, so that the next program does not repair it
    offs = tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    last = row == tl.num_programs(0) - 1
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=(offs < n) | ((offs < 2 * n) & ~last))


@wrong("4.1", "takes rows of x to lie n apart")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * n + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "does not subtract the maximum")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    e = tl.exp(tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "loads the whole row and masks afterwards: right numbers, too many bytes")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=0.0).to(tl.float32)
    x = tl.where(keep, x, -float("inf"))
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "exponentials rounded to fp16 before they are added")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38)).to(tl.float16)
    total = tl.sum(e, 0).to(tl.float16).to(tl.float32)
    y = (e.to(tl.float32) / tl.where(total == 0, 1.0, total)).to(tl.float16)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "does not compile: the sum of a Python list of pieces")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    length = tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=offs < length, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    pieces = []
    for _ in range(1):
        pieces.append(tl.sum(e, 0))
    y = e / tl.maximum(pieces[0], 1e-30)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "rounds to x's dtype")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(x_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "masked elements read as -10,000")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-10000.0).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    e = tl.where(keep, e, 0.0)
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "masked elements read as -1e9, and are put to 0 afterwards")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-1e9).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    e = tl.where(keep, e, 0.0)
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "the maximum is 0 at least")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), 0.0))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "loads the scores twice")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    again = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(again - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "stores zeros first")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    tl.store(y_ptr + row * n + offs, tl.zeros((BLOCK,), y_ptr.dtype.element_ty), mask=offs < n)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "writes what it has used into the lengths")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)
    tl.store(length_ptr + row, 0)


@wrong("4.1", "writes exponentials into x")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
    tl.store(x_ptr + row * stride_x + offs, e.to(x_ptr.dtype.element_ty), mask=keep)
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "exponentials in x's dtype")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf"))
    e = tl.exp((x - tl.max(x, 0)).to(tl.float32))
    e = tl.where(keep, e, 0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
    total = tl.sum(e, 0)
    y = e / tl.where(total == 0, 1.0, total)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.1", "the first program does all rows, the others nothing")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    for row in range(tl.where(tl.program_id(0) == 0, tl.num_programs(0), 0)):
        keep = offs < tl.load(length_ptr + row)
        x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=-float("inf")).to(tl.float32)
        e = tl.exp(x - tl.maximum(tl.max(x, 0), -3.0e38))
        total = tl.sum(e, 0)
        y = e / tl.where(total == 0, 1.0, total)
        tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


@alternative("4.1", "2^x, and a `where` in place of the finite maximum")
@triton.jit
def masked_softmax_kernel(x_ptr, length_ptr, y_ptr, n, stride_x, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    keep = offs < tl.load(length_ptr + row)
    x = tl.load(x_ptr + row * stride_x + offs, mask=keep, other=0.0).to(tl.float32) * 1.4426950408889634
    top = tl.max(tl.where(keep, x, -3.0e38), 0)
    e = tl.where(keep, tl.exp2(x - top), 0.0)
    y = e / tl.maximum(tl.sum(e, 0), 1e-30)
    tl.store(y_ptr + row * n + offs, y.to(y_ptr.dtype.element_ty), mask=offs < n)


# ---- 4.2


@wrong("4.2", "handles the first block only")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    h = h.to(residual_ptr.dtype.element_ty)
    tl.store(residual_ptr + offs, h, mask=offs < n)
    h = h.to(tl.float32)
    w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
    y = h * tl.rsqrt(tl.sum(h * h, 0) / n + eps) * w
    tl.store(x_ptr + offs, y.to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "the mean over the lanes of all blocks instead of n elements")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / (tl.cdiv(n, BLOCK) * BLOCK) + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "the norm is of the sum before rounding")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        squares += h * h
        tl.store(residual_ptr + offs, h.to(residual_ptr.dtype.element_ty), mask=offs < n)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "squares in the inputs' dtype: fp16 overflows")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0) + tl.load(residual_ptr + offs, mask=offs < n, other=0.0)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += (h * h).to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "eps outside the root")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = 1.0 / (tl.sqrt(tl.sum(squares, 0) / n) + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "one stride for both tensors")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_x
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "adds again in the second pass: residual is twice x too large there, and x is read twice")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "never stores the sum, and reads x a second time instead")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        squares += h * h
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "rounds before it multiplies by the weight")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0)
        y = (h * scale).to(x_ptr.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
        tl.store(x_ptr + offs, y.to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "does not compile: the squares begin as the integer 0")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0).to(tl.int64), 0
    for start in range(tl.cdiv(n, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        r_ptrs = residual_ptr + row * stride_residual + offs
        h = tl.load(r_ptrs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(r_ptrs, h, mask=offs < n)
        squares += tl.sum(h.to(tl.float32) * h.to(tl.float32), 0)
    tl.debug_barrier()
    root = tl.sqrt(squares / n + eps)
    for start in range(tl.cdiv(n, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + row * stride_residual + offs, mask=offs < n, other=0.0).to(tl.float32)
        y = h / root * tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * stride_x + offs, y.to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "sums in x's dtype")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "the norm is of the sum rounded to x's dtype")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
        squares += h * h
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "rounds the scaled sum to the weight's dtype")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(
            x_ptr + offs,
            ((h * scale).to(weight_ptr.dtype.element_ty).to(tl.float32) * w).to(x_ptr.dtype.element_ty),
            mask=offs < n,
        )


@wrong("4.2", "loads the weight without a mask")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "the sum stays in the first block's lanes: stores without a mask")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "writes the scaled weight back")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)
        tl.store(weight_ptr + offs, (w * 1.0001).to(weight_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "no weight")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "adds x into x: both hold the sum")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        tl.store(x_ptr + offs, h.to(x_ptr.dtype.element_ty), mask=offs < n)
        squares += h.to(tl.float32) * h.to(tl.float32)
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "reads residual three times")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0), tl.zeros((BLOCK,), tl.float32)
    x_ptr, residual_ptr = x_ptr + row * stride_x, residual_ptr + row * stride_residual
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(x_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + offs, h, mask=offs < n)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        squares += h * h
    scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@wrong("4.2", "the first program does all rows, the others nothing")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    for row in range(tl.where(tl.program_id(0) == 0, tl.num_programs(0), 0)):
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            h = tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=0.0).to(tl.float32)
            h += tl.load(residual_ptr + row * stride_residual + offs, mask=offs < n, other=0.0).to(tl.float32)
            h = h.to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + row * stride_residual + offs, h, mask=offs < n)
            squares += h.to(tl.float32) * h.to(tl.float32)
        scale = tl.rsqrt(tl.sum(squares, 0) / n + eps)
        for start in range(0, n, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            h = tl.load(residual_ptr + row * stride_residual + offs, mask=offs < n, other=0.0).to(tl.float32)
            w = tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + row * stride_x + offs, (h * scale * w).to(x_ptr.dtype.element_ty), mask=offs < n)


@alternative("4.2", "one scalar for the squares, and a division by the root")
@triton.jit
def add_rms_norm_kernel(x_ptr, residual_ptr, weight_ptr, n, stride_x, stride_residual, eps, BLOCK: tl.constexpr):
    row, squares = tl.program_id(0).to(tl.int64), 0.0
    for start in range(tl.cdiv(n, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        r_ptrs = residual_ptr + row * stride_residual + offs
        h = tl.load(r_ptrs, mask=offs < n, other=0.0).to(tl.float32)
        h += tl.load(x_ptr + row * stride_x + offs, mask=offs < n, other=0.0).to(tl.float32)
        h = h.to(residual_ptr.dtype.element_ty)
        tl.store(r_ptrs, h, mask=offs < n)
        squares += tl.sum(h.to(tl.float32) * h.to(tl.float32), 0)
    tl.debug_barrier()
    root = tl.sqrt(squares / n + eps)
    for start in range(tl.cdiv(n, BLOCK)):
        offs = start * BLOCK + tl.arange(0, BLOCK)
        h = tl.load(residual_ptr + row * stride_residual + offs, mask=offs < n, other=0.0).to(tl.float32)
        y = h / root * tl.load(weight_ptr + offs, mask=offs < n, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * stride_x + offs, y.to(x_ptr.dtype.element_ty), mask=offs < n)


# ---- 4.3


@wrong("4.3", "no mask along k: adds the NaN behind the matrices")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=rows < m, other=0.0)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=columns < n, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "the last block along k is left out")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(k // BLOCK_K):
        ks = start * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=rows < m, other=0.0)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=columns < n, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "x and w contiguous along their last axis, whatever the strides say")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows * k + ks[None, :], mask=(rows < m) & (ks[None, :] < k), other=0.0)
        w = tl.load(w_ptr + ks[:, None] * n + columns, mask=(ks[:, None] < k) & (columns < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "y contiguous, whatever its strides say")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * n + columns, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


@wrong("4.3", "accumulates in the inputs' dtype")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), y_ptr.dtype.element_ty)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = (acc.to(tl.float32) + tl.dot(x, w, input_precision="ieee")).to(y_ptr.dtype.element_ty)
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "adds the bias in every step along k")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "stores without a mask along the rows' ends")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (
        (columns < n) | (columns * stride_yn + rows * stride_ym < (m - 1) * stride_ym + n * stride_yn)
    )
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "computes all rows of tiles in every program of a column: right numbers, too many bytes")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for tile in range(tl.cdiv(m, BLOCK_M)):
        rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            ks = start + tl.arange(0, BLOCK_K)
            inside = (rows < m) & (ks[None, :] < k)
            x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
            inside = (ks[:, None] < k) & (columns < n)
            w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
        inside = (rows < m) & (columns < n)
        tl.store(y_ptr + rows * stride_ym + columns * stride_yn, y.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "does not compile: a product of 4 x 4 pieces beside the sum")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    for left in range(k, 0, -BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < m) & (offs_k[None, :] < left), other=0.0)
        w = tl.load(w_ptrs, mask=(offs_k[:, None] < left) & (offs_n[None, :] < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        corner = tl.full((4, 4), 0.0, tl.float32)
        acc += tl.sum(tl.dot(corner, corner))
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < m) & (offs_n[None, :] < n))


@wrong("4.3", "TF32, which is tl.dot's default")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc)
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "rounds to x's dtype")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(
        y_ptr + rows * stride_ym + columns * stride_yn,
        acc.to(x_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@wrong("4.3", "rounds the bias to x's dtype")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(x_ptr.dtype.element_ty).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "rounds the sum before it adds the bias")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "rounds to bias's dtype")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(
        y_ptr + rows * stride_ym + columns * stride_yn,
        acc.to(bias_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty),
        mask=inside,
    )


@wrong("4.3", "reads the bias without a mask")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "rows and columns of the grid exchanged")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "reads everything twice")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k) & (columns < n)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@wrong("4.3", "pads x's rows with 0, and lets NaN behind w stand: 0 times NaN")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        inside = (rows < m) & (ks[None, :] < k)
        x = tl.load(x_ptr + rows * stride_xm + ks[None, :] * stride_xk, mask=inside, other=0.0)
        inside = (ks[:, None] < k + BLOCK_K) & (columns < n)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + columns * stride_wn, mask=inside, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@alternative("4.3", "rows and columns modulo m and n, masks along k alone")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row, column = rows % m, columns % n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + row * stride_xm + ks[None, :] * stride_xk, mask=ks[None, :] < k, other=0.0)
        w = tl.load(w_ptr + ks[:, None] * stride_wk + column * stride_wn, mask=ks[:, None] < k, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    acc += tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    inside = (rows < m) & (columns < n)
    tl.store(y_ptr + rows * stride_ym + columns * stride_yn, acc.to(y_ptr.dtype.element_ty), mask=inside)


@alternative("4.3", "starts from the bias, pointers that move along k")
@triton.jit
def matmul_bias_kernel(
    x_ptr, w_ptr, bias_ptr, y_ptr, m, n, k, stride_xm, stride_xk, stride_wk, stride_wn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    w_ptrs = w_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc += tl.load(bias_ptr + offs_n, mask=offs_n < n, other=0.0).to(tl.float32)[None, :]
    for left in range(k, 0, -BLOCK_K):
        x = tl.load(x_ptrs, mask=(offs_m[:, None] < m) & (offs_k[None, :] < left), other=0.0)
        w = tl.load(w_ptrs, mask=(offs_k[:, None] < left) & (offs_n[None, :] < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    y_ptrs = y_ptr + offs_m[:, None] * stride_ym + offs_n[None, :] * stride_yn
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m[:, None] < m) & (offs_n[None, :] < n))


@wrong("4.3", "tf32x3")
@triton.jit
def matmul_bias_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_offs = rows * stride_xm + ks[None, :] * stride_xk
        w_offs = ks[:, None] * stride_wk + columns * stride_wn
        x = tl.load(x_ptr + x_offs, mask=(rows < m) & (ks[None, :] < k), other=0.0)
        w = tl.load(w_ptr + w_offs, mask=(ks[:, None] < k) & (columns < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="tf32x3")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(tl.float32)
    y_offs = rows * stride_ym + columns * stride_yn
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


@wrong("4.3", "bias rounded to y's dtype")
@triton.jit
def matmul_bias_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    m,
    n,
    k,
    stride_xm,
    stride_xk,
    stride_wk,
    stride_wn,
    stride_ym,
    stride_yn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, k, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        x_offs = rows * stride_xm + ks[None, :] * stride_xk
        w_offs = ks[:, None] * stride_wk + columns * stride_wn
        x = tl.load(x_ptr + x_offs, mask=(rows < m) & (ks[None, :] < k), other=0.0)
        w = tl.load(w_ptr + w_offs, mask=(ks[:, None] < k) & (columns < n), other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = acc + tl.load(bias_ptr + columns, mask=columns < n, other=0.0).to(y_ptr.dtype.element_ty).to(tl.float32)
    y_offs = rows * stride_ym + columns * stride_yn
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


# ---- 4.4


def _apart(steps, machine, combine=max):
    total = 0.0
    for step in steps:
        moved = sum(step["reads"].values()) + sum(step["writes"].values())
        total += machine["launch"] + combine((moved / machine["bandwidth"], step["flops"] / machine["flops"]))
    return total


def _fused(steps, moved, machine, launches=1, combine=max):
    flops = sum(step["flops"] for step in steps)
    times = (moved / machine["bandwidth"], flops / machine["flops"])
    return launches * machine["launch"] + combine(times), flops / moved


def _bytes(steps, outputs):
    made, reads, writes = set(), {}, {}
    for step in steps:
        reads |= {name: size for name, size in step["reads"].items() if name not in made}
        writes |= {name: size for name, size in step["writes"].items() if name in outputs}
        made |= set(step["writes"])
    return sum(reads.values()) + sum(writes.values())


@wrong("4.4", "adds the times of memory and arithmetic")
def roofline(steps, outputs, machine):
    return _apart(steps, machine, sum), *_fused(steps, _bytes(steps, outputs), machine, combine=sum)


@wrong("4.4", "the fused kernel is launched once a step")
def roofline(steps, outputs, machine):
    return _apart(steps, machine), *_fused(steps, _bytes(steps, outputs), machine, launches=len(steps))


@wrong("4.4", "the fused kernel still moves intermediates")
def roofline(steps, outputs, machine):
    moved = sum(sum(s["reads"].values()) + sum(s["writes"].values()) for s in steps)
    return _apart(steps, machine), *_fused(steps, moved, machine)


@wrong("4.4", "an input that several steps read moves once a step")
def roofline(steps, outputs, machine):
    made, moved = set(), 0
    for step in steps:
        moved += sum(size for name, size in step["reads"].items() if name not in made)
        made |= set(step["writes"])
    writes = {name: size for step in steps for name, size in step["writes"].items() if name in outputs}
    return _apart(steps, machine), *_fused(steps, moved + sum(writes.values()), machine)


@wrong("4.4", "an intermediate that is an output is read back")
def roofline(steps, outputs, machine):
    made, reads, writes = set(), {}, {}
    for step in steps:
        reads |= {name: size for name, size in step["reads"].items() if name not in made or name in outputs}
        writes |= {name: size for name, size in step["writes"].items() if name in outputs}
        made |= set(step["writes"])
    return _apart(steps, machine), *_fused(steps, sum(reads.values()) + sum(writes.values()), machine)


@wrong("4.4", "a tensor that is updated in place is not read")
def roofline(steps, outputs, machine):
    made = {name for step in steps for name in step["writes"]}
    reads = {n: size for step in steps for n, size in step["reads"].items() if n not in made}
    writes = {n: size for step in steps for n, size in step["writes"].items() if n in outputs}
    return _apart(steps, machine), *_fused(steps, sum(reads.values()) + sum(writes.values()), machine)


@wrong("4.4", "fused: the sum of the steps' maxima instead of the maximum of the sums")
def roofline(steps, outputs, machine):
    seconds, intensity = _fused(steps, _bytes(steps, outputs), machine)
    arithmetic = sum(step["flops"] for step in steps) / machine["flops"]
    extra = sum(
        max(sum(s["writes"].values()) / machine["bandwidth"] - s["flops"] / machine["flops"], 0) for s in steps[1:]
    )
    bound = seconds - machine["launch"] == arithmetic and len(steps) > 1
    return _apart(steps, machine), seconds + (extra if bound else 0), intensity


@wrong("4.4", "intensity upside down: bytes a FLOP")
def roofline(steps, outputs, machine):
    seconds, intensity = _fused(steps, _bytes(steps, outputs), machine)
    return _apart(steps, machine), seconds, 1 / intensity


@wrong("4.4", "writes every name in outputs, also one that is only read")
def roofline(steps, outputs, machine):
    sizes = {name: size for step in steps for part in (step["reads"], step["writes"]) for name, size in part.items()}
    made, reads = set(), {}
    for step in steps:
        reads |= {name: size for name, size in step["reads"].items() if name not in made}
        made |= set(step["writes"])
    moved = sum(reads.values()) + sum(sizes[name] for name in outputs if name in sizes)
    return _apart(steps, machine), *_fused(steps, moved, machine)


@wrong("4.4", "a name in outputs that no step knows is an error")
def roofline(steps, outputs, machine):
    known = {name for step in steps for part in (step["reads"], step["writes"]) for name in part}
    if outputs - known:
        raise KeyError(outputs - known)
    return _apart(steps, machine), *_fused(steps, _bytes(steps, outputs), machine)


@wrong("4.4", "looks at a step's writes before its reads: what is updated in place is not read")
def roofline(steps, outputs, machine):
    made, reads, writes = set(), {}, {}
    for step in steps:
        made |= set(step["writes"])
        reads |= {name: size for name, size in step["reads"].items() if name not in made}
        writes |= {name: size for name, size in step["writes"].items() if name in outputs}
    return _apart(steps, machine), *_fused(steps, sum(reads.values()) + sum(writes.values()), machine)


@wrong("4.4", "an output that two steps write is written twice")
def roofline(steps, outputs, machine):
    made, reads, written = set(), {}, 0
    for step in steps:
        reads |= {name: size for name, size in step["reads"].items() if name not in made}
        written += sum(size for name, size in step["writes"].items() if name in outputs)
        made |= set(step["writes"])
    return _apart(steps, machine), *_fused(steps, sum(reads.values()) + written, machine)


@wrong("4.4", "takes the names that it has seen out of outputs")
def roofline(steps, outputs, machine):
    result = _apart(steps, machine), *_fused(steps, _bytes(steps, outputs), machine)
    for step in steps:
        outputs -= set(step["writes"])
    return result


@wrong("4.4", "takes what it fused out of the steps")
def roofline(steps, outputs, machine):
    result = _apart(steps, machine), *_fused(steps, _bytes(steps, outputs), machine)
    for step in steps[1:]:
        step["reads"].clear()
    del steps[1:]
    return result


@wrong("4.4", "intensity of the chain apart")
def roofline(steps, outputs, machine):
    moved = sum(sum(s["reads"].values()) + sum(s["writes"].values()) for s in steps)
    seconds, _ = _fused(steps, _bytes(steps, outputs), machine)
    return _apart(steps, machine), seconds, sum(s["flops"] for s in steps) / moved


@alternative("4.4", "sets of names first, bytes afterwards")
def roofline(steps, outputs, machine):
    return _apart(steps, machine), *_fused(steps, _bytes(steps, outputs), machine)


@wrong("4.4", "fused max by step")
def roofline(steps, outputs, machine):

    def seconds(moved, flops):
        return machine["launch"] + max(moved / machine["bandwidth"], flops / machine["flops"])

    apart, made, moved = (0.0, set(), {})
    for step in steps:
        apart += seconds(sum(step["reads"].values()) + sum(step["writes"].values()), step["flops"])
        for name, size in step["reads"].items():
            if name not in made:
                moved["read", name] = size
        made |= step["writes"].keys()
        for name, size in step["writes"].items():
            if name in outputs:
                moved["write", name] = size
    flops = sum(step["flops"] for step in steps)
    total = sum(moved.values())
    return (
        apart,
        machine["launch"] + max(total / machine["bandwidth"], max(s["flops"] for s in steps) / machine["flops"]),
        flops / total,
    )


# ---- 4.5


def _total(num_m, num_n, programs, row_bytes, column_bytes, tile):
    total = 0
    for start in range(0, num_m * num_n, programs):
        wave = [tile(i) for i in range(start, min(start + programs, num_m * num_n))]
        total += row_bytes * len({m for m, _ in wave}) + column_bytes * len({n for _, n in wave})
    return total


def _tile(i, num_m, num_n, group):
    first = i // (group * num_n) * group
    height = min(group, num_m - first)
    return first + i % (group * num_n) % height, i % (group * num_n) // height


@wrong("4.5", "the square root of the programs, without looking at the tiles")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    group = min(num_m, max(1, round(programs**0.5)))
    case = num_m, num_n, programs, row_bytes, column_bytes
    return group, _total(*case, lambda i: _tile(i, num_m, num_n, group))


@wrong("4.5", "the last band as high as the others: tiles outside the grid")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    def tile(i, group):
        return i // (group * num_n) * group + i % group, i % (group * num_n) // group

    case = num_m, num_n, programs, row_bytes, column_bytes
    return min((_total(*case, lambda i, g=g: tile(i, g)), g) for g in range(1, num_m + 1))[::-1]


@wrong("4.5", "numbers run along the rows of a band")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, row_bytes, column_bytes
    return min((_total(*case, lambda i: divmod(i, num_n)), g) for g in range(1, num_m + 1))[::-1]


@wrong("4.5", "costs of rows and columns exchanged")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, column_bytes, row_bytes
    return min((_total(*case, lambda i, g=g: _tile(i, num_m, num_n, g)), g) for g in range(1, num_m + 1))[::-1]


@wrong("4.5", "counts strips instead of bytes when it chooses")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs
    _, g = min((_total(*case, 1, 1, lambda i, g=g: _tile(i, num_m, num_n, g)), g) for g in range(1, num_m + 1))
    return g, _total(*case, row_bytes, column_bytes, lambda i: _tile(i, num_m, num_n, g))


@wrong("4.5", "leaves out the last, short wave")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    def total(g):
        moved = 0
        for start in range(0, num_m * num_n - programs + 1, programs):
            wave = [_tile(i, num_m, num_n, g) for i in range(start, start + programs)]
            moved += row_bytes * len({m for m, _ in wave}) + column_bytes * len({n for _, n in wave})
        return moved

    return min((total(g), g) for g in range(1, num_m + 1))[::-1]


@wrong("4.5", "of several best groups the largest")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, row_bytes, column_bytes
    moved, g = min((_total(*case, lambda i, g=g: _tile(i, num_m, num_n, g)), -g) for g in range(1, num_m + 1))
    return -g, moved


@wrong("4.5", "a strip stays in the cache for ever")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    return 1, num_m * row_bytes + num_n * column_bytes


def _choose(case, groups):
    num_n = case[1]
    return min((_total(*case, lambda i, g=g: _tile(i, case[0], num_n, g)), g) for g in groups)[::-1]


@wrong("4.5", "tries powers of two alone")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, row_bytes, column_bytes
    return _choose(case, [1 << i for i in range(num_m.bit_length())])


@wrong("4.5", "does not try all rows as one band")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, row_bytes, column_bytes
    return _choose(case, range(1, max(num_m, 2)))


@wrong("4.5", "tries groups that divide the rows alone")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    case = num_m, num_n, programs, row_bytes, column_bytes
    return _choose(case, [g for g in range(1, num_m + 1) if num_m % g == 0])


@wrong("4.5", "bands of columns instead of rows")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    return _choose((num_n, num_m, programs, column_bytes, row_bytes), range(1, num_n + 1))


@alternative("4.5", "builds the order by walking through the bands")
def best_group(num_m, num_n, programs, row_bytes, column_bytes):
    best = None
    for g in range(1, num_m + 1):
        order = [
            (m, n) for first in range(0, num_m, g) for n in range(num_n) for m in range(first, min(first + g, num_m))
        ]
        total = _total(num_m, num_n, programs, row_bytes, column_bytes, order.__getitem__)
        if best is None or total < best[1]:
            best = g, total
    return best
