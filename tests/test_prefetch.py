import threading

import pytest

from opd.prefetch import prefetch


def test_the_next_is_made_while_this_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def make(number):
        made[number].set()
        return number

    found = prefetch(make, range(3))
    for number in found:
        assert all(event.wait(10) for event in made[: number + 2])
        assert not any(event.is_set() for event in made[number + 2 :])
    assert list(found) == []
    assert list(prefetch(make, [])) == []


def test_an_error_is_raised_in_its_turn():
    def make(number):
        if number == 1:
            raise KeyError(number)
        return number

    results = prefetch(make, range(3))
    assert next(results) == 0
    with pytest.raises(KeyError):
        next(results)
