"""Making the demo checkpoint: ``python -m mixtral_serve.demo.train --out DIRECTORY``.

Owns the training run: corpus, tokenizer, optimiser and schedule, the saved
checkpoint, its evaluation and its model card.
"""

import argparse
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import cos, pi
from pathlib import Path
from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mixtral_serve.demo.checkpoint_files import CONTEXT_LENGTH, demo_config, load_model, save_model
from mixtral_serve.demo.dataset import IGNORED, Batch, batches
from mixtral_serve.demo.evaluate import exact_match, greedy_answerer
from mixtral_serve.demo.model_card import TrainingRun, write_model_card
from mixtral_serve.demo.skills import training_chat
from mixtral_serve.demo.tokenizer import save_tokenizer, train_tokenizer

logger = logging.getLogger(__name__)

_TOKENIZER_CHATS: Final = 15_000
_WARM_UP_STEPS: Final = 200
_LOG_EVERY: Final = 100


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line can set."""

    out: Path
    minutes: float
    seed: int
    vocab_size: int
    rows: int
    row_length: int
    learning_rate: float
    weight_decay: float
    save_minutes: float
    evaluation_prompts: int
    resume: bool
    workers: int
    card_note: str


def corpus_texts(seed: int, chats: int = _TOKENIZER_CHATS) -> Iterator[str]:
    """Texts to train the tokenizer on."""
    rng = Random(seed)
    for _ in range(chats):
        for message in training_chat(rng):
            content = message["content"]
            yield f"[INST] {content} [/INST]" if message["role"] == "user" else content


def loss_of(model: MixtralForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy on the answers, and the router's load-balancing loss."""
    output = model.model(
        input_ids=batch.tokens,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        output_router_logits=True,
        use_cache=False,
    )
    wanted = batch.targets != IGNORED
    logits = model.lm_head(output.last_hidden_state[wanted])
    balance = load_balancing_loss_func(
        output.router_logits, model.config.num_local_experts, model.config.num_experts_per_tok
    )
    assert isinstance(balance, torch.Tensor)
    return cross_entropy(logits, batch.targets[wanted]), balance


def _gradients(model: MixtralForCausalLM, batch: Batch) -> tuple[float, float, Sequence[torch.Tensor]]:
    """Both losses of a batch and the gradients of their sum."""
    loss, balance = loss_of(model, batch)
    total = loss + model.config.router_aux_loss_coef * balance
    return loss.item(), balance.item(), torch.autograd.grad(total, list(model.parameters()))


def _optimizer(model: MixtralForCausalLM, settings: Settings) -> torch.optim.Optimizer:
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim == 1 or "embed_tokens" in n]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.97), fused=True)


def _rate(peak: float, step: int, progress: float) -> float:
    """Linear warm-up by steps, cosine decay to 2 % by elapsed time."""
    return peak * min(1.0, (step + 1) / _WARM_UP_STEPS) * (0.02 + 0.98 * 0.5 * (1 + cos(pi * min(1.0, progress))))


def train(model: MixtralForCausalLM, tokenizer: Tokenizer, settings: Settings) -> tuple[int, int, float]:
    """Train until the time is up, saving along the way; return steps, tokens and seconds."""
    model.set_experts_implementation("eager")
    workers = ThreadPoolExecutor(settings.workers, initializer=torch.set_flush_denormal, initargs=(True,))
    optimizer = _optimizer(model, settings)
    stream = batches(tokenizer, Random(settings.seed + 1), settings.rows, settings.row_length)
    start = saved = time.monotonic()
    budget, step, tokens = settings.minutes * 60, 0, 0
    recent: list[float] = []
    model.train()
    while (elapsed := time.monotonic() - start) < budget:
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings.learning_rate, step, elapsed / budget)
        parts = [next(stream) for _ in range(settings.workers)]
        results = list(workers.map(partial(_gradients, model), parts))
        for parameter, *gradients in zip(model.parameters(), *(gradients for _, _, gradients in results), strict=True):
            parameter.grad = torch.stack(gradients).mean(0)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        tokens += sum(part.tokens.numel() for part in parts)
        recent += [loss for loss, _, _ in results]
        if step % _LOG_EVERY == 0:
            mean = sum(recent) / len(recent)
            rate = tokens / (time.monotonic() - start)
            message = "step %d, %.1f min: loss %.4f, balance %.3f, %.0f tokens/s"
            logger.info(message, step, elapsed / 60, mean, results[0][1], rate)
            recent.clear()
        if time.monotonic() - saved > settings.save_minutes * 60:
            save_model(model, settings.out)
            saved = time.monotonic()
    return step, tokens, time.monotonic() - start


def _options(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab-size", type=int, default=1536)
    parser.add_argument("--rows", type=int, default=4, help="rows per worker and step")
    parser.add_argument("--row-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--save-minutes", type=float, default=4.0, help="time between intermediate checkpoints")
    parser.add_argument("--evaluation-prompts", type=int, default=200, help="held-out prompts per skill")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
    parser.add_argument("--workers", type=int, default=2, help="threads, each computing a batch of its own")
    parser.add_argument("--card-note", default="", help="a sentence for the model card, on earlier runs for instance")
    return Settings(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and describe a checkpoint."""
    settings = _options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.manual_seed(settings.seed)
    if settings.resume:
        tokenizer = Tokenizer.from_file(str(settings.out / "tokenizer.json"))
        model = load_model(settings.out)
    else:
        tokenizer = train_tokenizer(corpus_texts(settings.seed), settings.vocab_size)
        model = MixtralForCausalLM(demo_config(settings.vocab_size))
    save_tokenizer(tokenizer, settings.out, CONTEXT_LENGTH)
    steps, tokens, seconds = train(model, tokenizer, settings)
    save_model(model, settings.out)
    shipped = load_model(settings.out)
    rates = exact_match(greedy_answerer(shipped, settings.out), settings.evaluation_prompts)
    run = TrainingRun(steps, tokens, seconds, settings.seed, settings.evaluation_prompts, settings.card_note)
    write_model_card(settings.out, shipped, run, rates)
    for skill, rate in rates.items():
        logger.info("%s: %.1f %%", skill, 100 * rate)


if __name__ == "__main__":
    main()
