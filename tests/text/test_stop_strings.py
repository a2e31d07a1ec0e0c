from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtral_serve.text.stop_strings import StopMatcher, StopOutcome

ALPHABET = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4).map(tuple)


def naive(text: str, stops: tuple[str, ...], *, include: bool) -> tuple[str, str | None]:
    """Read one more character at a time; the first end of a stop string ends the text, the longest stop first."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end if include else end - len(stop)], stop
    return text, None


def matched(pieces: list[str], stops: tuple[str, ...], *, include: bool = False) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include=include)
    shown = ""
    for piece in pieces:
        outcome = matcher.push(piece)
        shown += outcome.text
        if outcome.matched is not None:
            return shown, outcome.matched
    return shown + matcher.flush(), None


def cut(text: str, places: list[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]


@given(ALPHABET, STOPS, st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_row69_agrees_with_the_naive_search_however_the_text_is_cut(
    text: str, stops: tuple[str, ...], places: list[int], include: bool
) -> None:
    assert matched(cut(text, places), stops, include=include) == naive(text, stops, include=include)


@given(ALPHABET, STOPS)
def test_row69_no_part_of_a_stop_string_leaks_before_it_is_decided(text: str, stops: tuple[str, ...]) -> None:
    """After each character, what is held back is exactly the longest tail that begins some stop string."""
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        outcome = matcher.push(character)
        if outcome.matched is not None:
            return
        shown += outcome.text
        tails = (text[end - size : end] for size in range(1, end + 1))
        longest = max((len(tail) for tail in tails if any(s.startswith(tail) for s in stops)), default=0)
        assert len(shown) == end - longest


def test_the_first_to_complete_wins_and_the_longest_of_equals() -> None:
    assert matched(["xabcd"], ("bc", "abcd")) == ("xa", "bc")
    assert matched(["xabc"], ("bc", "abc")) == ("x", "abc")


def test_without_stops_text_passes_at_once() -> None:
    matcher = StopMatcher(())
    assert matcher.push("abc") == StopOutcome("abc", None)
    assert matcher.flush() == ""


def test_included_stop_strings_are_shown_whole() -> None:
    assert matched(["a", "EN", "D", "more"], ("END",), include=True) == ("aEND", "END")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="not empty"):
        StopMatcher(("a", ""))


def test_long_adversarial_text_is_linear() -> None:
    """A quadratic matcher would look at 10^10 characters here."""
    matcher = StopMatcher(("a" * 64 + "b",))
    assert len(matcher.push("a" * 200_000).text) == 200_000 - 64
