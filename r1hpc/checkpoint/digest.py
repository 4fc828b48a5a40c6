"""Digests of checkpoint files: xxh3_128, streamed in 8 MiB pieces.

xxh3_128 (https://github.com/Cyan4973/xxHash) is not cryptographic; it finds accidents. It was chosen
for speed: hashing must not be what a save inside a 30 s preemption window waits for. Measured figures
are in benchmarks/checkpoint_seal.py.
"""

import os
import re

import xxhash

CHUNK_BYTES = 8 * 2**20
DIGEST = re.compile(r"xxh3_128:[0-9a-f]{32}")


def digest_bytes(raw: bytes) -> str:
    return f"xxh3_128:{xxhash.xxh3_128(raw).hexdigest()}"


def digest_fd(fd: int) -> tuple[int, str]:
    """(size in bytes, digest) of what an open file holds from its start."""
    state = xxhash.xxh3_128()
    # One byte more than the file: a small file then needs no 8 MiB, and growth is still noticed.
    piece = memoryview(bytearray(min(CHUNK_BYTES, os.fstat(fd).st_size + 1)))
    size = 0
    os.lseek(fd, 0, os.SEEK_SET)
    while count := os.readv(fd, [piece]):
        state.update(piece[:count])
        size += count
    return size, f"xxh3_128:{state.hexdigest()}"
