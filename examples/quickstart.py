"""One decoding step of DeepSeek-V3's attention: fill a paged cache, attend, check, time.

    python examples/quickstart.py

Runs on a Hopper GPU, or on any machine with NumPy (then with a smaller batch).
"""

from __future__ import annotations

import sys

import numpy as np

from flashmla_cupy import PagedKVCache, flash_mla_with_kvcache, get_mla_metadata

HEADS = 128  # query heads of DeepSeek-V3; they share one latent vector a token
D_QK, D_V = 576, 512  # a latent vector: 512 columns (all of V) and 64 rotary ones
SCALE = 0.1352  # DeepSeek-V3's; flashmla_cupy.deepseek computes that of a configuration
Q_SIZE = 0.3  # of queries: scores are then of order 1
# What FlashMLA's own tests allow in bfloat16; its values are a tenth of those here, so is its ATOL.
ATOL, RTOL = 8e-3, 2.01 / 128


def main() -> int:
    # The cache picks the device: a Hopper GPU if there is one, else NumPy.
    cache = PagedKVCache(num_pages=4096, page_size=64, dtype="bfloat16")
    on_gpu = cache.device != "cpu"
    if on_gpu:
        import cupy as xp

        device = xp.cuda.runtime.getDeviceProperties(cache.device)["name"].decode()
    else:
        xp, device = np, "CPU"
        print("No Hopper GPU found: computing with NumPy.")

    # A batch of conversations of ragged lengths; for each token one latent vector, for the newest
    # token one query vector a head.
    rng = np.random.default_rng(seed=0)
    batch, longest = (32, 8192) if on_gpu else (4, 400)
    lengths = rng.integers(2, longest, batch, endpoint=True)
    latents = [random(rng, cache.dtype, n, D_QK) for n in lengths]
    q = random(rng, np.float32, batch, 1, HEADS, D_QK) * np.float32(Q_SIZE)
    q = q.astype(cache.dtype)

    # Fill the cache: first the prompts, then, as each decoding step does, one more token for all.
    seqs = [cache.add(latent[:-1]) for latent in latents]
    cache.append_batch(seqs, np.stack([latent[-1:] for latent in latents]))

    # Attend: out [batch, 1, 128, 512] and lse [batch, 128, 1], the log of each softmax's sum.
    q_device = xp.asarray(q)
    out, lse = map(host, cache.attend(q_device, seqs, softmax_scale=SCALE))

    # The same through FlashMLA's interface. A model makes the metadata once for all its layers.
    block_table, cache_seqlens = cache.tables(seqs)
    metadata, num_splits = get_mla_metadata(cache_seqlens, HEADS, 1)

    def decode() -> tuple:
        return flash_mla_with_kvcache(
            q_device,
            cache.storage,
            block_table,
            cache_seqlens,
            D_V,
            metadata,
            num_splits,
            softmax_scale=SCALE,
        )

    out_again, lse_again = map(host, decode())
    same = np.array_equal(out, out_again) and np.array_equal(lse, lse_again)

    # Compare with the definition, in float64; on a GPU a few requests will do.
    some = [lengths.argmin(), lengths.argmax(), 0, batch - 1] if on_gpu else range(batch)
    expected = [reference(q[i, 0], latents[i]) for i in some]
    out_ref, lse_ref = (np.stack(arrays) for arrays in zip(*expected, strict=True))
    out_error, lse_error = np.abs(out[some, 0] - out_ref), np.abs(lse[some, :, 0] - lse_ref)
    relative = np.linalg.norm(out_error) / np.linalg.norm(out_ref)
    close = (out_error <= ATOL + RTOL * np.abs(out_ref)).all() and lse_error.max() <= 1e-3

    print(f"backend   {xp.__name__} {xp.__version__} on {device}")
    print(f"problem   {batch} requests of {lengths.min()} to {lengths.max()} tokens, {HEADS} heads")
    print(f"cache     {cache}")
    print(f"out       max error {out_error.max():.1e}, relative error {relative:.1e}")
    print(f"lse       max error {lse_error.max():.1e}")
    if on_gpu:
        seconds = time_on_gpu(decode)
        moved = lengths.sum() * D_QK * 2 + q.nbytes + out.nbytes + lse.nbytes
        flops = 2 * lengths.sum() * HEADS * (D_QK + D_V)
        rates = f"{moved / seconds / 1e9:.0f} GB/s, {flops / seconds / 1e12:.0f} TFLOPS"
        print(f"time      {seconds * 1e6:.1f} us a call: {rates}")
    if not close:
        print("FAIL: the output differs from float64 by more than the tolerance.")
    elif not same:
        print("FAIL: the two ways to call differ.")
    else:
        print(f"PASS: {len(some)} of {batch} requests checked against float64.")
    return 0 if close and same else 1


def random(rng: np.random.Generator, dtype: np.dtype, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


def host(x) -> np.ndarray:
    """A NumPy or CuPy array as a NumPy array."""
    return x.get() if hasattr(x, "get") else x


def reference(q: np.ndarray, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """softmax(scale q K^T) V of one request in float64, and the log of the softmax's sum."""
    q, k = q.astype(np.float64), latent.astype(np.float64)  # [heads, 576], [tokens, 576]
    score = SCALE * q @ k.T
    lse = np.logaddexp.reduce(score, axis=1)
    return np.exp(score - lse[:, None]) @ k[:, :D_V], lse


def time_on_gpu(call, repeats: int = 50) -> float:
    """Seconds a call takes on the GPU, by CUDA events around many of them, after a warm-up."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    for i in range(-10, repeats):
        if i == 0:
            start.record()
        call()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / repeats


if __name__ == "__main__":
    sys.exit(main())
