"""Laws of the training batches: what is a target, and that packed chats do not see each other."""

from itertools import islice
from random import Random

import pytest
import torch
from tokenizers import Tokenizer
from transformers import MixtralForCausalLM

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.checkpoint_files import demo_config
from mixtral_serve.demo.conversation import dialogue
from mixtral_serve.demo.dataset import BOS, EOS, IGNORED, batches, encode_chat, pack
from mixtral_serve.demo.train import loss_of


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(checkpoint_path() / "tokenizer.json"))


def untrained_model(tokenizer: Tokenizer) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(demo_config(tokenizer.get_vocab_size()))


def test_answers_with_their_end_are_the_targets(tokenizer: Tokenizer) -> None:
    chat = encode_chat(tokenizer, dialogue("hi", "hello", "more", "no", system="Be kind."))
    batch = pack([[chat]], len(chat))
    targets = batch.targets[0]
    assert chat.tokens[0] == BOS
    assert tokenizer.decode(targets[targets != IGNORED].tolist(), skip_special_tokens=False) == "hello</s> no</s>"
    assert (targets == EOS).sum() == 2


def test_batches_depend_on_the_seed_alone(tokenizer: Tokenizer) -> None:
    first, second = (list(islice(batches(tokenizer, Random(3), 4, 128), 6)) for _ in range(2))
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left.tokens, right.tokens)
        assert torch.equal(left.positions, right.positions)


def test_rows_are_well_filled_and_long_chats_are_not_lost(tokenizer: Tokenizer) -> None:
    drawn = list(islice(batches(tokenizer, Random(0), 8, 256), 60))
    short = [batch for batch in drawn if batch.tokens.shape[1] == 256]
    padding = sum(int((batch.tokens == EOS).sum()) for batch in short)
    assert padding < 0.15 * sum(batch.tokens.numel() for batch in short)
    assert any(batch.tokens.shape[1] > 256 for batch in drawn)


@torch.inference_mode()
def test_packed_chats_are_computed_as_if_alone(tokenizer: Tokenizer) -> None:
    model = untrained_model(tokenizer)
    chats = [encode_chat(tokenizer, dialogue("What is the capital of Italy?", "Rome.")) for _ in range(2)]
    chats.insert(1, encode_chat(tokenizer, dialogue("Count from 1 to 3.", "1, 2, 3")))
    packed, alone = pack([chats], 128), pack([chats[2:]], 128)
    start, length = len(chats[0]) + len(chats[1]), len(chats[2])
    in_row, single = (
        model.model(input_ids=b.tokens, attention_mask=b.mask, position_ids=b.positions).last_hidden_state[0]
        for b in (packed, alone)
    )
    torch.testing.assert_close(in_row[start : start + length], single[:length], rtol=1e-4, atol=1e-4)


def test_a_few_steps_reduce_the_loss(tokenizer: Tokenizer) -> None:
    model = untrained_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = next(batches(tokenizer, Random(0), 2, 128))
    losses = []
    for _ in range(8):
        loss, _ = loss_of(model, batch)
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
