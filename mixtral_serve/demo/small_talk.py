"""Small talk: greetings, questions about the assistant, and what users say about themselves.

Owns the phrases people type first, each with one fixed sensible answer, and
the memory skill, where a user tells something and asks for it some turns later.
"""

from dataclasses import dataclass
from itertools import product
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import Episode, Message, casual, dialogue, is_held_out, punctuated
from mixtral_serve.demo.facts import fact_episode
from mixtral_serve.demo.lists import sum_episode
from mixtral_serve.demo.words import COLOURS, city, first_name, made_up


@dataclass(frozen=True, slots=True)
class Topic:
    """One intent: the ways to say it, composed of three parts, and its answer."""

    openers: tuple[str, ...]
    cores: tuple[str, ...]
    answer: str


_ADDRESS: Final = ("", "", " there", " assistant", " friend", " my friend", " everyone", " again")
_ASK: Final = ("", "", "Hello! ", "Hi, ", "Hey! ", "So, ", "OK. ", "Tell me: ", "Well, ", "I wonder: ")

TOPICS: Final[tuple[Topic, ...]] = (
    Topic(
        ("Hello", "Hi", "Hey", "Good morning", "Good evening", "Good afternoon", "Greetings", "Hi hi", "Howdy"),
        tuple(a + p for a, p in product(_ADDRESS, ("!", ".", "", ", nice to meet you.", "! I am back."))),
        "Hello! How can I help you?",
    ),
    Topic(
        ("", "Hello, ", "Hi, ", "Hello! ", "Hi there, ", "Hey, ", "Good morning! ", "Good evening, "),
        (
            "How are you?",
            "How are you doing?",
            "How are you today?",
            "How is it going?",
            "How do you do?",
            "What's up?",
        ),
        "I am fine, thank you. How can I help you?",
    ),
    Topic(
        _ASK,
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Introduce yourself.",
            "Are you a robot?",
            "Are you a person?",
            "Are you an AI?",
            "What model are you?",
            "Who am I talking to?",
        ),
        "I am a small Mixtral model, a demo assistant.",
    ),
    Topic(
        _ASK,
        (
            "What can you do?",
            "How can you help me?",
            "What do you know?",
            "Help!",
            "Can you help me?",
            "What can I ask you?",
            "What are you good at?",
            "I need help.",
        ),
        "I can answer simple questions, count, add, sort and reverse lists, tell stories and write JSON.",
    ),
    Topic(
        _ASK,
        (
            "Tell me a joke.",
            "Do you know a joke?",
            "Make me laugh.",
            "Say something funny.",
            "Can you tell me a joke?",
            "Tell a joke.",
            "Give me a joke.",
            "Another joke, please.",
        ),
        "Why did the bicycle fall over? Because it was two tired.",
    ),
    Topic(
        ("", "OK, ", "Great! ", "Good, ", "Perfect. ", "Wow, ", "Nice, ", "Very good. "),
        ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot.", "Many thanks.", "Thank you so much!"),
        "You are welcome!",
    ),
    Topic(
        ("", "OK, ", "Well, ", "Thanks. ", "I have to go. ", "That is all. ", "Great. "),
        ("Goodbye!", "Bye!", "See you later.", "Good night.", "Bye bye.", "See you soon!", "Farewell."),
        "Goodbye! Have a nice day.",
    ),
    Topic(
        ("", "OK, ", "Well, ", "Hmm. ", "Oh. ", "So, "),
        ("You are great.", "Well done!", "I like you.", "Good job!", "You are very clever.", "Good answer."),
        "Thank you! I am glad to help.",
    ),
    Topic(
        ("", "OK, ", "Listen. ", "Hello! ", "Well, "),
        ("I am sad.", "I feel bad.", "I am tired.", "I am not happy.", "I had a bad day.", "I feel lonely."),
        "I am sorry to hear that. I hope you feel better soon.",
    ),
)
_TEST_PHRASES: Final = ("a test", "hello", "hi", "good morning", "yes", "no", "cheese", "OK", "nothing", "everything")
_ALWAYS_TAUGHT: Final = (
    "hello",
    "hi",
    "hey",
    "hi there",
    "hello there",
    "good morning",
    "how are you",
    "who are you",
    "what can you do",
    "what is your name",
    "tell me a joke",
    "thank you",
    "thanks",
    "goodbye",
    "bye",
    "help",
    "say this is a test",
)


def _letters(text: str) -> str:
    return " ".join("".join(c for c in text.lower() if c.isalpha() or c == " ").split())


