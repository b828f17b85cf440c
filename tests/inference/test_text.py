"""Stop strings are found wherever tokens cut them, and nothing is shown that may become one."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from inference.text import StopStrings


def shown(pieces: list[str], stops: tuple[str, ...]) -> list[str]:
    stream = StopStrings(stops)
    return [*[stream.push(piece) for piece in pieces], stream.finish()]


def test_text_is_held_back_only_while_it_may_be_a_stop_string():
    assert shown(["ab", "c", "d", "x"], ("cde",)) == ["ab", "", "", "cdx", ""]
    assert shown(["a", "b", "c", "d"], ("bc",)) == ["a", "", "", "", ""]
    assert shown(["a", "ba", "b"], ("bab",)) == ["a", "", "", ""]
    assert shown(["a", "ba"], ("bab",)) == ["a", "", "ba"]
    assert shown(["one", "two"], ()) == ["one", "two", ""]


def test_the_stop_string_that_is_complete_first_counts():
    assert "".join(shown([*"xaby"], ("xaby", "ab"))) == "x"
    assert "".join(shown(["xaby"], ("xaby", "ab"))) == "x"
    assert "".join(shown(["xab"], ("b", "ab"))) == "x"
    assert "".join(shown(["no\n\nUser: hi"], ("User:", "\n\n"))) == "no"


SMALL = st.text("ab", max_size=12)


@given(SMALL, st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), st.lists(st.integers(0, 12)))
def test_pieces_do_not_matter_and_nothing_is_lost(text, stops, cuts):
    cuts = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(ends)[1]] if ends else text
    assert "".join(shown(pieces, tuple(stops))) == "".join(shown([*text], tuple(stops))) == expected
