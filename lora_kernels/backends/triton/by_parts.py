"""Products of few rows, whose reduction is cut into parts so that the whole chip reads W: what the kernels have in common.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X op(W) + mask(S U) + bias  [M, C]     U "up":   lora_B^T forward, lora_A backward

The tile of out is computed transposed, [BLOCK_C, BLOCK_M]: the tensor cores then take 64 rows of op(W)^T at a time, and
M need only be padded to 16. Where there are few tiles, the reduction, over L numbers, is cut into `parts`, a program
each. Parts are written to a workspace, and whoever arrives last adds them in their fixed order.

How S gets to the tiles
-----------------------
S is computed by programs of its own: each does one part of the reduction for a row block and a chunk of the rank, the
last one adds the parts in their fixed order, stores S and raises the row block's flag, which every tile waits for when
its product is done. What a program does is decided by a ticket that it draws when it starts, and the tickets of S
come first: whoever is waited for is running, and waits for nobody. So the kernels cannot deadlock, however few
multiprocessors other kernels leave them.

The last tile to finish puts every count and flag back to zero, for the next launch on the stream or the next replay
of the graph.

The grid is flat: a program for each part of S of each row block and chunk, and one for each part of each tile. sync_ptr
holds, all zero: the next ticket, the count of finished tiles, that of complete chunks of S, the same for each row block, a
count of parts for each row block and chunk, and one for each tile. workspace_ptr holds the parts of S, and behind them
those of the tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.mask import keep_tile
from lora_kernels.backends.triton.pieces import load_tile, split_products
from lora_kernels.backends.triton.sharing import add_down, part_bounds, publish


@triton.jit
def part_of_s(ticket, x_ptr, stride_xm, down_ptr, stride_dl, stride_dr, s_ptr, workspace_ptr, sync_ptr, mask_ptr, scale_ptr,
              scale, M, L, R, s_parts, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr,
              RANK_CHUNKS: tl.constexpr, MASK_X: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """The part of S that a ticket stands for, handed over."""
    row_tiles = tl.cdiv(M, BLOCK_M)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32) * scale
    pid_m, share = ticket % row_tiles, ticket // row_tiles
    part, chunk = share // RANK_CHUNKS, share % RANK_CHUNKS
    row0 = pid_m * BLOCK_M
    first, last = part_bounds(part, s_parts, tl.cdiv(L, BLOCK_L))
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for li in tl.range(first, last):
        x = load_tile(x_ptr, stride_xm, row0, li * BLOCK_L, M, L, BLOCK_M, BLOCK_L, False)
        s = add_down(x, down_ptr, stride_dl, stride_dr, li * BLOCK_L, chunk * BLOCK_R, L, R, s, row0, M, mask_ptr,
                     BLOCK_M, BLOCK_L, BLOCK_R, MASK_X, SPLIT, "tf32")  # fmt: skip
    total_ptr, ready_ptr = sync_ptr + 2, sync_ptr + 3
    publish(s, workspace_ptr, ready_ptr + row_tiles, ready_ptr, total_ptr, s_ptr, R, scale, pid_m, chunk, part, RANK_CHUNKS,
            s_parts, row_tiles, M, R, BLOCK_M, BLOCK_R)  # fmt: skip


@triton.jit
def tile_of(item, row_tiles, parts):
    """(row block, column block, part) of an item: the row blocks of one tile of W run side by side, for whom L2 has it."""
    pid_m, item = item % row_tiles, item // row_tiles
    return pid_m, item // parts, item % parts


@triton.jit
def hand_over(acc, pid_m, pid_c, part, parts, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, workspace_ptr, sync_ptr,
              mask_ptr, M, C, R, s_parts, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
              RANK_CHUNKS: tl.constexpr, MASK_OUT: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Of a part of a tile, which is finished and written if it is the last one to arrive."""
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    finished_ptr, total_ptr = sync_ptr + 1, sync_ptr + 2
    last = True
    if parts > 1:
        tile = pid_c * row_tiles + pid_m
        tile_ptr = workspace_ptr + (row_tiles * s_parts * RANK_CHUNKS).to(tl.int64) * (BLOCK_M * BLOCK_R)
        tile_ptr += tile.to(tl.int64) * parts * (BLOCK_M * BLOCK_C)
        arrived_ptr = sync_ptr + 3 + row_tiles * (1 + RANK_CHUNKS) + tile
        last, acc = _last_to_arrive(acc, part, parts, tile_ptr, arrived_ptr, BLOCK_M, BLOCK_C)
    if last:
        _finish_tile(acc, pid_m, pid_c, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, total_ptr, mask_ptr,
                     M, C, R, BLOCK_M, BLOCK_C, BLOCK_R, RANK_CHUNKS, MASK_OUT, SPLIT)  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == row_tiles * column_tiles - 1:
            used = 3 + row_tiles * (1 + RANK_CHUNKS + column_tiles)
            for start in tl.range(0, used, 1024):
                offs = start + tl.arange(0, 1024)
                tl.store(sync_ptr + offs, 0, mask=offs < used)


