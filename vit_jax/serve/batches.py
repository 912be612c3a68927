# SPDX-License-Identifier: Apache-2.0
"""Requests that come together are computed together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
from anyio import CapacityLimiter, to_thread


class Batcher:
    """Computes rows one by one for its callers, and in batches on the device.

    While one batch is computed, the rows that come form the next one, so nothing waits for more to
    come. Used within `running`.

    Args:
      compute: from `[n, ...]` to `[n, ...]`; is called from one thread at a time.
      most: rows of a batch.
    """

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], *, most: int):
        self._compute, self._most = compute, most
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]]
        # One for all that uses the device.
        self.device: CapacityLimiter

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Around all calls, in one event loop."""
        self._waiting, self.device = asyncio.Queue(), CapacityLimiter(1)
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def __call__(self, row: np.ndarray) -> np.ndarray:
        """The result of a row."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.put_nowait((row, future))
        return await future

    async def _run(self) -> None:
        while True:
            taken = [await self._waiting.get()]
            while len(taken) < self._most and not self._waiting.empty():
                taken.append(self._waiting.get_nowait())
            # Who has gone away waits no more.
            taken = [(row, future) for row, future in taken if not future.done()]
            if not taken:
                continue
            rows, futures = zip(*taken, strict=True)
            try:
                found = await to_thread.run_sync(self._compute, np.stack(rows), limiter=self.device)
            except Exception as e:  # Of whatever type: it belongs to those who asked.
                found = [e] * len(futures)
            for future, value in zip(futures, found, strict=True):
                if future.done():
                    continue
                if isinstance(value, Exception):
                    future.set_exception(value)
                else:
                    future.set_result(value)
