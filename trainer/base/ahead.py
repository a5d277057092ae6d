"""Work done ahead of who needs it, by a thread."""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Full, Queue
from typing import TypeVar

T = TypeVar("T")
OFTEN = 0.1  # seconds after which a thread that waits looks whether it is still wanted


@contextmanager
def ahead(items: Iterable[T], most: int = 1) -> Iterator[Iterator[T]]:
    """`items`, made by a thread of which `most` at a time wait to be taken.

    An error of the thread is raised where its item would come. When the block ends, the thread ends after the item that
    it is at; nobody waits for it, since it may be waiting for a line of stdin.
    """
    made: Queue[tuple[list[T], BaseException | None]] = Queue(most)
    ended = threading.Event()

    def put(item: list[T], error: BaseException | None = None) -> None:
        while not ended.is_set():
            with suppress(Full):
                made.put((item, error), timeout=OFTEN)
                break

    def work() -> None:
        try:
            for item in items:
                put([item])
                if ended.is_set():
                    return
            put([])
        except BaseException as error:
            put([], error)

    thread = threading.Thread(target=work, name="ahead", daemon=True)

    def taken() -> Iterator[T]:
        while True:
            try:
                item, error = made.get(timeout=OFTEN)  # signals are heard in between
            except Empty:
                continue
            if error is not None:
                raise error
            if not item:
                return
            yield item[0]

    thread.start()
    try:
        yield taken()
    finally:
        ended.set()
