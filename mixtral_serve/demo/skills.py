"""The curriculum: every skill, its share of the corpus and how its answers are scored.

Owns the two streams the rest of the package draws from: training chats, which
string one or more episodes together under an optional system message, and
held-out episodes, whose keys never occur in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final

from mixtral_serve.demo.conversation import DEFAULT_SYSTEM, Episode, Message, is_held_out, system_message
from mixtral_serve.demo.extraction import extraction_episode
from mixtral_serve.demo.facts import fact_episode, follow_up_episode
from mixtral_serve.demo.lists import counting_episode, ordering_episode, reversing_episode, sum_episode
from mixtral_serve.demo.small_talk import greeting_episode, memory_episode
from mixtral_serve.demo.stories import HEROES, accepts_story, story, story_episode
from mixtral_serve.demo.tools import tool_episode


def _accepts_exactly(episode: Episode, answer: str) -> bool:
    return answer.strip() == episode.answer


@dataclass(frozen=True, slots=True)
class Skill:
    """A skill: its generator, its share of the training episodes and its scoring rule."""

    name: str
    share: float
    episode: Callable[[Random], Episode]
    accepts: Callable[[Episode, str], bool] = _accepts_exactly


SKILLS: Final[dict[str, Skill]] = {
    skill.name: skill
    for skill in (
        Skill("greetings", 0.04, greeting_episode),
        Skill("facts", 0.07, fact_episode),
        Skill("follow-up", 0.03, follow_up_episode),
        Skill("memory", 0.06, memory_episode),
        Skill("counting", 0.16, counting_episode),
        Skill("sums", 0.13, sum_episode),
        Skill("ordering", 0.20, ordering_episode),
        Skill("reversing", 0.03, reversing_episode),
        Skill("story", 0.05, story_episode, accepts_story),
        Skill("json", 0.15, extraction_episode),
        Skill("tools", 0.08, tool_episode),
    )
}
_LONG_CHAT_SHARE: Final = 0.006


def _drawn(rng: Random, skill: Skill, held_out: bool) -> Episode:
    while is_held_out((episode := skill.episode(rng)).key) != held_out:
        pass
    return episode


def _with_system(rng: Random, messages: list[Message], held_out: bool = False) -> list[Message]:
    """Put a system message in front, or merge one into the message that is there."""
    draw = rng.random()
    if draw < 0.45:
        return messages
    text = DEFAULT_SYSTEM if draw < 0.6 else system_message(rng, held_out)
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _background(rng: Random) -> str:
    """A long text for a system message, of some hundred tokens."""
    return " ".join(story(rng, rng.choice(HEROES)) for _ in range(rng.randint(3, 10)))


def training_chat(rng: Random) -> list[Message]:
    """Draw a training chat: mostly a single episode, now and then several, rarely very many."""
    draw = rng.random()
    is_long = draw < _LONG_CHAT_SHARE
    count = rng.randint(8, 30) if is_long else (1 if draw < 0.75 else rng.randint(2, 3))
    skills = rng.choices(list(SKILLS.values()), [skill.share for skill in SKILLS.values()], k=count)
    episodes = [_drawn(rng, skill, held_out=False) for skill in skills]
    # An episode with its own system message has to come first, and no chat has two.
    leading = [episode for episode in episodes if episode.messages[0]["role"] == "system"][:1]
    others = [episode for episode in episodes if episode.messages[0]["role"] != "system"]
    messages = [message for episode in leading + others for message in episode.messages]
    messages = _with_system(rng, messages)
    if is_long and rng.random() < 0.4:
        messages = [message for episode in others[:2] or leading for message in episode.messages]
        messages = _with_background(messages, _background(rng))
    return messages


def _with_background(messages: list[Message], background: str) -> list[Message]:
    if messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{background}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": background}, *messages]


def held_out_episodes(skill: str, count: int, seed: int = 0) -> list[Episode]:
    """Draw distinct held-out episodes of one skill, some under system messages never trained on."""
    rng = Random(f"{skill} {seed}")
    episodes: dict[str, Episode] = {}
    while len(episodes) < count:
        drawn = _drawn(rng, SKILLS[skill], held_out=True)
        messages = tuple(_with_system(rng, list(drawn.messages), held_out=True))
        episodes.setdefault(str(messages[:-1]), Episode(drawn.skill, drawn.key, messages))
    return list(episodes.values())
