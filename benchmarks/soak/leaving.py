"""How long the KV cache keeps what belongs to a client that left."""

import asyncio

from benchmarks.soak.client import Client, Way
from benchmarks.soak.server import BUSY, KV_USAGE, metrics
from benchmarks.soak.traffic import COMPLETION, Request

# One token a forward: it is far from its end when its client leaves.
LONG = {
    "prompt": "How many?",
    "max_tokens": 400,
    "temperature": 0,
    "ignore_eos": True,
    "return_token_ids": True,
    "vllm_xargs": {"diffusion_canvas_length": 1, "diffusion_threshold": 1.0},
}
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 300.0


async def seconds_until_free(client: Client, address: str) -> float:
    """Leave one long stream of an idle server; seconds until no KV page is in use.

    Raises:
        TimeoutError: some page is still in use after `PATIENCE_SECONDS`.
    """
    clock = asyncio.get_running_loop().time
    answer = await client.ask(Request("leaves", COMPLETION, LONG), Way(True, leave_after=3))
    left = clock()
    assert answer[0].finish_reason is None, "the answer ended before its client left"
    await idle(address)
    return clock() - left


async def idle(address: str) -> None:
    """Return when the server holds no request and no KV page.

    Raises:
        TimeoutError: it still does after `PATIENCE_SECONDS`.
    """
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            now = await metrics(address)
            if not any(now[name] for name in (KV_USAGE, *BUSY)):
                return
            await asyncio.sleep(POLL_SECONDS)
