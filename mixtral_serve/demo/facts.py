"""Everyday facts and the many ways to ask for them.

Owns the fact table, grouped in relations (capitals, colours, opposites, ...).
Every fact is taught, but each relation holds out some pairs of subject and
phrasing, so the evaluation asks known facts in words they were never asked in.
"""

from dataclasses import dataclass
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, casual, dialogue, is_held_out


@dataclass(frozen=True, slots=True)
class Relation:
    """A family of facts: subject to object, with its questions, answer and follow-ups."""

    name: str
    pairs: dict[str, str]
    questions: tuple[str, ...]
    statement: str
    follow_ups: tuple[str, ...]


def _pairs(text: str) -> dict[str, str]:
    split = (part.split("=") for part in text.split(","))
    return {subject.strip(): fact.strip() for subject, fact in split}


CAPITALS: Final = Relation(
    "capital",
    _pairs(
        "France=Paris, Italy=Rome, Spain=Madrid, Germany=Berlin, Portugal=Lisbon, Austria=Vienna, Greece=Athens,"
        "Ireland=Dublin, Norway=Oslo, Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, Poland=Warsaw,"
        "Hungary=Budapest, Belgium=Brussels, Switzerland=Bern, Russia=Moscow, Turkey=Ankara, Egypt=Cairo,"
        "Kenya=Nairobi, Morocco=Rabat, India=New Delhi, China=Beijing, Japan=Tokyo, Thailand=Bangkok,"
        "Canada=Ottawa, Mexico=Mexico City, Cuba=Havana, Brazil=Brasilia, Argentina=Buenos Aires, Peru=Lima,"
        "Chile=Santiago, Australia=Canberra, England=London, Romania=Bucharest, Ukraine=Kyiv"
    ),
    (
        "What is the capital of {s}?",
        "What's the capital of {s}?",
        "Which city is the capital of {s}?",
        "Name the capital of {s}.",
        "Tell me the capital of {s}.",
        "Do you know the capital of {s}?",
        "Can you tell me the capital of {s}?",
        "What is the capital city of {s}?",
        "{s} has which capital?",
        "The capital of {s} is?",
        "I want to know the capital of {s}.",
        "What city is the capital of {s}?",
        "What is {s}'s capital?",
        "Give me the capital of {s}.",
        "Capital of {s}?",
    ),
    "The capital of {s} is {o}.",
    ("And of {s}?", "And {s}?", "What about {s}?", "And the capital of {s}?", "How about {s}?"),
)

