"""Work ahead of who needs it: in order, so far and no farther, with its errors where they belong."""

import threading
import time

import pytest

from trainer.base.ahead import ahead


def test_items_come_in_order_and_so_many_wait():
    made = []

    def work():
        for number in range(20):
            made.append(number)
            yield number

    with ahead(work(), most=2) as items:
        assert next(items) == 0
        while len(made) < 4:  # two wait, and one more is done
            time.sleep(0.01)
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]
        assert [*items] == [*range(1, 20)]


@pytest.mark.parametrize("error", [ValueError("row 2"), KeyboardInterrupt()])
def test_an_error_comes_where_its_item_would(error):
    def work():
        yield from (0, 1)
        raise error

    with ahead(work()) as items:
        assert [next(items), next(items)] == [0, 1]
        with pytest.raises(type(error)) as caught:
            next(items)
    assert caught.value is error


def test_whoever_stops_early_leaves_no_thread():
    closed = threading.Event()

    def work():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with ahead(work()) as items:
        next(items)
    assert closed.wait(60)
