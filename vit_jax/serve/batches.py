# SPDX-License-Identifier: Apache-2.0
"""Batches the rows of concurrent requests."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
from anyio import CapacityLimiter, to_thread


class Batcher:
    """Takes rows one at a time and computes them in batches on the device.

    Rows that arrive while a batch is computed form the next batch, so no row waits for others to
    arrive. Used within `running`.

    Args:
      compute: maps an array `[n, ...]` to one of `[n, ...]`, row by row; called from one thread at
        a time, with n up to `max_rows`.
    """

    def __init__(self, compute: Callable[[np.ndarray], np.ndarray], *, max_rows: int):
        self._compute, self._max_rows = compute, max_rows
        self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]]
        # Shared by everything that uses the device.
        self.device: CapacityLimiter

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the batches of all calls inside the `with` block, in the current event loop."""
        self._queue, self.device = asyncio.Queue(), CapacityLimiter(1)
        task = asyncio.create_task(self._run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def __call__(self, row: np.ndarray) -> np.ndarray:
        """The row of `compute`'s result that belongs to `row`, without the batch dimension.

        Raises:
          Exception: whatever `compute` raised for the batch.
        """
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((row, future))
        return await future

    async def _run(self) -> None:
        while True:
            taken = [await self._queue.get()]
            while len(taken) < self._max_rows and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            # Requests that were cancelled need no result.
            taken = [(row, future) for row, future in taken if not future.done()]
            if not taken:
                continue
            rows, futures = zip(*taken, strict=True)
            try:
                found = await to_thread.run_sync(self._compute, np.stack(rows), limiter=self.device)
            except Exception as e:  # Any exception belongs to the requests of this batch.
                found = [e] * len(futures)
            for future, value in zip(futures, found, strict=True):
                if future.done():
                    continue
                if isinstance(value, Exception):
                    future.set_exception(value)
                else:
                    future.set_result(value)
