"""A checkpoint that is not whole and harmless is refused before anything is loaded, in a line that names the fault."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_serve.model.checkpoint import INDEX, SINGLE, open_checkpoint
from mixtral_serve.model.errors import CheckpointError
from mixtral_serve.model.synthetic import write_synthetic_checkpoint

EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may break; one safetensors file."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


@pytest.fixture
def sharded(tiny_shape, tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    write_synthetic_checkpoint(path, tiny_shape, seed=1, weights="fp32", max_shard_bytes=40_000)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def test_a_whole_checkpoint_is_accepted(checkpoint, sharded, tiny_shape) -> None:
    for path in (checkpoint, sharded):
        opened = open_checkpoint(path)
        assert opened.shape == tiny_shape
        assert opened.num_tensors == len(tiny_shape.hub_tensors())


def test_a_directory_that_is_not_there_is_refused(tmp_path) -> None:
    assert "not a directory" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "modeling.py", "a/b/x.pkl"])
def test_row24_a_file_that_may_carry_code_refuses_the_checkpoint(checkpoint, name) -> None:
    (checkpoint / name).parent.mkdir(parents=True, exist_ok=True)
    (checkpoint / name).write_bytes(b"")
    assert refusal(checkpoint).startswith(f"{name}: may carry code")


def test_row24_auto_map_refuses_the_checkpoint(checkpoint) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling.Evil"}))
    assert refusal(checkpoint).startswith("config.json: auto_map: asks for code")


def test_row24_a_shard_name_cannot_leave_the_directory(sharded) -> None:
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({EXPERT: "../other.safetensors"}))
    assert refusal(sharded).startswith(f"{INDEX}: {EXPERT}: is not said to be in")


def test_row24_a_pickle_named_by_the_index_is_refused(sharded) -> None:
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({EXPERT: "weights"}))
    assert refusal(sharded).startswith(f"{INDEX}: {EXPERT}: is not said to be in")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_row54_a_truncated_file_is_named(checkpoint, keep) -> None:
    data = (checkpoint / SINGLE).read_bytes()
    (checkpoint / SINGLE).write_bytes(data[:keep])
    assert refusal(checkpoint).startswith(f"{SINGLE}: is not a complete safetensors file")


def test_row54_a_file_with_bytes_after_its_end_is_named(checkpoint) -> None:
    with (checkpoint / SINGLE).open("ab") as file:
        file.write(b"\0")
    assert refusal(checkpoint).startswith(f"{SINGLE}: is not a complete safetensors file")


def test_row54_a_flipped_header_is_named(checkpoint) -> None:
    data = bytearray((checkpoint / SINGLE).read_bytes())
    data[9] ^= 0xFF
    (checkpoint / SINGLE).write_bytes(data)
    assert refusal(checkpoint).startswith(f"{SINGLE}: is not a complete safetensors file")


def test_row54_a_missing_shard_is_named(sharded) -> None:
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert refusal(sharded) == f"{victim.name}: is missing, although {INDEX} lists it"


def test_row54_missing_weights_are_named(checkpoint) -> None:
    (checkpoint / SINGLE).unlink()
    assert refusal(checkpoint) == f"{SINGLE}: is missing, and so is {INDEX}"


def test_row54_a_missing_tensor_is_named(checkpoint) -> None:
    edit_tensors(checkpoint / SINGLE, lambda t: t.pop(EXPERT))
    assert refusal(checkpoint) == f"{SINGLE}: {EXPERT}: is missing"


def test_row54_a_tensor_that_its_shard_lacks_is_named(sharded) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][EXPERT]
    edit_tensors(sharded / shard, lambda t: t.pop(EXPERT))
    assert refusal(sharded).startswith(f"{shard}: {EXPERT}: is missing")


def test_row54_a_tensor_that_the_index_lacks_is_named(sharded) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][EXPERT]
    edit_json(sharded / INDEX, lambda i: i["weight_map"].pop(EXPERT))
    assert refusal(sharded).startswith(f"{shard}: {EXPERT}: is not what {INDEX} says")


def test_row54_a_tensor_that_neither_index_nor_shards_hold_is_named(sharded) -> None:
    shard = json.loads((sharded / INDEX).read_text())["weight_map"][EXPERT]
    edit_json(sharded / INDEX, lambda i: i["weight_map"].pop(EXPERT))
    edit_tensors(sharded / shard, lambda t: t.pop(EXPERT))
    assert refusal(sharded) == f"{INDEX}: {EXPERT}: is missing"


def test_row54_a_tensor_in_two_shards_is_named(sharded) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = "model.embed_tokens.weight"
    edit_tensors(second, lambda t: t.update({name: load_file(first)[name].clone()}))
    assert refusal(sharded).startswith(f"{second.name}: {name}: is also in {first.name}")


def test_row54_an_unexpected_tensor_is_named(checkpoint) -> None:
    edit_tensors(checkpoint / SINGLE, lambda t: t.update(extra=torch.zeros(2)))
    assert refusal(checkpoint) == f"{SINGLE}: extra: is a tensor that the model does not have"


def test_row54_a_misshapen_tensor_is_named(checkpoint) -> None:
    edit_tensors(checkpoint / SINGLE, lambda t: t.update({EXPERT: t[EXPERT].t().contiguous()}))
    assert refusal(checkpoint) == f"{SINGLE}: {EXPERT}: has shape [48, 40], the config asks for [40, 48]"


def test_row54_a_tensor_of_integers_is_named(checkpoint) -> None:
    edit_tensors(checkpoint / SINGLE, lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}))
    assert refusal(checkpoint) == f"{SINGLE}: {EXPERT}: is I8; only BF16, F16, F32 are read"


def test_a_head_that_is_missing_without_tying_is_named(checkpoint) -> None:
    edit_tensors(checkpoint / SINGLE, lambda t: t.pop("lm_head.weight"))
    assert refusal(checkpoint) == f"{SINGLE}: lm_head.weight: is missing"


def test_legacy_rotary_buffers_are_passed_over(checkpoint, tiny_shape) -> None:
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5),
        "model.rotary_emb.inv_freq": torch.ones(5),
    }
    edit_tensors(checkpoint / SINGLE, lambda t: t.update(buffers))
    assert open_checkpoint(checkpoint).num_tensors == len(tiny_shape.hub_tensors())


def test_a_stored_copy_of_a_tied_head_is_passed_over(checkpoint, tiny_shape) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(tie_word_embeddings=True))
    assert open_checkpoint(checkpoint).num_tensors == len(tiny_shape.hub_tensors()) - 1
    edit_tensors(checkpoint / SINGLE, lambda t: t.update({"lm_head.weight": torch.zeros(3, 3)}))
    assert refusal(checkpoint).startswith(f"{SINGLE}: lm_head.weight: has shape [3, 3]")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_row56_a_missing_file_is_named(checkpoint, file) -> None:
    (checkpoint / file).unlink()
    assert refusal(checkpoint) == f"{file}: is missing"


def test_row56_a_tokenizer_larger_than_the_head_is_refused(checkpoint, tiny_shape) -> None:
    beyond = tiny_shape.vocab_size
    edit_json(checkpoint / "tokenizer.json", lambda t: t["model"]["vocab"].update(extra=beyond))
    assert refusal(checkpoint) == f"tokenizer.json: has token id {beyond}, the model's head ends at {beyond - 1}"


def test_row56_an_added_token_beyond_the_head_is_refused(checkpoint) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda t: t["added_tokens"].append({"id": 32000, "content": "<x>"}))
    assert refusal(checkpoint).startswith("tokenizer.json: has token id 32000")


def test_row56_a_tokenizer_smaller_than_the_head_is_accepted(checkpoint) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda t: t["model"]["vocab"].popitem())
    open_checkpoint(checkpoint)


@pytest.mark.parametrize("vocabulary", [None, {}, [1], {"a": "1"}, {"a": -1}])
def test_row56_a_tokenizer_without_a_usable_vocabulary_is_refused(checkpoint, vocabulary) -> None:
    edit_json(checkpoint / "tokenizer.json", lambda t: t["model"].update(vocab=vocabulary))
    assert refusal(checkpoint).startswith("tokenizer.json: has ")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "llama"}, "model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_hidden_layers": 1 << 40}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 2}}, "rope_parameters"),
        ({"rope_parameters": 7}, "rope_parameters"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": 97, "bos_token_id": None}, "eos_token_id"),
        ({"bos_token_id": -1}, "bos_token_id"),
    ],
)
def test_a_field_outside_its_bounds_is_named(checkpoint, change, named) -> None:
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", lambda c: c.update(change))
    assert refusal(checkpoint).startswith(f"config.json: {named}: ")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"hidden_size": NaN}', '{"rope_theta": Infinity}', "\xff"])
def test_a_config_that_is_not_a_json_object_of_finite_numbers_is_refused(checkpoint, text) -> None:
    (checkpoint / "config.json").write_text(text, encoding="latin-1")
    assert refusal(checkpoint).startswith("config.json: is not ")


def test_a_deeply_nested_config_is_refused(checkpoint) -> None:
    (checkpoint / "config.json").write_text("[" * 200_000)
    assert refusal(checkpoint).startswith("config.json: is not valid JSON")


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_without_a_weight_map_is_refused(sharded, weight_map) -> None:
    edit_json(sharded / INDEX, lambda i: i.update(weight_map=weight_map))
    assert refusal(sharded) == f"{INDEX}: has no weight_map"


def test_end_of_sequence_ids_come_from_the_generation_config_first(checkpoint) -> None:
    edit_json(checkpoint / "generation_config.json", lambda g: g.update(eos_token_id=[5, 2, 5]))
    assert open_checkpoint(checkpoint).shape.eos_token_ids == (5, 2)
    (checkpoint / "generation_config.json").unlink()
    assert open_checkpoint(checkpoint).shape.eos_token_ids == (2,)


def test_the_newer_way_to_write_rope_theta_is_read(checkpoint) -> None:
    def change(config: dict) -> None:
        del config["rope_theta"]
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": 500.0}

    edit_json(checkpoint / "config.json", change)
    assert open_checkpoint(checkpoint).shape.rope_theta == 500.0


def test_a_null_in_the_config_counts_as_absent(checkpoint) -> None:
    edit_json(checkpoint / "config.json", lambda c: c.update(head_dim=None, rope_theta=None))
    with pytest.raises(CheckpointError, match="has shape"):  # hidden_size / heads is 12 here, the weights have 10
        open_checkpoint(checkpoint)


def test_a_config_that_cannot_be_read_or_is_absurdly_large_is_refused(checkpoint) -> None:
    with (checkpoint / "config.json").open("r+b") as file:
        file.truncate(1 << 27)
    assert refusal(checkpoint).startswith("config.json: is larger than")
    (checkpoint / "config.json").unlink()
    (checkpoint / "config.json").mkdir()
    assert refusal(checkpoint) == "config.json: cannot be read: Is a directory"


def test_a_generation_config_without_an_end_leaves_the_configs(checkpoint) -> None:
    edit_json(checkpoint / "generation_config.json", lambda g: g.update(eos_token_id=None))
    assert open_checkpoint(checkpoint).shape.eos_token_ids == (2,)
