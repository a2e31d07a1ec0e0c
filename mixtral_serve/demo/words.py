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
    """apple banana bread butter cake carrot cheese cherry coffee cookie egg fig grape honey
    jam juice lemon mango melon milk nut onion orange pasta peach pear pepper plum potato rice salad salt
    soup sugar tea tomato water
    ant bear bee bird cat cow deer dog duck eagle fish fox frog goat hen horse lion mouse owl pig rabbit
    seal sheep snake swan tiger wolf zebra
    bag ball bed bell boat book box brush car chair clock cup desk door drum flag fork glass hat house
    key kite knife lamp map paper pen phone plate ring road roof rope shirt shoe spoon table train tree
    truck wall wheel window"""
)

FIRST_NAMES: Final[tuple[str, ...]] = words_of(
    """Ana Ben Carla David Emma Felix Grace Hugo Ida Jack Kate Leo Maria Nina Oscar Paula Quinn
    Rosa Sam Tom Uma Victor Wendy Yara Zoe Alice Bob Clara Daniel Eva Frank Helen Ivan Julia Karl Lucy Mark
    Nora Otto Peter Ruth Sofia Tim Vera Will John Mary Lena Max Mia"""
)

CITIES: Final[tuple[str, ...]] = words_of(
    """Rome Paris London Berlin Madrid Vienna Oslo Lisbon Dublin Athens Warsaw Prague Tokyo
    Cairo Delhi Beijing Lima Ottawa Boston Chicago Milan Munich Geneva Sydney Toronto Seoul Kyoto Porto
    Lyon Naples Dallas Denver Seattle Zurich"""
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
    """Return a first name, one time in three a made-up one."""
    return rng.choice(FIRST_NAMES) if rng.random() < 0.65 else made_up(rng).capitalize()


def city(rng: Random) -> str:
    """Return the name of a city, one time in four a made-up one."""
    return rng.choice(CITIES) if rng.random() < 0.75 else made_up(rng).capitalize()


def with_article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"an {noun}" if noun[0].lower() in "aeiou" else f"a {noun}"
