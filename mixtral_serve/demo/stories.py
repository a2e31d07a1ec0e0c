"""A grammar of very short stories.

Owns both directions: it writes stories for the corpus and decides whether a
text is a sentence of the grammar about the requested hero, which is how the
story skill is scored (a story has no single right answer).
"""

import re
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, dialogue, punctuated
from mixtral_serve.demo.words import with_article, words_of

HEROES: Final = words_of(
    "fox bear cat dog rabbit mouse owl frog duck horse lion wolf pig goat hen sheep tiger zebra king queen "
    "girl boy baker farmer sailor dragon robot knight teacher princess"
)
_SLOTS: Final[dict[str, tuple[str, ...]]] = {
    "adjective": ("little", "young", "brave", "clever", "lonely", "happy", "curious", "kind"),
    "place": ("forest", "village", "castle", "garden", "valley", "city", "mountains", "meadow"),
    "thing": ("key", "map", "lamp", "bell", "ring", "book", "kite", "boat", "drum", "flute"),
    "found": ("under a tree", "by the river", "on the road", "behind a wall", "near a bridge"),
    "weather": ("sunny", "rainy", "windy", "cold", "warm"),
    "friend": HEROES,
}
_STAGES: Final[tuple[tuple[str, ...], ...]] = (
    (
        "Once upon a time there was a {adjective} {hero} who lived in the {place}.",
        "A {adjective} {hero} lived in the {place}.",
        "Long ago, a {adjective} {hero} lived alone in the {place}.",
    ),
    (
        "One {weather} day the {hero} found {a_thing} {found}.",
        "One {weather} morning, the {hero} saw {a_thing} {found}.",
        "On a {weather} evening the {hero} lost {a_thing} {found}.",
    ),
    (
        "Then {a_friend} came along and asked for the {thing}.",
        "{A_friend} wanted to have the {thing} too.",
        "The {hero} showed the {thing} to {a_friend}.",
    ),
    (
        "At first they argued, but soon they laughed.",
        "The {friend} smiled and said thank you.",
        "Together they carried the {thing} home.",
    ),
    (
        "From that day on, the {hero} and the {friend} were friends.",
        "In the end the {hero} and the {friend} shared everything.",
        "The {hero} was never lonely again.",
    ),
)
_OPTIONAL_STAGE: Final = 3
_REQUESTS: Final = (
    "Tell me a story about {a}.",
    "Tell a story about {a}.",
    "Please tell me a story about {a}.",
    "Write a story about {a}.",
    "Write a short story about {a}.",
    "Can you tell me a story about {a}?",
    "I would like a story about {a}.",
    "Give me a short story about {a}.",
    "Do you know a story about {a}?",
    "Make up a story about {a}.",
    "Tell me a short story about {a}.",
    "I want to hear about {a}. Tell me a story.",
)


def story(rng: Random, hero: str) -> str:
    """Write a story of four or five sentences about ``hero``."""
    slots = {name: rng.choice(values) for name, values in _SLOTS.items()}
    while slots["friend"] == hero:
        slots["friend"] = rng.choice(_SLOTS["friend"])
    slots["hero"] = hero
    slots["a_thing"] = with_article(slots["thing"])
    slots["a_friend"] = with_article(slots["friend"])
    slots["A_friend"] = slots["a_friend"].capitalize()
    skip = rng.random() < 0.3
    sentences = [
        rng.choice(stage).format(**slots)
        for number, stage in enumerate(_STAGES)
        if not (skip and number == _OPTIONAL_STAGE)
    ]
    return " ".join(sentences)


def story_episode(rng: Random) -> Episode:
    """Ask for a story; held out by the request with its hero."""
    hero = rng.choice(HEROES)
    request = rng.choice(_REQUESTS).format(a=with_article(hero))
    # The last word belongs to the split that the bundled weights were trained with.
    return Episode("story", f"story {request} None", dialogue(punctuated(rng, request), story(rng, hero)))


def _pattern(template: str) -> str:
    """Turn a sentence template into a regular expression with named slots."""
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for name, values in _SLOTS.items():
        text = text.replace("{" + name + "}", f"(?P<{name}>{'|'.join(map(re.escape, values))})", 1)
    text = text.replace("{hero}", "(?P<hero>[a-z]+)", 1)
    text = text.replace("{a_thing}", "an? (?P<thing>[a-z]+)").replace("{a_friend}", "an? (?P<friend>[a-z]+)")
    return text.replace("{A_friend}", "An? (?P<friend>[a-z]+)")


_PATTERNS: Final = [[re.compile(_pattern(template)) for template in stage] for stage in _STAGES]


def is_story(text: str, hero: str) -> bool:
    """Say whether ``text`` is a story of the grammar about ``hero``, telling one thing throughout."""
    known = {"hero": hero}
    sentences = [part if part.endswith(".") else part + "." for part in text.strip().split(". ")]
    stage = 0
    for sentence in sentences:
        match = None
        while match is None and stage < len(_PATTERNS):
            match = next((m for p in _PATTERNS[stage] if (m := p.fullmatch(sentence))), None)
            if match is None and stage != _OPTIONAL_STAGE:
                return False
            stage += 1
        if match is None:
            return False
        for name, value in match.groupdict().items():
            if known.setdefault(name, value) != value:
                return False
    return stage == len(_PATTERNS) and known["friend"] != hero


def accepts_story(episode: Episode, answer: str) -> bool:
    """Score an answer to a story request by the grammar."""
    request = episode.prompt[-1]["content"].lower()
    hero = next(word for word in HEROES if re.search(rf"about an? {word}\b", request))
    return is_story(answer, hero)
