"""`examples.ray_batch` reads no further ahead of what is answered than Ray's object store holds."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from examples import ray_batch

# Ray takes no smaller one.
OBJECT_STORE_BYTES = 80 * 2**20
SHARD_BYTES = 4 * 2**20
NUM_SHARDS = 40
LIMIT_SECONDS = 60


def test_reading_waits_for_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that begins only when nothing more is read has not made it read everything."""
    (log := tmp_path / "read").touch()

    def read(_: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for first in range(NUM_SHARDS):
            with log.open("a") as file:
                file.write(".")
            yield {"first": first, "rows": bytes(SHARD_BYTES)}

    class Waiting:
        """In place of a replica."""

        def __init__(self, _: None) -> None:
            self.num_done = 0
            self.halt = asyncio.Lock()

        async def __call__(self, shard: dict[str, Any]) -> dict[str, int]:
            async with self.halt:
                if not self.num_done:
                    await self.until_reading_halts()
                self.num_done += 1
            return {"ahead": log.stat().st_size - self.num_done}

        async def until_reading_halts(self) -> None:
            num_read = 0
            for _ in range(LIMIT_SECONDS // 3):
                if num_read == (num_read := log.stat().st_size):
                    return
                await asyncio.sleep(3)

    monkeypatch.setattr(ray_batch, "OBJECT_STORE_BYTES", OBJECT_STORE_BYTES)
    monkeypatch.setattr("examples.batch.replica.Replica", Waiting)
    # Ray lets its workers run after everything else, which may be never on a busy machine.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_process_group_cleanup_enabled", "1")
    try:
        ray_batch._start_ray(None, 1)
        shards = ray_batch._shards(None, read, tmp_path, replicas=1, cpus=1, gpus=0)
        ahead = [shard["ahead"] for shard in shards.iter_rows()]
    finally:
        ray.shutdown()
    assert len(ahead) == NUM_SHARDS
    assert max(ahead) * SHARD_BYTES <= OBJECT_STORE_BYTES
