"""Stop strings over a stream of text pieces.

Owns: ``StopMatcher``, which decides how much of the text is safe to show and when it ends.

The rule: the match that *completes* first wins, and of those that complete at the same character the longest.
It looks at characters only, so the result does not depend on how the text was cut into pieces. Text is safe as
soon as no stop string can begin in it any more: exactly the longest tail that is a beginning of some stop
string is held back.

One Knuth-Morris-Pratt automaton per stop string: each character is looked at a constant number of times on
average, however the text and the stops were chosen. Rejected: searching the whole text after each token
(quadratic) and a regular expression (cannot say what to hold back).
"""

from __future__ import annotations

from typing import NamedTuple


class StopOutcome(NamedTuple):
    """What came of one piece of text."""

    text: str
    """Safe to emit now."""
    matched: str | None
    """The stop string that ended the text, or None."""


class _Automaton:
    """How much of one stop string the text seen so far ends with."""

    __slots__ = ("_failure", "matched", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.matched = 0
        self._failure = [0] * len(stop)
        length = 0
        for index in range(1, len(stop)):
            while length and stop[index] != stop[length]:
                length = self._failure[length - 1]
            if stop[index] == stop[length]:
                length += 1
            self._failure[index] = length

    def advance(self, character: str) -> bool:
        """Take one character; True when it completes the stop string."""
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._failure[self.matched - 1]
        if self.stop[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.stop)


class StopMatcher:
    """Watches one request's text for its stop strings."""

    __slots__ = ("_automata", "_beginnings", "_done", "_held", "_include")

    def __init__(self, stops: tuple[str, ...], *, include: bool = False) -> None:
        """With ``include`` the stop string itself is part of the text.

        Raises:
            ValueError: an empty stop string, which would end every text before it starts.
        """
        if "" in stops:
            raise ValueError("a stop string is not empty")
        # Longest first: of two that complete at the same character the longer one began earlier.
        self._automata = tuple(_Automaton(stop) for stop in sorted(set(stops), key=lambda s: (-len(s), s)))
        self._beginnings = frozenset(stop[0] for stop in stops)
        self._include = include
        self._held = ""
        self._done = False

    def push(self, text: str) -> StopOutcome:
        """Take the next piece of text. After a match nothing may follow."""
        assert not self._done, "the text has ended with a stop string"
        if not self._held and self._beginnings.isdisjoint(text):
            return StopOutcome(text, None)  # as nearly every piece: no stop string has begun, and none begins
        buffer = self._held + text
        for index, character in enumerate(text, start=len(self._held)):
            for automaton in self._automata:
                if automaton.advance(character):
                    return self._ended(buffer[: index + 1], automaton.stop)
        num_held = max(automaton.matched for automaton in self._automata)
        safe = len(buffer) - num_held
        self._held = buffer[safe:]
        return StopOutcome(buffer[:safe], None)

    def flush(self) -> str:
        """What is held back, when the text ends without a match. Empty after a match."""
        held, self._held = self._held, ""
        return held

    def _ended(self, text: str, stop: str) -> StopOutcome:
        self._done = True
        self._held = ""
        return StopOutcome(text if self._include else text[: -len(stop)], stop)
