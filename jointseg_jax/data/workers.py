"""Threads and processes that work ahead of their use, and do not outlive the run."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import grain
from absl import flags

from jointseg_jax.config import ReadConfig

Item = TypeVar("Item")
Result = TypeVar("Result")


def die_with_parent(worker: int, workers: int) -> None:
    """Kills this worker as soon as its parent process is gone (Grain's ``worker_init_fn``)."""
    # A SIGKILLed run cannot tell its workers to stop, and a worker blocked on a full queue never
    # looks: so every worker waits, in a thread of its own, for the end of its parent.
    # ``prctl(PR_SET_PDEATHSIG)`` was rejected: the kernel counts as parent the *thread* that
    # started the worker, and Grain starts workers from a prefetch thread that ends on every
    # ``close()``. The signal then kills workers in the middle of handing over their last batches.
    parent = multiprocessing.parent_process()
    if parent is None:
        raise RuntimeError("die_with_parent was called outside a worker process")
    watch = threading.Thread(target=_outlive, args=(parent.sentinel,), daemon=True)
    watch.name = f"parent-watch-{worker}-of-{workers}"
    watch.start()


def _outlive(sentinel: int) -> None:
    # The sentinel is a pipe that only the parent holds open: it closes with the parent's death.
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def read_ahead(batches: grain.MapDataset, reading: ReadConfig) -> grain.IterDataset:
    """Returns the iterable form of ``batches`` that reads ahead."""
    if not flags.FLAGS.is_parsed():  # Grain reads them, and outside ``app.run`` nobody parses them
        flags.FLAGS.mark_as_parsed()
    options = grain.ReadOptions(num_threads=reading.threads, prefetch_buffer_size=reading.prefetch)
    ahead = batches.to_iter_dataset(options)
    if reading.workers == 0:
        return ahead
    processes = grain.MultiprocessingOptions(
        num_workers=reading.workers, per_worker_buffer_size=reading.prefetch
    )
    return ahead.mp_prefetch(processes, worker_init_fn=die_with_parent)


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], threads: int
) -> Generator[Result, None, None]:
    """Yields ``function(item)`` for every item, in order, with a few results made ahead."""
    # ``ThreadPoolExecutor.map`` was rejected: it keeps every result that nobody has taken yet.
    ahead: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
