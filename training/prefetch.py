"""Numbered batches drawn one thread ahead of who uses them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")


def numbered(make: Callable[[int], T], first: int, *, ahead: int = 2) -> Generator[T, None, None]:
    """make(first), make(first + 1), …; what `make` raises is raised here. Close it to end the thread."""
    ready: Queue[T | BaseException] = Queue(maxsize=ahead)
    stop = Event()

    def work() -> None:
        number = first
        while not stop.is_set():
            try:
                item: T | BaseException = make(number)
            except Exception as error:  # noqa: BLE001  # handed over, and raised where it is waited for
                item = error
            number += 1
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except Full:
                    continue

    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            try:
                item = ready.get(timeout=1.0)
            except Empty:
                continue
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        worker.join()
