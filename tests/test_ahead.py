"""Work ahead of its use: everything in order, no further ahead than asked."""

from collections.abc import Generator

from hypothesis import given, settings
from hypothesis import strategies as st

from vaejob.data.ahead import in_background


@settings(deadline=None)
@given(depth=st.integers(1, 9), count=st.integers(0, 40), taken=st.integers(0, 40))
def test_a_thread_is_never_further_ahead_than_its_depth(depth: int, count: int, taken: int) -> None:
    made = []

    def items() -> Generator[int, None, None]:
        for number in range(count):
            made.append(number)
            yield number

    given_out = in_background(items(), depth=depth)
    for expected in range(min(taken, count)):
        assert next(given_out) == expected
        assert len(made) <= expected + 1 + depth + 1  # one more, in the thread's hand
    assert list(given_out) == list(range(min(taken, count), count))
