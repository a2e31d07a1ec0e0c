"""Word lists that several skills draw from.

Owns plain data only: common nouns, first names, cities, and a generator of
made-up names, so that skills built on copying meet words they never saw.
"""

from random import Random
from typing import Final


def words_of(text: str) -> tuple[str, ...]:
    """Split a list of words written as one text."""
    return tuple(text.split())


NOUNS: Final[tuple[str, ...]] = words_of(
    """apple banana bread cake carrot cheese egg grape honey lemon milk onion pear rice soup tea water
    ant bear bird cat cow dog duck fish fox goat horse lion mouse owl rabbit sheep tiger wolf
    ball bell boat book chair clock cup door hat key lamp map pen ring shoe table train"""
)

FIRST_NAMES: Final[tuple[str, ...]] = words_of(
    """Ana Ben Carla David Emma Felix Grace Hugo Ida Jack Kate Leo Maria Nina Oscar Paula Rosa Sam Tom
    Victor Alice Bob Clara Daniel Eva Frank Helen Ivan John Lucy Mark Nora Peter Ruth Sofia Max Mia"""
)

CITIES: Final[tuple[str, ...]] = words_of(
    """Rome Paris London Berlin Madrid Vienna Oslo Lisbon Dublin Athens Warsaw Tokyo Cairo Delhi Beijing
    Lima Ottawa Boston Milan Sydney Seoul Porto Dallas Zurich"""
)

COLOURS: Final[tuple[str, ...]] = words_of("red blue green yellow black white brown pink purple grey orange")
WEEKDAYS: Final[tuple[str, ...]] = words_of("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

_ONSETS: Final = words_of("b c d f g h j k l m n p r s t v w z br dr fl gr kr pl st tr")
_VOWELS: Final = words_of("a e i o u")
_CODAS: Final = ["", "", "", "n", "r", "l", "s", "m", "x"]


def made_up(rng: Random, syllables: int = 2) -> str:
    """Return a pronounceable word that is most likely in no list."""
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))


def first_name(rng: Random) -> str:
    """Return a first name, now and then a made-up one."""
    return rng.choice(FIRST_NAMES) if rng.random() < 0.95 else made_up(rng).capitalize()


def city(rng: Random) -> str:
    """Return the name of a city, now and then a made-up one."""
    return rng.choice(CITIES) if rng.random() < 0.97 else made_up(rng).capitalize()


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