RELATIONS: Final[tuple[Relation, ...]] = (
    CAPITALS,
    Relation(
        "language",
        _pairs(
            "France=French, Italy=Italian, Spain=Spanish, Germany=German, Portugal=Portuguese, Greece=Greek,"
            "Poland=Polish, Japan=Japanese, China=Chinese, Russia=Russian, England=English, Brazil=Portuguese,"
            "Mexico=Spanish, Egypt=Arabic, Sweden=Swedish, Turkey=Turkish"
        ),
        (
            "What language do people speak in {s}?",
            "Which language is spoken in {s}?",
            "What is the language of {s}?",
            "What do they speak in {s}?",
            "Tell me the language of {s}.",
            "Which language do they speak in {s}?",
            "What is the main language of {s}?",
            "Name the language spoken in {s}.",
        ),
        "People in {s} speak {o}.",
        ("And in {s}?", "What about {s}?", "And {s}?"),
    ),
    Relation(
        "continent",
        _pairs(
            "France=Europe, Italy=Europe, Spain=Europe, Germany=Europe, Japan=Asia, China=Asia, India=Asia,"
            "Thailand=Asia, Egypt=Africa, Kenya=Africa, Morocco=Africa, Brazil=South America, Peru=South America,"
            "Chile=South America, Canada=North America, Mexico=North America"
        ),
        (
            "On which continent is {s}?",
            "Which continent is {s} in?",
            "What continent is {s} on?",
            "Where is {s}?",
            "In what part of the world is {s}?",
            "Tell me the continent of {s}.",
            "Name the continent of {s}.",
        ),
        "{s} is in {o}.",
        ("And {s}?", "What about {s}?", "How about {s}?"),
    ),
    Relation(
        "colour",
        _pairs(
            "the sky=blue, grass=green, snow=white, blood=red, coal=black, a banana=yellow, a tomato=red,"
            "milk=white, the sun=yellow, chocolate=brown, a carrot=orange, the night=black"
        ),
        (
            "What colour is {s}?",
            "What color is {s}?",
            "Which colour is {s}?",
            "What is the colour of {s}?",
            "Tell me the colour of {s}.",
            "Do you know what colour {s} is?",
            "What is the color of {s}?",
            "Can you tell me what colour {s} is?",
        ),
        "The colour of {s} is {o}.",
        ("And {s}?", "What about {s}?", "And of {s}?"),
    ),
    Relation(
        "young",
        _pairs(
            "dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, lion=cub, duck=duckling, goat=kid,"
            "deer=fawn, hen=chick, pig=piglet, frog=tadpole"
        ),
        (
            "What is a young {s} called?",
            "What do you call a young {s}?",
            "What is a baby {s} called?",
            "What do you call a baby {s}?",
            "What is the name of a young {s}?",
            "How do you call a baby {s}?",
            "Tell me the word for a young {s}.",
            "What is the word for a baby {s}?",
        ),
        "A young {s} is called a {o}.",
        ("And a {s}?", "What about a {s}?", "And a young {s}?"),
    ),
    Relation(
        "legs",
        _pairs("dog=4, cat=4, horse=4, spider=8, ant=6, bee=6, hen=2, duck=2, crab=10, snake=0"),
        (
            "How many legs does a {s} have?",
            "How many legs has a {s}?",
            "Tell me how many legs a {s} has.",
            "What number of legs does a {s} have?",
            "Do you know how many legs a {s} has?",
            "Count the legs of a {s}.",
            "How many legs are there on a {s}?",
        ),
        "A {s} has {o} legs.",
        ("And a {s}?", "What about a {s}?", "How about a {s}?"),
    ),
    Relation(
        "opposite",
        _pairs(
            "hot=cold, big=small, fast=slow, day=night, up=down, left=right, old=young, light=dark, open=closed,"
            "happy=sad, wet=dry, rich=poor, full=empty, good=bad, high=low, long=short, early=late, hard=soft,"
            "loud=quiet, near=far"
        ),
        (
            "What is the opposite of {s}?",
            "What's the opposite of {s}?",
            "Tell me the opposite of {s}.",
            "Give me the opposite of {s}.",
            "Which word is the opposite of {s}?",
            "Name the opposite of {s}.",
            "What word means the opposite of {s}?",
            "The opposite of {s} is?",
            "Opposite of {s}?",
        ),
        "The opposite of {s} is {o}.",
        ("And of {s}?", "And {s}?", "What about {s}?"),
    ),
    Relation(
        "next day",
        _pairs(
            "Monday=Tuesday, Tuesday=Wednesday, Wednesday=Thursday, Thursday=Friday, Friday=Saturday,"
            "Saturday=Sunday, Sunday=Monday"
        ),
        (
            "What day comes after {s}?",
            "Which day is after {s}?",
            "What is the day after {s}?",
            "Which day follows {s}?",
            "Tell me the day after {s}.",
            "After {s} comes which day?",
            "Today is {s}. What day is tomorrow?",
            "What day follows {s}?",
        ),
        "The day after {s} is {o}.",
        ("And after {s}?", "And {s}?", "What about {s}?"),
    ),
    Relation(
        "amount",
        {
            "days are in a week": "There are 7 days in a week.",
            "months are in a year": "There are 12 months in a year.",
            "hours are in a day": "There are 24 hours in a day.",
            "minutes are in an hour": "There are 60 minutes in an hour.",
            "seconds are in a minute": "There are 60 seconds in a minute.",
            "days are in a year": "There are 365 days in a year.",
            "continents are there": "There are 7 continents.",
            "planets are there": "There are 8 planets.",
            "sides does a triangle have": "A triangle has 3 sides.",
            "sides does a square have": "A square has 4 sides.",
            "letters are in the alphabet": "There are 26 letters in the alphabet.",
            "fingers are on a hand": "There are 5 fingers on a hand.",
            "strings does a violin have": "A violin has 4 strings.",
            "wheels does a bicycle have": "A bicycle has 2 wheels.",
        },
        (
            "How many {s}?",
            "Do you know how many {s}?",
            "Can you tell me how many {s}?",
            "How many {s}, please?",
            "I forgot how many {s}.",
            "Exactly how many {s}?",
            "Tell me how many {s}.",
        ),
        "{o}",
        ("And how many {s}?",),
    ),
    Relation(
        "world",
        {
            "is the largest planet": "The largest planet is Jupiter.",
            "is the smallest planet": "The smallest planet is Mercury.",
            "is the red planet": "The red planet is Mars.",
            "is the largest ocean": "The largest ocean is the Pacific.",
            "is the tallest animal": "The tallest animal is the giraffe.",
            "is the largest animal": "The largest animal is the blue whale.",
            "is the fastest land animal": "The fastest land animal is the cheetah.",
            "is the highest mountain": "The highest mountain is Mount Everest.",
            "is the longest river in Africa": "The longest river in Africa is the Nile.",
            "is the first month of the year": "The first month of the year is January.",
            "is the last month of the year": "The last month of the year is December.",
            "is the star closest to the Earth": "The star closest to the Earth is the Sun.",
            "do bees make": "Bees make honey.",
            "do cows give us": "Cows give us milk.",
            "is frozen water": "Frozen water is ice.",
        },
        (
            "What {s}?",
            "Do you know what {s}?",
            "Can you tell me what {s}?",
            "Tell me what {s}.",
            "I would like to know what {s}.",
            "What {s}, please?",
            "Please tell me what {s}.",
            "I forgot what {s}.",
        ),
        "{o}",
        ("And what {s}?",),
    ),
    Relation(
        "person",
        {
            "wrote Hamlet": "William Shakespeare wrote Hamlet.",
            "wrote Don Quixote": "Miguel de Cervantes wrote Don Quixote.",
            "painted the Mona Lisa": "Leonardo da Vinci painted the Mona Lisa.",
            "wrote War and Peace": "Leo Tolstoy wrote War and Peace.",
            "wrote Oliver Twist": "Charles Dickens wrote Oliver Twist.",
            "was the first person on the Moon": "Neil Armstrong was the first person on the Moon.",
            "discovered radium": "Marie Curie discovered radium.",
            "painted Sunflowers": "Vincent van Gogh painted Sunflowers.",
            "invented the telephone": "Alexander Graham Bell invented the telephone.",
        },
        (
            "Who {s}?",
            "Do you know who {s}?",
            "Can you tell me who {s}?",
            "Tell me who {s}.",
            "I forgot who {s}.",
            "Who was it that {s}?",
            "Please tell me who {s}.",
        ),
        "{o}",
        ("And who {s}?",),
    ),
)

