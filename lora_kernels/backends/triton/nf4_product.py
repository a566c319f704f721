"""The product with an NF4 weight that is decoded where it is used: no 16-bit copy of it exists anywhere.

    S   = scale * mask(X) D           [M, R]     D "down": lora_A^T forward, lora_B backward
    out = X op(W) + mask(S U) + bias  [M, C]     U "up":   lora_B^T forward, lora_A backward

Forward, X is x, op(W) is W^T and the mask sits on X. Backward to the input, X is dy, op(W) is W, S is T and the mask
sits on S U. W is [N, K] in NF4, and K a multiple of its block size: then no block straddles rows, and a tile of
W has a row of scales each.

How it is fast for few rows
---------------------------
The tile of out is computed transposed, [BLOCK_C, BLOCK_M]: W is the left operand, which the tensor cores take from
registers, and M need only be padded to 16. Each thread decodes exactly the weights that it feeds to the tensor cores.
For that it reads whole words of eight codes, which it shares with its neighbours, and shifts each by what its place
in the operand asks for, so that nothing is moved between decoding and multiplying.

The reduction is split over `parts` programs where there are few tiles. Parts are written to a workspace, and whoever
arrives last adds them in their fixed order.

How S gets to the tiles
-----------------------
S is computed by programs of its own: each does one part of the reduction for a row block and a chunk of the rank, the
last one adds the parts in their fixed order, stores S and raises the row block's flag, which every tile waits for when
its product is done. What a program does is decided by a ticket that it draws when it starts, and the tickets of S
come first: whoever is waited for is running, and waits for nobody. So the kernel cannot deadlock, however few
multiprocessors other kernels leave it.

The last tile to finish puts every count and flag back to zero, for the next launch on the stream or the next replay
of the graph.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lora_kernels.backends.triton.mask import keep_tile
from lora_kernels.backends.triton.nf4 import code_shifts, decode_codes, lane_table, load_scales
from lora_kernels.backends.triton.pieces import anchored, load_tile, split_products
from lora_kernels.backends.triton.sharing import add_down, part_bounds, publish


@triton.jit
def _load(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _part_of_s(part, s_parts, row0, r0, x_ptr, stride_xm, down_ptr, stride_dl, stride_dr, mask_ptr, M, L, R,
               BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, MASK_X: tl.constexpr,
               SPLIT: tl.constexpr):  # fmt: skip
    """mask(X) D over one part of the reduction: a float32 tile [BLOCK_M, BLOCK_R]."""
    first, last = part_bounds(part, s_parts, tl.cdiv(L, BLOCK_L))
    s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for li in tl.range(first, last):
        x = load_tile(x_ptr, stride_xm, row0, li * BLOCK_L, M, L, BLOCK_M, BLOCK_L, False)
        s = add_down(x, down_ptr, stride_dl, stride_dr, li * BLOCK_L, r0, L, R, s, row0, M, mask_ptr,
                     BLOCK_M, BLOCK_L, BLOCK_R, MASK_X, SPLIT, "tf32")  # fmt: skip
    return s


@triton.jit
def _part_of_product(pid_m, pid_c, part, parts, x_ptr, stride_xm, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr,
                     offset_ptr, float_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr,
                     BLOCK_SIZE: tl.constexpr, FORWARD: tl.constexpr, EVEN_L: tl.constexpr, EVEN_K: tl.constexpr,
                     SHUFFLE: tl.constexpr):  # fmt: skip
    """(X op(W))^T over one part of the reduction: a float32 tile [BLOCK_C, BLOCK_M].

    Rows that lie outside of W or X repeat the last one: they are not stored, or meet zeros of X.
    """
    ROWS: tl.constexpr = BLOCK_C if FORWARD else BLOCK_L
    COLUMNS: tl.constexpr = BLOCK_L if FORWARD else BLOCK_C
    SCALES: tl.constexpr = max(1, COLUMNS // BLOCK_SIZE)
    never = M < 0
    table = anchored(lane_table(pid_m, SHUFFLE), float_ptr + tl.zeros((1, 1), tl.int32), never)
    shifts = anchored(code_shifts(), words_ptr + code_shifts(), never)[None, None, :]
    offset = 0.0
    if offset_ptr is not None:
        offset = tl.load(offset_ptr)

    L = K if FORWARD else N
    row_blocks = K // BLOCK_SIZE
    # Written so that a multiple of 16 bytes can be seen in it.
    row_words = K // 32 * 4
    x_rows = tl.minimum(pid_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1).to(tl.int64)[:, None]
    x_ptrs = x_ptr + x_rows * stride_xm + tl.arange(0, BLOCK_L)[None, :]
    first, last = part_bounds(part, parts, tl.cdiv(L, BLOCK_L))
    acc = tl.zeros((BLOCK_C, BLOCK_M), tl.float32)
    for li in tl.range(first, last):
        row0, column0 = (pid_c * BLOCK_C, li * BLOCK_L) if FORWARD else (li * BLOCK_L, pid_c * BLOCK_C)
        rows = tl.minimum(row0 + tl.arange(0, ROWS), N - 1)[:, None]
        offs_word = (column0 // 8 + tl.arange(0, COLUMNS // 8))[None, :]
        offs_block = (column0 // BLOCK_SIZE + tl.arange(0, SCALES))[None, :]
        words = _load(words_ptr + rows.to(tl.int64) * row_words + offs_word, offs_word < row_words, not EVEN_K)
        scales = load_scales(absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset, rows * row_blocks + offs_block,
                             offs_block < row_blocks)  # fmt: skip
        x = _load(x_ptrs + li * BLOCK_L, (li * BLOCK_L + tl.arange(0, BLOCK_L) < L)[None, :], not EVEN_L)
        codes = tl.reshape(words[:, :, None] >> shifts, (ROWS, COLUMNS))
        scales = tl.broadcast_to(scales[:, :, None], (ROWS, SCALES, COLUMNS // SCALES))
        w = (decode_codes(codes, table, SHUFFLE) * tl.reshape(scales, (ROWS, COLUMNS))).to(x.dtype)
        operand = w if FORWARD else tl.trans(w)
        acc = tl.dot(operand, tl.trans(x), acc)
    return acc


@triton.jit
def _last_to_arrive(acc, part, parts, tile_ptr, arrived_ptr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Hands a part of a tile over. Returns whether it was the last one, and then the whole tile."""
    TILE: tl.constexpr = BLOCK_M * BLOCK_C
    # So many parts are in flight at once; more would not fit into the registers.
    BATCH: tl.constexpr = max(1, 64 // BLOCK_M)
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
def finish_tile(acc, pid_m, pid_c, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, total_ptr, mask_ptr,
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
        up = tl.load(up_ptr + columns * stride_uc + offs_r[None, :] * stride_ur, in_c & (offs_r < R)[None, :], other=0.0)
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


@triton.jit(do_not_specialize=["M", "s_parts", "parts"])
def nf4_product_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_map_ptr, offset_ptr, out_ptr, down_ptr, up_ptr, bias_ptr, s_ptr,
    workspace_ptr, sync_ptr, mask_ptr, scale_ptr, scale, M, N, K, R, s_parts, parts,
    stride_xm, stride_dl, stride_dr, stride_ur, stride_uc,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, RANK_CHUNKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, FORWARD: tl.constexpr, EVEN_L: tl.constexpr, EVEN_K: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, SHUFFLE: tl.constexpr,
):  # fmt: skip
    """The module's docstring says what it computes and why it ends.

    x_ptr [M, L], words_ptr int32 [N K / 8], out_ptr [M, C], s_ptr [M, R]. The grid is flat: a program for each part of
    S of each row block and chunk, and one for each part of each tile. sync_ptr holds, all zero: the next ticket, the
    count of finished tiles, that of complete chunks of S, the same for each row block, a count of parts for each row
    block and chunk, and one for each tile. workspace_ptr holds the parts of S, and behind them those of the tiles.
    """
    C = N if FORWARD else K
    L = K if FORWARD else N
    row_tiles, column_tiles = tl.cdiv(M, BLOCK_M), tl.cdiv(C, BLOCK_C)
    shares = s_parts * RANK_CHUNKS
    finished_ptr, total_ptr, ready_ptr = sync_ptr + 1, sync_ptr + 2, sync_ptr + 3
    s_arrived_ptr = ready_ptr + row_tiles
    arrived_ptr = s_arrived_ptr + row_tiles * RANK_CHUNKS

    ticket = tl.atomic_add(sync_ptr, 1, sem="relaxed")
    if ticket < row_tiles * shares:
        if scale_ptr is not None:
            scale = tl.load(scale_ptr).to(tl.float32) * scale
        pid_m, share = ticket % row_tiles, ticket // row_tiles
        part, chunk = share // RANK_CHUNKS, share % RANK_CHUNKS
        s = _part_of_s(part, s_parts, pid_m * BLOCK_M, chunk * BLOCK_R, x_ptr, stride_xm, down_ptr, stride_dl, stride_dr,
                       mask_ptr, M, L, R, BLOCK_M, BLOCK_L, BLOCK_R, MASKED and FORWARD, SPLIT)  # fmt: skip
        publish(s, workspace_ptr, s_arrived_ptr, ready_ptr, total_ptr, s_ptr, R, scale, pid_m, chunk, part, RANK_CHUNKS,
                s_parts, row_tiles, M, R, BLOCK_M, BLOCK_R)  # fmt: skip
    else:
        # The row blocks of one tile of W run side by side, so that L2 has it for all but the first.
        item = ticket - row_tiles * shares
        pid_m, item = item % row_tiles, item // row_tiles
        part, pid_c = item % parts, item // parts
        acc = _part_of_product(pid_m, pid_c, part, parts, x_ptr, stride_xm, words_ptr, absmax_ptr, nested_absmax_ptr,
                               nested_map_ptr, offset_ptr, workspace_ptr, M, N, K, BLOCK_M, BLOCK_C, BLOCK_L, BLOCK_SIZE,
                               FORWARD, EVEN_L, EVEN_K, SHUFFLE)  # fmt: skip
        last = True
        if parts > 1:
            tile = pid_c * row_tiles + pid_m
            tile_ptr = workspace_ptr + (row_tiles * shares).to(tl.int64) * (BLOCK_M * BLOCK_R)
            tile_ptr += tile.to(tl.int64) * parts * (BLOCK_M * BLOCK_C)
            last, acc = _last_to_arrive(acc, part, parts, tile_ptr, arrived_ptr + tile, BLOCK_M, BLOCK_C)
        if last:
            finish_tile(acc, pid_m, pid_c, out_ptr, up_ptr, stride_ur, stride_uc, bias_ptr, s_ptr, total_ptr, mask_ptr,
                        M, C, R, BLOCK_M, BLOCK_C, BLOCK_R, RANK_CHUNKS, MASKED and not FORWARD, SPLIT)  # fmt: skip
            tl.debug_barrier()
            if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == row_tiles * column_tiles - 1:
                used = 3 + row_tiles * (1 + RANK_CHUNKS + column_tiles)
                for start in tl.range(0, used, 1024):
                    offs = start + tl.arange(0, 1024)
                    tl.store(sync_ptr + offs, 0, mask=offs < used)
