"""MLA's numbers, those of a tile, and the arithmetic of both. Imports nothing.

The kernels compute tiles of 64 query rows by 64 tokens. A row is one (query position, query head)
pair of one kv head.
"""

HEAD_DIM = 576  # of q and of a latent row: 512 latent and 64 rotary columns
HEAD_DIM_ROPE = 64  # the rotary columns, the last ones of q and of a latent row
HEAD_DIM_V = 512  # of V, the first columns of a latent row, and of out
PAGE_SIZES = (16, 32, 64, 128, 256)  # tokens of a page of k_cache
ROWS_PER_BLOCK = 64  # query rows of a tile, and of a thread block
TOKENS_PER_TILE = 64
MAX_SPLITS = 160  # pieces of a request that combine.cu merges; parts at most
METADATA_COLUMNS = 8  # of tile_scheduler_metadata; `schedule.split` documents them
NUM_SMS_CPU = 132  # what schedules of host arrays are made for: an H100 or H200


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def num_sm_parts(num_sms: int, rows: int, h_kv: int) -> int:
    """Rows of tile_scheduler_metadata: parts such that parts x row blocks fill the GPU once.

    `rows` is s_q * h_q // h_kv, the query rows of one kv head."""
    return max(1, min(num_sms // (h_kv * ceil_div(rows, ROWS_PER_BLOCK)), MAX_SPLITS))
