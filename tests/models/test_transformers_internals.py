"""What Billhook takes from transformers' private parts, name by name: these fail where upstream changes."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import conversion_mapping
from transformers.models.auto import tokenization_auto

from billhook.models import transformers_internals as internals
from billhook.models.streaming import build_on_meta

HOUSE = Path(__file__).resolve().parents[2] / "billhook"
Folder = Callable[[str], Path]


def loaded(folder: Path) -> transformers.PreTrainedModel:
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model


# -- nothing else ------------------------------------------------------------------------------------------------------


def test_private_parts_of_transformers_are_used_in_one_file_only() -> None:
    """Modules inside transformers, and private attributes that no class of Billhook defines."""
    allowed = {"transformers_internals.py", "modeling_billhook.py"}
    trees = {path: ast.parse(path.read_text()) for path in HOUSE.rglob("*.py")}
    own = {node.name for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    own |= {node.id for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    own |= {
        node.attr for tree in trees.values() for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }  # fmt: skip
    found = []
    for path, tree in trees.items():
        for node in ast.walk(tree) if path.name not in allowed else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("transformers."):
                found.append(f"{path.name}:{node.lineno} imports {node.module}")
            if isinstance(node, ast.Import) and any(alias.name.startswith("transformers.") for alias in node.names):
                found.append(f"{path.name}:{node.lineno} imports inside transformers")
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                documented = ast.unparse(node) == "os._exit"
                found += [f"{path.name}:{node.lineno} reads {node.attr}"] * (node.attr not in own and not documented)
    assert not found


def test_the_names_that_the_modelling_file_imports_are_there() -> None:
    """It is copied into checkpoints, and so cannot ask this project."""
    assert conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    assert conversion_mapping.get_checkpoint_conversion_mapping("llama") is None
    assert callable(conversion_mapping.register_checkpoint_conversion_mapping)
    config_class = transformers.LlamaConfig
    assert transformers.AutoModel._model_mapping.get(config_class, None) is transformers.LlamaModel
    assert tokenization_auto.TOKENIZER_MAPPING_NAMES["gpt2"] == "GPT2Tokenizer"
    assert "phi3" in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    assert tokenization_auto.TOKENIZER_MAPPING.get(transformers.GPT2Config, None) is transformers.GPT2Tokenizer


# -- modules -----------------------------------------------------------------------------------------------------------


def test_linear_maps_are_those_of_torch_and_of_gpt2() -> None:
    block = tiny.build("gpt2").transformer.h[0]
    assert internals.is_linear(block.mlp.c_fc)
    assert internals.is_linear(nn.Linear(2, 3))
    assert not internals.is_linear(block.ln_1)
    assert isinstance(block.mlp.c_fc, internals.Conv1D)


def test_some_modules_keep_their_inputs_first() -> None:
    gpt2, oss, llama = (tiny.build(name) for name in ("gpt2", "gpt_oss", "llama"))
    first = gpt2.transformer.h[0].mlp.c_fc
    assert internals.inputs_first(first)
    assert first.weight.shape[0] == gpt2.config.n_embd
    experts = oss.model.layers[0].mlp.experts
    assert internals.inputs_first(experts)
    assert experts.down_proj.shape[1:] == (oss.config.intermediate_size, oss.config.hidden_size)
    assert not internals.inputs_first(llama.model.layers[0].mlp.up_proj)


# -- classes and configs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.TYPES)
def test_the_classes_of_a_type(name: str) -> None:
    config_class, model_class = internals.stock_classes(name)
    model = tiny.build(name)
    assert (type(model.config), type(model)) == (config_class, model_class)


def test_a_type_that_is_unknown_has_no_classes() -> None:
    with pytest.raises(ValueError, match="no-such-type"):
        internals.stock_classes("no-such-type")


def test_own_code_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    folder = tiny.saved(tmp_path / "own", "llama")
    config = (folder / "config.json").read_text()
    code = "import transformers\n\n\nclass Mine(transformers.LlamaForCausalLM):\n    pass\n"
    (folder / "modeling_mine.py").write_text(code)
    own = '"auto_map": {"AutoModelForCausalLM": "modeling_mine.Mine"}, '
    (folder / "config.json").write_text(config.replace("{", "{" + own, 1))
    auto = transformers.AutoModelForCausalLM
    assert internals.runs_own_code(auto.from_pretrained(folder, trust_remote_code=True))
    assert not internals.runs_own_code(auto.from_pretrained(folder, trust_remote_code=False))


def test_a_dequantised_model_is_saved_as_one_that_never_was_quantised(tmp_path: Path) -> None:
    model = tiny.build("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    model.hf_quantizer, model.is_quantized = object(), True  # of a kind that saving would ask
    internals.forget_quantisation(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert torch.equal(loaded(tmp_path).lm_head.weight, model.lm_head.weight)


def test_a_config_forgets_how_often_another_kind_of_block_comes() -> None:
    config = tiny.build("gemma3_text").config
    config._sliding_window_pattern = config.sliding_window_pattern = 6
    internals.forget_layer_pattern(config)
    assert "sliding_window_pattern" not in "".join(config.__dict__)
    assert len(config.layer_types) == 4


def test_tied_parameters_are_named(checkpoint: Folder) -> None:
    tied, untied = tiny.build("llama_tied"), tiny.build("llama")
    assert internals.tied_names(tied) == ["lm_head.weight"]
    assert internals.tied_names(untied) == []
    assert internals.tied_parameters(tied) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert internals.tied_parameters(untied) == {}
    del tied, untied
    model = build_on_meta(checkpoint("llama_tied"), torch.float32, torch.device("cpu"))
    internals.tied_parameters(model).pop("lm_head.weight")
    assert internals.tied_parameters(model) == {}


@pytest.mark.parametrize("own", [True, False])
def test_the_generation_config_is_that_of_loading(tmp_path: Path, own: bool) -> None:
    folder = tiny.saved(tmp_path / "model", "llama")
    if not own:
        (folder / "generation_config.json").unlink()
    assert internals.generation_config_of(folder)[0].to_dict() == loaded(folder).generation_config.to_dict()


# -- the KV cache ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_cache_is_filled_repeated_and_goes_on(name: str) -> None:
    model, rows = tiny.build(name), tiny.tokens(1, 5)
    cache = internals.new_cache(model)
    with torch.inference_mode():
        wanted = torch.tensor([[True, False, True]])
        first = internals.logits_at(model, rows[:, :3], wanted, cache)
        assert all(type(layer) in internals.REPEATABLE_LAYERS for layer in cache.layers)
        assert {layer.get_seq_length() for layer in cache.layers} == {3}
        assert {layer.is_sliding for layer in cache.layers} == {name == "mistral"}
        cache.batch_repeat_interleave(2)
        wanted = torch.tensor([[True, False], [True, True]])
        step = internals.logits_at(model, rows[:, 3:].repeat(2, 1), wanted, cache)
        whole = model(input_ids=rows, use_cache=False).logits[0]
    torch.testing.assert_close(first, whole[[0, 2]])
    torch.testing.assert_close(step, whole[[3, 3, 4]])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_returns_its_cache_under_the_name_by_which_it_takes_it(name: str) -> None:
    model, rows = tiny.build(name), tiny.tokens(1, 5)
    cache = internals.cache_name(model)
    with torch.inference_mode():
        out = model(input_ids=rows[:, :3], use_cache=True)
        step = model(input_ids=rows[:, 3:], use_cache=True, **{cache: out[cache]}).logits
        torch.testing.assert_close(step, model(input_ids=rows, use_cache=False).logits[:, 3:])


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "qwen3_moe"])
def test_what_transformers_keeps_in_float32_is_known(checkpoint: Folder, name: str) -> None:
    folder = checkpoint(name)
    real = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16)
    wide = [key for key, value in real.named_parameters() if value.dtype == torch.float32]
    assert internals.names_in_float32(real, torch.float16) == wide


def test_a_class_may_ask_for_float32() -> None:
    model = tiny.build("llama")
    model._keep_in_fp32_modules_strict = {"norm"}
    assert "model.norm.weight" in internals.names_in_float32(model, torch.bfloat16)
    assert "lm_head.weight" not in internals.names_in_float32(model, torch.bfloat16)


def test_buffers_are_filled_and_parameters_on_meta_stay(checkpoint: Folder) -> None:
    """`build_on_meta` leaves memory in them that nobody has written to, and calls `fill_buffers`."""
    model = build_on_meta(checkpoint("llama"), torch.float32, torch.device("cpu"))
    real = dict(loaded(checkpoint("llama")).named_buffers())
    assert real
    assert all(torch.equal(buffer, real[name]) for name, buffer in model.named_buffers())
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", tiny.TYPES)
def test_tensors_get_the_names_of_the_hub_and_come_back(checkpoint: Folder, name: str) -> None:
    folder = checkpoint(name)
    model, file = loaded(folder), load_file(folder / "model.safetensors")
    disk = internals.names_on_disk(model, model.state_dict())
    assert file.keys() <= disk.keys()
    assert all(torch.equal(disk[key], value) for key, value in file.items())
    made: dict[str, torch.Tensor] = {}
    recipes, unexpected = internals.conversions(model, list(file))
    for recipe in recipes:
        pieces = [piece.convert(file, model) for piece in recipe.split()]
        for target in pieces[0]:
            made[target] = pieces[0][target] if len(pieces) == 1 else torch.cat([piece[target] for piece in pieces])
    assert not unexpected
    state = model.state_dict()
    assert state.keys() - made.keys() == set(internals.tied_names(model))
    assert all(torch.equal(state[key], value) for key, value in made.items())
    assert len(model._weight_conversions) == sum(entry.was_used() for entry in model._weight_conversions)


def test_experts_are_stacked_one_at_a_time(checkpoint: Folder) -> None:
    folder = checkpoint("mixtral")
    model, file = loaded(folder), load_file(folder / "model.safetensors")
    whole = next(r for r in internals.conversions(model, list(file))[0] if "experts" in r.first)
    pieces = whole.split()
    assert len(pieces) == 4
    assert all(len(piece.parts) < len(whole.parts) for piece in pieces)


def test_names_that_become_nothing_are_told_unless_the_class_ignores_them(checkpoint: Folder) -> None:
    model = loaded(checkpoint("llama"))
    names = [*model.state_dict(), "model.layers.0.surplus.weight"]
    assert internals.conversions(model, names)[1] == ["model.layers.0.surplus.weight"]
    model._keys_to_ignore_on_load_unexpected = {r"surplus"}
    assert internals.conversions(model, names)[1] == []