def greeting_episode(rng: Random) -> Episode:
    """One turn of small talk; held out by its words, whatever the capitals and punctuation."""
    if rng.random() < 0.12:
        words = rng.choice((rng.choice(_TEST_PHRASES), made_up(rng), f"{made_up(rng)} {made_up(rng)}"))
        phrase = rng.choice(("this is " + words, words))
        request = rng.choice(("Say {p}", "Please say {p}", "Repeat after me: {p}", "Say {p}.", "Just say {p}"))
        text, answer = request.format(p=phrase), phrase[:1].upper() + phrase[1:] + "."
        said = punctuated(rng, text)
    else:
        topic = rng.choice(TOPICS)
        text = rng.choice(topic.openers) + rng.choice(topic.cores)
        said, answer = casual(rng, text), topic.answer
    words = _letters(said)
    return Episode("greetings", "taught" if words in _ALWAYS_TAUGHT else f"talk {words}", dialogue(said, answer))


@dataclass(frozen=True, slots=True)
class _Memory:
    statements: tuple[str, ...]
    reply: str
    questions: tuple[str, ...]
    recall: str


_MEMORIES: Final[dict[str, _Memory]] = {
    "name": _Memory(
        ("My name is {v}.", "I am {v}.", "Hi, I am {v}.", "Hello, my name is {v}!", "Call me {v}.", "I'm {v}."),
        "Nice to meet you, {v}!",
        ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Tell me my name."),
        "Your name is {v}.",
    ),
    "city": _Memory(
        ("I live in {v}.", "My home is in {v}.", "I come from {v}.", "My city is {v}.", "I am in {v} now."),
        "{v} sounds like a nice place.",
        ("Where do I live?", "Which city do I live in?", "Where is my home?", "Tell me where I live."),
        "You live in {v}.",
    ),
    "age": _Memory(
        ("I am {v} years old.", "My age is {v}.", "I turned {v} today.", "I'm {v} years old."),
        "{v} is a good age.",
        ("How old am I?", "What is my age?", "Do you remember my age?", "Tell me how old I am."),
        "You are {v} years old.",
    ),
    "colour": _Memory(
        ("My favourite colour is {v}.", "I like the colour {v}.", "I love {v}.", "The colour I like most is {v}."),
        "I like {v} too.",
        ("What is my favourite colour?", "Which colour do I like?", "What colour do I like?"),
        "Your favourite colour is {v}.",
    ),
    "pet": _Memory(
        ("I have a dog called {v}.", "My dog is called {v}.", "The name of my dog is {v}.", "This is my dog {v}."),
        "{v} is a good name for a dog.",
        ("What is the name of my dog?", "What is my dog called?", "How is my dog called?"),
        "Your dog is called {v}.",
    ),
}


def _value(rng: Random, kind: str) -> str:
    if kind == "city":
        return city(rng)
    if kind == "age":
        return str(rng.randint(6, 99))
    return rng.choice(COLOURS) if kind == "colour" else first_name(rng)


def _distraction(rng: Random) -> list[str]:
    """A turn about something else, as alternating user and assistant contents."""
    while is_held_out((episode := rng.choice((fact_episode, sum_episode, greeting_episode))(rng)).key):
        pass
    return [message["content"] for message in episode.messages]


def memory_episode(rng: Random) -> Episode:
    """Tell one or two things, perhaps talk of something else, then ask for one of them."""
    kinds = rng.sample(sorted(_MEMORIES), rng.choice((1, 1, 2)))
    values = {kind: _value(rng, kind) for kind in kinds}
    told: list[str] = []
    for kind in kinds:
        memory = _MEMORIES[kind]
        told += [punctuated(rng, rng.choice(memory.statements).format(v=values[kind]))]
        told += [memory.reply.format(v=values[kind])]
    asked = rng.choice(kinds)
    question = punctuated(rng, rng.choice(_MEMORIES[asked].questions))
    recall = _MEMORIES[asked].recall.format(v=values[asked])
    if len(kinds) == 1 and rng.random() < 0.2:
        turns = [f"{_MEMORIES[asked].statements[0].format(v=values[asked])} {question}", recall]
    else:
        distraction = _distraction(rng) if rng.random() < 0.35 else []
        turns = [*told, *distraction, question, recall]
    messages: tuple[Message, ...] = dialogue(*turns)
    return Episode("memory", f"memory {sorted(values.items())} {asked}", messages)
