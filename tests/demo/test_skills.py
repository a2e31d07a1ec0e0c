"""Laws of the skill generators: deterministic, held-out apart, and answers that are right."""

import json
from random import Random

import pytest

from mixtral_serve.demo.conversation import Message, is_held_out
from mixtral_serve.demo.facts import FACT_COUNT, RELATIONS, fact_episode
from mixtral_serve.demo.lists import sum_episode
from mixtral_serve.demo.skills import SKILLS, held_out_episodes, training_chat
from mixtral_serve.demo.stories import HEROES, is_story, story

skill_names = pytest.mark.parametrize("skill", sorted(SKILLS))


def chats(seed: int, count: int) -> list[list[Message]]:
    rng = Random(seed)
    return [training_chat(rng) for _ in range(count)]


def test_training_chats_depend_on_the_seed_alone() -> None:
    assert chats(7, 200) == chats(7, 200)
    assert chats(7, 200) != chats(8, 200)


def test_chats_alternate_after_an_optional_system_message() -> None:
    for chat in chats(0, 500):
        roles = [message["role"] for message in chat if message["role"] != "system"]
        assert all(message["role"] != "system" for message in chat[1:])
        assert roles == ["user", "assistant"] * (len(roles) // 2)


@skill_names
def test_held_out_episodes_are_distinct_and_repeatable(skill: str) -> None:
    episodes = held_out_episodes(skill, 60)
    assert episodes == held_out_episodes(skill, 60)
    assert len({str(episode.prompt) for episode in episodes}) == 60
    assert all(is_held_out(episode.key) for episode in episodes)


def test_no_held_out_prompt_occurs_in_training() -> None:
    def last_turn(messages: list[Message]) -> str:
        return messages[-1]["content"]

    trained: set[str] = set()
    for chat in chats(1, 20_000):
        if [message["role"] for message in chat].count("user") == 1:
            trained.add(last_turn(chat[:-1]))
    single_turn = set(SKILLS) - {"memory", "follow-up", "tools"}
    for skill in single_turn:
        # Told and asked across turns or described functions, the last turn alone is no prompt.
        for episode in held_out_episodes(skill, 200):
            assert last_turn(episode.prompt) not in trained


@skill_names
def test_the_expected_answer_is_accepted_and_another_is_not(skill: str) -> None:
    for episode in held_out_episodes(skill, 30):
        assert SKILLS[skill].accepts(episode, episode.answer)
        assert not SKILLS[skill].accepts(episode, episode.answer + " and so on")


def test_every_fact_is_taught_in_most_phrasings() -> None:
    rng = Random(0)
    taught = set()
    for _ in range(20_000):
        episode = fact_episode(rng)
        if not is_held_out(episode.key):
            taught.add(episode.answer)
    assert len(taught) == FACT_COUNT - _shared_answers()


def _shared_answers() -> int:
    """Facts that two relations state in the same words."""
    statements = [r.statement.format(s=s, o=o) for r in RELATIONS for s, o in r.pairs.items()]
    return len(statements) - len(set(statements))


def test_sums_are_right() -> None:
    rng = Random(0)
    for _ in range(200):
        left, total = sum_episode(rng).answer.split(" = ")
        assert sum(int(part) for part in left.split(" + ")) == int(total)


def test_json_answers_parse_and_keep_the_order_of_fields() -> None:
    for episode in held_out_episodes("json", 50):
        fields = json.loads(episode.answer)
        request = episode.prompt[-1]["content"]
        assert all(str(value) in request for value in fields.values())


def test_tool_answers_call_described_functions() -> None:
    for episode in held_out_episodes("tools", 80):
        if episode.answer.startswith("["):
            for call in json.loads(episode.answer):
                assert f'"name": "{call["name"]}"' in episode.prompt[0]["content"]


@pytest.mark.parametrize("seed", range(20))
def test_the_story_grammar_accepts_its_own_stories_only(seed: int) -> None:
    rng = Random(seed)
    hero = rng.choice(HEROES)
    text = story(rng, hero)
    assert is_story(text, hero)
    assert not is_story(text, "giraffe")
    assert not is_story(" ".join(text.split()[:-3]), hero)
