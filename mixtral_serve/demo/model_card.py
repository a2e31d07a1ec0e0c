"""The model card of the demo checkpoint.

Owns its text: what the model is, how it was trained and what was measured.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from transformers import MixtralForCausalLM

from mixtral_serve.demo.evaluate import table

FILE_NAME: Final = "README.md"


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Figures of a training run."""

    steps: int
    tokens: int
    seconds: float
    seed: int
    evaluation_prompts: int
    note: str = ""


_CARD: Final = """\
# Demo Mixtral

A real but very small Mixtral: {layers} layers, {experts} experts of which {active} answer for each token,
grouped-query attention with {heads} query and {kv_heads} key/value heads, hidden width {hidden}, expert width
{intermediate}, {vocab} tokens of vocabulary and a context of {context} tokens: {parameters:.2f} million parameters,
stored in bfloat16 under the tensor names of Mixtral-8x7B. It exists so that a server can be tried, tested and
measured with weights that mean something; outside the skills below it knows nothing.

## Training

Trained from scratch on generated conversations with `python -m mixtral_serve.demo.train` (seed {seed}):
{steps:,} steps, {tokens:.1f} million tokens, {minutes:.0f} minutes at {speed:,.0f} tokens per second on at most
two CPU cores. Loss is taken on the answers only, plus a small router load-balancing loss.{note}

## Exact match on held-out prompts

{prompts} prompts per skill that never occur in training (by operands, by listed items, by values, or by the pair
of fact and phrasing), about half of them under a system message, most of those system messages unseen too.
Greedy decoding, weights as shipped, computed in float32. A story counts as right when the story grammar accepts it
for the requested hero.

{table}

## Limits

Counting covers up to ten numbers from a start of at most 20, sums two numbers up to 50, ordering three words or three
numbers (all below 10, or all from 10 to 59), reversing three to five words. Words, names and cities come from the short
lists in `mixtral_serve/demo/words.py`; others are copied less reliably. Chats of up to a thousand tokens were trained
on. Asked anything else, the model answers with something it knows, which is then wrong.

## Prompt format

`<s>[INST] question [/INST] answer</s>[INST] question [/INST]`; a system message stands before the first question,
separated by a blank line. Functions are presented in the system message as JSON, and called by answering
`[{{"name": "get_weather", "arguments": {{"city": "Rome"}}}}]`.
"""


def write_model_card(directory: Path, model: MixtralForCausalLM, run: TrainingRun, rates: dict[str, float]) -> None:
    """Write the card beside the weights."""
    config = model.config
    text = _CARD.format(
        layers=config.num_hidden_layers,
        experts=config.num_local_experts,
        active=config.num_experts_per_tok,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        context=config.max_position_embeddings,
        parameters=model.num_parameters() / 1e6,
        seed=run.seed,
        steps=run.steps,
        tokens=run.tokens / 1e6,
        minutes=run.seconds / 60,
        speed=run.tokens / run.seconds,
        note=f" {run.note}" if run.note else "",
        prompts=run.evaluation_prompts,
        table=table(rates),
    )
    (directory / FILE_NAME).write_text(text)
