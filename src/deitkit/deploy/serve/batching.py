"""Images of many requests as one batch: a queue in the event loop, one thread that runs the network."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from deitkit.config import HeadChoice
from deitkit.models.predict import Predictor


class Waiting(NamedTuple):
    """An image that waits for its probabilities."""

    view_HWC: NDArray[np.uint8]
    """its evaluation view"""
    head: HeadChoice
    answer: asyncio.Future[torch.Tensor]


@final
class Batcher:
    """Collects images until there are `max_batch`, or the first has waited `max_delay_ms`, and gives them to the network together."""

    def __init__(self, predictor: Predictor, max_batch: int, max_delay_ms: float) -> None:
        self.predictor = predictor
        self.max_batch, self.max_delay_s = max_batch, max_delay_ms / 1000
        self.images = self.batches = 0
        """how many the network has been given"""
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue()

    async def probabilities(self, view_HWC: NDArray[np.uint8], head: HeadChoice) -> torch.Tensor:
        """Probabilities (K,) of one evaluation view. Raises what the network raises."""
        answer: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()
        await self._queue.put(Waiting(view_HWC, head, answer))
        return await answer

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within this block images are answered."""
        with ThreadPoolExecutor(1, "network") as thread:
            task = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                task.cancel()

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [
                one for one in await self._collect() if not one.answer.done()
            ]  # done: its request has been given up
            for part in _alike(batch):
                try:
                    found = await loop.run_in_executor(thread, self._compute, part)
                except Exception as error:  # belongs to those who wait for it: the next batch has nothing to do with it
                    for one in part:
                        if not one.answer.done():
                            one.answer.set_exception(error)
                    continue
                for one, probabilities_K in zip(part, found, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(probabilities_K)

    async def _collect(self) -> list[Waiting]:
        batch = [await self._queue.get()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.max_delay_s):
                while len(batch) < self.max_batch:
                    batch.append(await self._queue.get())
        while len(batch) < self.max_batch and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return batch

    def _compute(self, part: list[Waiting]) -> torch.Tensor:
        self.images, self.batches = self.images + len(part), self.batches + 1
        return self.predictor.probabilities(np.stack([one.view_HWC for one in part]), part[0].head)


def _alike(batch: list[Waiting]) -> list[list[Waiting]]:
    """Those of one shape and head together."""
    parts: dict[tuple[object, ...], list[Waiting]] = {}
    for one in batch:
        parts.setdefault((one.head, *one.view_HWC.shape), []).append(one)
    return list(parts.values())
