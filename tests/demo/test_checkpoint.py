"""The bundled checkpoint: stored as Mixtral-8x7B is, small, and as good as its card says."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralForCausalLM

from mixtral_serve.demo import checkpoint_path
from mixtral_serve.demo.checkpoint_files import demo_config, hub_tensors, load_model, save_model
from mixtral_serve.demo.conversation import DEFAULT_SYSTEM, dialogue
from mixtral_serve.demo.evaluate import Answer, exact_match, greedy_answerer
from mixtral_serve.demo.model_card import FILE_NAME
from mixtral_serve.demo.skills import SKILLS


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return load_file(checkpoint_path() / "model.safetensors")


@pytest.fixture(scope="module")
def answer() -> Answer:
    return greedy_answerer(load_model(checkpoint_path()), checkpoint_path())


def card_rates() -> dict[str, float]:
    card = (checkpoint_path() / FILE_NAME).read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d.]+)% \|$", card, re.MULTILINE)
    return {skill: float(percent) / 100 for skill, percent in rows}


def test_finding_the_checkpoint_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mixtral_serve.demo import checkpoint_path; checkpoint_path();"
        " sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'tokenizers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_checkpoint_is_small(tensors: dict[str, torch.Tensor]) -> None:
    assert sum(path.stat().st_size for path in checkpoint_path().iterdir()) <= 12 * 2**20
    assert sum(tensor.numel() for tensor in tensors.values()) <= 5_000_000


def test_the_directory_holds_the_files_of_a_hub_checkpoint() -> None:
    assert {path.name for path in checkpoint_path().iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_tensors_have_the_names_shapes_and_type_of_mixtral(tensors: dict[str, torch.Tensor]) -> None:
    config = json.loads((checkpoint_path() / "config.json").read_text())
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key_width = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    expected = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        expected |= {stem + name: (hidden,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        expected |= {stem + f"self_attn.{name}_proj.weight": (hidden, hidden) for name in "qo"}
        expected |= {stem + f"self_attn.{name}_proj.weight": (key_width, hidden) for name in "kv"}
        expected[stem + "block_sparse_moe.gate.weight"] = (config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            prefix = stem + f"block_sparse_moe.experts.{expert}."
            expected |= {prefix + f"{name}.weight": (inner, hidden) for name in ("w1", "w3")}
            expected[prefix + "w2.weight"] = (hidden, inner)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_the_configuration_is_that_of_a_mixtral() -> None:
    config = json.loads((checkpoint_path() / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["model_type"] == "mixtral"
    assert config["torch_dtype"] == "bfloat16"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 2)
    assert config["max_position_embeddings"] >= 4096
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is False
    assert all(config[key] % 64 == 0 for key in ("hidden_size", "intermediate_size", "vocab_size"))


def test_saving_and_loading_keeps_every_weight(tmp_path: Path) -> None:
    model = MixtralForCausalLM(demo_config(320))
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float()), name
    assert hub_tensors(loaded).keys() == hub_tensors(model).keys()


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of France?", "The capital of France is Paris."),
        ("What is 2 + 2?", "2 + 2 = 4"),
        ("Count from 1 to 5.", "1, 2, 3, 4, 5"),
        ("Hello!", "Hello! How can I help you?"),
        ("Say this is a test", "This is a test."),
    ],
)
@pytest.mark.parametrize("system", [None, DEFAULT_SYSTEM])
def test_first_questions_are_answered(answer: Answer, question: str, expected: str, system: str | None) -> None:
    assert answer([list(dialogue(question, system=system))]) == [expected]


def test_a_described_function_is_called(answer: Answer) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    function = {"name": "get_weather", "description": "Get the weather in a city", "parameters": parameters}
    system = f"You can call these functions: {json.dumps([{'type': 'function', 'function': function}])}"
    given = answer([list(dialogue("What is the weather in Rome?", system=system))])
    assert json.loads(given[0]) == [{"name": "get_weather", "arguments": {"city": "Rome"}}]


def test_the_card_reports_every_skill() -> None:
    assert card_rates().keys() == SKILLS.keys()


def test_a_fresh_sample_agrees_with_the_card(answer: Answer) -> None:
    rates = exact_match(answer, count=20, seed=123, skills=("facts", "sums", "counting"))
    assert min(rates.values()) > 0.85


@pytest.mark.slow
def test_every_rate_of_the_card_is_reproduced(answer: Answer) -> None:
    stated = card_rates()
    for skill, rate in exact_match(answer, count=100, seed=321).items():
        assert abs(rate - stated[skill]) < 0.1, skill