FACT_COUNT: Final = sum(len(relation.pairs) for relation in RELATIONS)
_WEIGHTS: Final = [len(relation.pairs) * len(relation.questions) for relation in RELATIONS]


def statement(relation: Relation, subject: str) -> str:
    """The sentence that answers a question about ``subject``."""
    text = relation.statement.format(s=subject, o=relation.pairs[subject])
    return text[:1].upper() + text[1:]


def fact_episode(rng: Random) -> Episode:
    """Ask for one fact; held out by the pair of subject and phrasing."""
    relation = rng.choices(RELATIONS, _WEIGHTS)[0]
    subject = rng.choice(list(relation.pairs))
    phrasing = rng.randrange(len(relation.questions))
    question = casual(rng, relation.questions[phrasing].format(s=subject))
    key = _fact_key(relation, subject, phrasing)
    return Episode("facts", key, dialogue(question, statement(relation, subject)))


def _fact_key(relation: Relation, subject: str, phrasing: int) -> str:
    # The first phrasing of a fact is its plain question, which is always taught.
    return "taught" if phrasing == 0 else f"fact {relation.name} {subject} {phrasing}"


def follow_up_episode(rng: Random) -> Episode:
    """Ask for a fact, then for another of the same kind in a few words."""
    relation = rng.choices(RELATIONS[:8], _WEIGHTS[:8])[0]
    subjects = rng.sample(list(relation.pairs), rng.choice((2, 2, 2, 3)))
    taught = [
        question
        for phrasing, question in enumerate(relation.questions)
        if not is_held_out(_fact_key(relation, subjects[0], phrasing))
    ]
    turns = [casual(rng, rng.choice(taught).format(s=subjects[0])), statement(relation, subjects[0])]
    for subject in subjects[1:]:
        turns += [_follow_up(rng, relation, subject), statement(relation, subject)]
    return Episode("follow-up", f"follow-up {relation.name} {subjects}", dialogue(*turns))


def _follow_up(rng: Random, relation: Relation, subject: str) -> str:
    """A short follow-up question about another subject."""
    text = rng.choice(relation.follow_ups).format(s=subject)
    return text.lower() if rng.random() < 0.08 else text
