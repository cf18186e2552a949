"""Seeds: one stream per purpose."""

from hypothesis import given
from hypothesis import strategies as st

from pipeline.seeds import derive

NAMES = st.lists(st.one_of(st.integers(), st.text("abc0123", max_size=3)), max_size=4)


@given(st.integers(0, 2**40), NAMES)
def test_a_seed_fits_everywhere_and_stays_the_same(seed, names):
    assert 0 <= derive(seed, *names) < 2**63
    assert derive(seed, *names) == derive(seed, *names)


@given(st.integers(0, 9), NAMES, st.integers(0, 9), NAMES)
def test_different_purposes_have_different_seeds(seed, names, other_seed, other_names):
    typed, other = [(type(n), n) for n in names], [(type(n), n) for n in other_names]
    assert (derive(seed, *names) == derive(other_seed, *other_names)) == ((seed, typed) == (other_seed, other))


def test_a_number_is_not_its_digits_and_order_matters():
    assert derive(0, 1) != derive(0, "1")
    assert derive(0, "a", "b") != derive(0, "b", "a")
    assert derive(0, "a", "b") != derive(0, "ab")


def test_the_value_is_the_same_in_every_process_and_version():
    assert derive(7, "rollout", 3) == 8179684826667300484