@triton.jit
def _last_to_arrive(acc, part, parts, tile_ptr, arrived_ptr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Hands a part of a tile over. Returns whether it was the last one, and then the whole tile."""
    TILE: tl.constexpr = BLOCK_M * BLOCK_C
    # So many parts are in flight at once; more would not fit into the registers.
    BATCH: tl.constexpr = 64 // BLOCK_M if BLOCK_M < 64 else 1
    tile_ptr += tl.arange(0, BLOCK_C)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tl.store(tile_ptr + part * TILE, acc)
    # Every thread's part of the tile must be written before one thread counts it.
    tl.debug_barrier()
    last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == parts - 1
    if last:
        acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
        for start in tl.range(0, parts, BATCH, num_stages=1):
            for i in tl.static_range(BATCH):
                p = tl.minimum(start + i, parts - 1)
                # Other multiprocessors wrote them: L1 may not be asked.
                tile = tl.load(tile_ptr + p * TILE, cache_modifier=".cg")
                acc += tl.where(start + i < parts, tile, 0.0)
    return last, acc


@triton.jit
def _finish_tile(acc, pid_m, pid_c, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, total_ptr, mask_ptr,
                 M, C, R, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr,
                 MASK_OUT: tl.constexpr, SPLIT: tl.constexpr):  # fmt: skip
    """Adds mask(S U) and the bias to a transposed tile of X op(W) and writes it."""
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m, in_c = (offs_m < M)[None, :], (offs_c < C)[:, None]
    rows, columns = offs_m.to(tl.int64)[None, :], offs_c.to(tl.int64)[:, None]
    complete = tl.cdiv(M, BLOCK_M) * RANK_CHUNKS
    while tl.atomic_add(total_ptr, 0, sem="acquire") < complete:
        pass
    if MASK_OUT:
        product = acc
        acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for chunk in tl.range(0, RANK_CHUNKS, num_stages=1):
        offs_r = chunk * BLOCK_R + tl.arange(0, BLOCK_R)
        up = tl.load(
            up_ptr + columns * stride_uc + offs_r[None, :] * stride_ur, in_c & (offs_r < R)[None, :], other=0.0
        )
        # Another multiprocessor may have written it: L1 may not be asked.
        s = tl.load(s_ptr + rows * R + offs_r[:, None], in_m & (offs_r < R)[:, None], other=0.0, cache_modifier=".cg")
        if SPLIT:
            acc = split_products(up, s, acc)
        else:
            acc = tl.dot(up.to(out_ptr.dtype.element_ty), s.to(out_ptr.dtype.element_ty), acc)
    if MASK_OUT:
        keep = keep_tile(mask_ptr, pid_m * BLOCK_M, pid_c * BLOCK_C, M, C, BLOCK_M, BLOCK_C)
        acc = product + tl.where(tl.trans(keep), acc, 0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, in_c, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * C + columns, acc.to(out_ptr.dtype.element_ty), in_m & in_c)
