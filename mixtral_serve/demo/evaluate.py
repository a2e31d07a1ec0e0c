"""Exact-match rates of a model on held-out prompts, skill by skill.

Owns the scoring, for anything that can answer prompts, and a reference
answerer: batched greedy decoding with plain Transformers.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoTokenizer, MixtralForCausalLM, PreTrainedTokenizerBase

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.checkpoint_files import load_model
from mixtral_serve.demo.conversation import Message
from mixtral_serve.demo.skills import SKILLS, held_out_episodes

Answer = Callable[[list[list[Message]]], list[str]]

logger = logging.getLogger(__name__)


def exact_match(
    answer: Answer, count: int = 100, seed: int = 0, skills: Iterable[str] = tuple(SKILLS)
) -> dict[str, float]:
    """Return per skill the share of ``count`` held-out prompts answered as expected."""
    rates = {}
    for skill in skills:
        episodes = held_out_episodes(skill, count, seed)
        answers = answer([episode.prompt for episode in episodes])
        right = 0
        for episode, given in zip(episodes, answers, strict=True):
            accepted = SKILLS[skill].accepts(episode, given)
            right += accepted
            if not accepted:
                logger.debug("%s: %r -> %r, expected %r", skill, episode.prompt, given, episode.answer)
        rates[skill] = right / count
    return rates


def greedy_answerer(
    model: MixtralForCausalLM, directory: Path, batch_size: int = 50, max_new_tokens: int = 160
) -> Answer:
    """Answer prompts by greedy decoding with the tokenizer and chat template in ``directory``."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, padding_side="left", pad_token="</s>")

    def answer(prompts: list[list[Message]]) -> list[str]:
        chats = [[dict[str, str](role=m["role"], content=m["content"]) for m in prompt] for prompt in prompts]
        texts = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
        answers: list[str] = []
        for start in range(0, len(texts), batch_size):
            answers += _decode_batch(model, tokenizer, texts[start : start + batch_size], max_new_tokens)
        return answers

    return answer


@torch.inference_mode()
def _decode_batch(
    model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_new_tokens: int
) -> list[str]:
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=False)
    # The stubs of generate() ask for a protocol that no model class satisfies.
    output: torch.Tensor = cast(Any, model).generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=2,
        pad_token_id=2,
    )
    new = output[:, inputs["input_ids"].shape[1] :]
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in new]


def table(rates: dict[str, float]) -> str:
    """Format rates as a Markdown table."""
    lines = ["| Skill | Exact match |", "| --- | --- |"]
    return "\n".join(lines + [f"| {skill} | {rate:.1%} |" for skill, rate in rates.items()])


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate a checkpoint and print the table."""
    parser = argparse.ArgumentParser(description="Exact match of a checkpoint on held-out prompts.")
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--count", type=int, default=100, help="prompts per skill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skill", action="append", choices=sorted(SKILLS), help="may be repeated; default: all")
    parser.add_argument("--verbose", action="store_true", help="log the prompts answered otherwise")
    options = parser.parse_args(argv)
    if options.verbose:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.DEBUG)
    answer = greedy_answerer(load_model(options.checkpoint), options.checkpoint)
    sys.stdout.write(table(exact_match(answer, options.count, options.seed, options.skill or tuple(SKILLS))) + "\n")


if __name__ == "__main__":
    main()
