"""A sample's split is a function of its key alone."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vaejob.data.splits import divide, parse_split
from vaejob.errors import DataError

KEYS = st.lists(st.text(max_size=20), unique=True, max_size=50)
FRACTIONS = parse_split("train=0.7,validation=0.1,test=0.2")


@given(KEYS, st.randoms())
def test_a_split_depends_neither_on_order_nor_on_the_other_keys(keys, random):
    split_of = {keys[i]: name for name, indices in divide(keys, FRACTIONS).items() for i in indices}
    others = random.sample(keys, len(keys) // 2)
    assert all(split_of[others[i]] == name for name, indices in divide(others, FRACTIONS).items() for i in indices)


@given(KEYS)
def test_every_key_falls_into_one_split(keys):
    chosen = divide(keys, FRACTIONS)
    assert sorted(index for indices in chosen.values() for index in indices) == list(range(len(keys)))
    assert all(indices == sorted(indices) for indices in chosen.values())


def test_splits_have_about_their_share():
    chosen = divide([f"{i:08d}" for i in range(10_000)], FRACTIONS)
    # Four standard deviations of a binomial are at most 4 * sqrt(10000 / 4) = 200.
    for name, fraction in FRACTIONS.items():
        assert abs(len(chosen[name]) - 10_000 * fraction) < 200


def test_tenths_sum_to_one():
    assert sum(parse_split(",".join(f"s{i}=0.1" for i in range(10))).values()) == Fraction(1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train=0.9,test=0.2", "its fractions sum to 1.1, they must sum to 1"),
        ("train=0.5,train=0.5", "names with fractions such as train=0.9,test=0.1"),
        ("train,test", "its fractions sum to 2, they must sum to 1"),
        ("train=most", "it must be a fraction such as 0.1"),
        ("../train", "it must be one name"),
        ("", "it must be one name"),
    ],
)
def test_a_wrong_split_is_refused_in_one_line(text, says):
    with pytest.raises(DataError, match=says) as caught:
        parse_split(text)
    assert "\n" not in str(caught.value)
