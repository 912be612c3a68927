# SPDX-License-Identifier: Apache-2.0
"""Batches that threads of this process fill in the background, a few ahead of the one in use.

A batch is divided into runs of rows, which threads fill in order, straight into the batch's memory.
Filling must release the GIL for most of its time, as decoding does. What a row holds is up to the
caller.
"""

import collections
import concurrent.futures
import contextlib
import functools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from vit_jax.utils.cores import count_cores

T = TypeVar("T")
# The next task and the future that receives its result or error; None to stop.
_Queue = queue.SimpleQueue[tuple[concurrent.futures.Future[None], Callable[[], None]] | None]

# Rows that a thread fills at a time: enough to share its overhead, few enough that all threads end
# a batch at about the same time.
RUN = 32
# Seconds that threads get to end. A thread that reads from a network file system that is gone never
# ends: it is abandoned.
_PATIENCE_S = 10.0


def count_threads(num_threads: int | None) -> int:
    """`num_threads`, or one per core that this process may use if it is None."""
    return count_cores() if num_threads is None else num_threads


def count_ahead(rows: int, num_threads: int) -> int:
    """Batches to fill at a time, so that no thread waits for the end of a batch of `rows`."""
    if not num_threads:
        return 1
    runs = -(-rows // RUN)
    return 2 + -(-2 * num_threads // runs)


class Loader(Iterator[T], Generic[T]):
    """Yields a filled batch for each step, in order.

    Loading starts when the first batch is requested. It ends, and so do the threads, when the
    loader is exhausted, closed or dropped, when it raises, or when the program ends.

    Args:
      steps: the steps to load; may be endless.
      make: `make(step)` returns an empty batch.
      fill: `fill(batch, step, start, stop)` fills rows `start` to `stop`, in any thread. The first
        exception that it raises, in the order of rows, is raised by the loader.
      rows: the number of rows of a batch, or of that of a step.
      num_threads: the number of threads; 0 fills a batch when it is requested, in the caller's.
      ahead: the number of batches in progress, besides those that the caller holds.
      announce: `announce(step)` is called before a step is loaded, by the caller's thread.
    """

    def __init__(
        self,
        steps: Iterable[int],
        *,
        make: Callable[[int], T],
        fill: Callable[[T, int, int, int], None],
        rows: int | Callable[[int], int],
        num_threads: int,
        ahead: int,
        announce: Callable[[int], None] | None = None,
    ):
        self._announce = announce
        self._steps, self._make, self._ahead = iter(steps), make, ahead
        self._rows = rows if callable(rows) else lambda _: rows
        self._batches: collections.deque[tuple[T, list[concurrent.futures.Future[None]]]] = (
            collections.deque()
        )
        self._fill, self._num_threads = fill, num_threads
        self._work: _Queue = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        # This also runs at the end of the program, before the interpreter is torn down.
        self._stop = weakref.finalize(self, _stop, self._work, self._threads)

    def __next__(self) -> T:
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> T:
        if not self._num_threads and self._stop.alive:
            step = next(self._steps)
            batch = self._make(step)
            self._fill(batch, step, 0, self._rows(step))
            return batch
        if not self._threads and self._stop.alive:
            for i in range(self._num_threads):
                # Python does not wait for daemon threads; `_stop` does, after it ends the work.
                thread = threading.Thread(
                    target=_run, args=(self._work,), name=f"input {i}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
        while self._stop.alive and len(self._batches) < self._ahead:
            step = next(self._steps, None)
            if step is None:
                break
            if self._announce is not None:
                self._announce(step)
            batch = self._make(step)
            rows = self._rows(step)
            runs = [(start, min(start + RUN, rows)) for start in range(0, rows, RUN)]
            futures = [concurrent.futures.Future() for _ in runs]
            for future, run in zip(futures, runs, strict=True):
                self._work.put((future, functools.partial(self._fill, batch, step, *run)))
            self._batches.append((batch, futures))
        if not self._batches:
            raise StopIteration
        batch, futures = self._batches.popleft()
        for future in futures:
            future.result()
        return batch

    def close(self) -> None:
        """Ends the work and waits for the threads; `next` then raises `StopIteration`."""
        self._stop()
        self._batches.clear()


def _run(work: _Queue) -> None:
    while (item := work.get()) is not None:
        future, fill = item
        try:
            future.set_result(fill())
        except BaseException as e:
            future.set_exception(e)
        del item, future, fill  # They hold the batch.


def _stop(work: _Queue, threads: list[threading.Thread]) -> None:
    with contextlib.suppress(queue.Empty):
        while True:
            work.get_nowait()
    for _ in threads:
        work.put(None)
    deadline = time.monotonic() + _PATIENCE_S
    for thread in threads:
        if thread is not threading.current_thread():  # The garbage collector may run in any thread.
            thread.join(max(0.0, deadline - time.monotonic()))
