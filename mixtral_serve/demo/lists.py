"""Skills on lists and numbers: counting, sums, ordering and reversing.

Owns their request phrasings and answers; held out by the operands or by the
set of listed items, never by phrasing alone.
"""

from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, casual, dialogue, joined, punctuated
from mixtral_serve.demo.words import NOUNS

LARGEST_ADDEND: Final = 50
_LARGEST_START: Final = 20
_LONGEST_COUNT: Final = 10

_COUNTS: Final = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Count up from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "List the numbers from {a} to {b}.",
    "Write the numbers from {a} to {b}.",
    "Start at {a} and count to {b}.",
    "Give me the numbers from {a} to {b}.",
    "What are the numbers from {a} to {b}?",
)
_SUMS: Final = (
    "What is {a} plus {b}?",
    "What is {a} + {b}?",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Compute {a} + {b}.",
    "Calculate {a} plus {b}.",
    "{a} + {b} = ?",
    "What do you get if you add {a} and {b}?",
    "Can you add {a} and {b}?",
    "Sum {a} and {b}.",
    "What is {a}+{b}?",
    "{a}+{b}=?",
)
_WORD_ORDERS: Final = (
    "Sort these words alphabetically: {items}",
    "Sort alphabetically: {items}",
    "Put these words in alphabetical order: {items}",
    "Order these words from A to Z: {items}",
    "Please sort these words: {items}",
    "Alphabetical order, please: {items}",
    "Can you sort these words alphabetically? {items}",
    "Arrange the words in alphabetical order: {items}",
)
_NUMBER_ORDERS: Final = (
    "Sort these numbers: {items}",
    "Sort the numbers from small to large: {items}",
    "Put these numbers in ascending order: {items}",
    "Order these numbers from smallest to largest: {items}",
    "Please sort these numbers: {items}",
    "Ascending order, please: {items}",
    "Can you sort these numbers? {items}",
    "Arrange the numbers in ascending order: {items}",
)
_REVERSALS: Final = (
    "Reverse this list: {items}",
    "Reverse these words: {items}",
    "Write these words in reverse order: {items}",
    "Say these words backwards: {items}",
    "Please reverse the list: {items}",
    "Can you reverse this list? {items}",
    "Put these words in reverse order: {items}",
    "List these from last to first: {items}",
)


def counting_episode(rng: Random) -> Episode:
    """Count from one number to another."""
    start = rng.randint(0, _LARGEST_START)
    end = start + rng.randint(1, _LONGEST_COUNT - 1)
    request = casual(rng, rng.choice(_COUNTS).format(a=start, b=end))
    answer = ", ".join(str(number) for number in range(start, end + 1))
    # What people try first is always taught.
    key = "taught" if start == 1 and end in (5, 10) else f"count {start} {end}"
    return Episode("counting", key, dialogue(request, answer))


def sum_episode(rng: Random) -> Episode:
    """Add two numbers; both orders of a pair of operands fall on the same side of the split."""
    largest = 9 if rng.random() < 0.12 else LARGEST_ADDEND
    a, b = rng.randint(0, largest), rng.randint(0, largest)
    request = casual(rng, rng.choice(_SUMS).format(a=a, b=b))
    answer = f"{a} + {b} = {a + b}"
    key = "taught" if a == b and a < 3 else f"sum {min(a, b)} {max(a, b)}"
    return Episode("sums", key, dialogue(request, answer))


def _listed(rng: Random, items: list[str]) -> str:
    return joined(items) if rng.random() < 0.15 else ", ".join(items)


def ordering_episode(rng: Random) -> Episode:
    """Sort three words alphabetically or three numbers of as many digits from small to large."""
    if rng.random() < 0.5:
        words = rng.sample(NOUNS, 3)
        ordered, phrasings = sorted(words), _WORD_ORDERS
    else:
        numbers = rng.sample(rng.choice((range(1, 10), range(10, 60))), 3)
        words, phrasings = [str(number) for number in numbers], _NUMBER_ORDERS
        ordered = [str(number) for number in sorted(numbers)]
    request = punctuated(rng, rng.choice(phrasings).format(items=_listed(rng, words)))
    return Episode("ordering", f"order {ordered}", dialogue(request, ", ".join(ordered)))


def reversing_episode(rng: Random) -> Episode:
    """Reverse a list of words."""
    words = rng.sample(NOUNS, rng.randint(3, 5))
    request = punctuated(rng, rng.choice(_REVERSALS).format(items=_listed(rng, words)))
    return Episode("reversing", f"reverse {words}", dialogue(request, ", ".join(reversed(words))))
