"""GGUF files: every architecture and plan either agrees in llama.cpp or is refused; tokenizers, types, keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import billhook
from billhook.core.errors import BillhookError, ModelError, PlanError, UsageError
from billhook.core.plan import Plan, Site
from billhook.methods.export import Exported, Student, export_student, form_of
from billhook.models.formats import gguf_writer as types
from billhook.models.formats.gguf_rows import DECI_ROWS, ROWS
from billhook.models.formats.gguf_vocabulary import tokenizer_keys
from billhook.models.load import Teacher, load
from billhook.models.repair import NO_REPAIR, Patch, Repair
from billhook.models.surgery import apply
from billhook.report import run_words
from billhook.runs.exporting import probe_tokens

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

BLOCK = "attention.1,mlp.1"
SCALED: dict[str, Any] = {"rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = SCALED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = SCALED | {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
BIASES = {"attention_bias": True, "mlp_bias": True}
NATIVE: list[tuple[str, str, dict[str, Any]]] = [
    *((name, BLOCK, {}) for name in ("gemma", "gemma2", "gemma3_text", "phi", "olmo2", "stablelm", "gpt2", "nemotron")),
    *((name, BLOCK, {}) for name in ("cohere", "falcon", "gpt_neox", "qwen3", "llama_tied")),
    *((name, "", {}) for name in ("falcon_new", "stablelm_parallel", "gpt_neox_serial")),
    ("gemma2", BLOCK, {"query_pre_attn_scalar": 20}),
    ("gemma3_text", "attention.0,mlp.0", {"query_pre_attn_scalar": 20}),
    ("mistral", BLOCK, {"sliding_window": None}),
    ("qwen2", BLOCK, {"use_sliding_window": False, "rope_parameters": SCALED | {"rope_type": "yarn"}}),
    ("mixtral", f"{BLOCK},mlp.0[0-143],mlp.2[48-191],mlp.3[0-47 96-191]", {}),
    ("qwen3_moe", f"{BLOCK},mlp.0[0-47],mlp.2[24-71],mlp.3[0-23 72-95]", {"norm_topk_prob": True}),
    ("phi3", BLOCK, {"rope_parameters": LONGROPE}),
    ("llama", ",".join(f"mlp.{i}[0-29],attention.{i}[1]" for i in range(4)), {"rope_parameters": LLAMA3}),
]
DECI: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "attention.0,mlp.3", {}),
    ("llama", "attention.3,mlp.0,attention.1,mlp.1", {"rope_parameters": LLAMA3}),
    ("llama", "attention.2,mlp.2[0-9],attention.1[0],mlp.0[3-40]", BIASES),
    ("qwen2", "attention.2,mlp.1,mlp.3[0-20]", {"use_sliding_window": False}),
    ("phi3", "attention.0,mlp.2,attention.2[1]", {}),
]


def exported(
    folder: Path, variant: str, names: str, out: Path, *, repair: Repair = NO_REPAIR, dtype: str = "f32",
    verify: bool = True, **flags: Any,
) -> tuple[Teacher, Exported]:  # fmt: skip
    tiny.saved(folder, variant, **flags)
    teacher, plan = load(folder), Plan.parse(names.split(",")) if names else Plan()
    model = apply(teacher, plan, repair=repair)
    student = Student(model, teacher, plan, probe_tokens(teacher), repair, verify=verify)
    return teacher, export_student("gguf", student, out, dtype=dtype)


def header(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.filterwarnings("ignore:This model config has set:UserWarning")
@pytest.mark.parametrize(("variant", "names", "flags"), [*NATIVE, *DECI])
def test_llama_cpp_computes_what_the_student_does(
    variant: str, names: str, flags: dict[str, Any], tmp_path: Path
) -> None:
    _, got = exported(tmp_path / "model", variant, names, tmp_path / "out", **flags)
    assert got.form.startswith("GGUF deci") == ((variant, names, flags) in DECI)
    assert {path.name for path in got.files} == {"model-F32.gguf", "Modelfile"}
    found = got.verified
    assert found is not None
    assert found.worst < 1e-3
    assert found.agreement > 0.95


def test_every_architecture_is_exported_above_or_refused() -> None:
    tried = {tiny.VARIANTS[variant][0] for variant, _, _ in (*NATIVE, *DECI)}
    assert set(ROWS) == tried | {"llama"}
    assert {tiny.VARIANTS[variant][0] for variant, _, _ in DECI} == set(DECI_ROWS) - {"mistral"}  # as llama


def repaired() -> Repair:
    """Constants where an attention or an MLP was, in the first block too, and biases of narrowed sites."""
    draw = torch.Generator().manual_seed(3)
    sites = Plan.parse(["attention.0", "attention.2", "mlp.1", "mlp.2"]).sites()
    constants = {site: Patch(bias=torch.randn(32, generator=draw)) for site in sites}
    return Repair(patches=constants, biases={Site(1, "attention"): torch.randn(32, generator=draw)})


def test_constants_and_biases_of_a_repair_are_folded_into_biases(tmp_path: Path) -> None:
    names = "attention.0,attention.2,mlp.1,mlp.2,attention.1[0]"
    _, got = exported(tmp_path / "model", "llama", names, tmp_path / "out", repair=repaired())
    assert got.verified is not None
    assert got.verified.worst < 1e-3


@pytest.mark.parametrize(
    ("variant", "names", "flags", "said"),
    [
        ("qwen3", "attention.1", {}, "a block without its attention; remove whole blocks"),
        ("gemma", "mlp.1[0-9]", {}, "mlps of different widths"),
        ("gpt2", "attention.1[0]", {}, "a width of its own for attentions"),
        ("mistral", "", {}, "a sliding window of 6 tokens"),
        ("qwen2", "", {}, "a sliding window of 6 tokens"),
        ("falcon_alibi", "", {}, "ALiBi"),
        ("falcon_serial", "", {}, "serial residual"),
        ("qwen3_moe", "", {}, "norm_topk_prob=false"),
        ("qwen3_moe_mixed", "", {"norm_topk_prob": True}, "dense blocks"),
        ("llama", "", {"hidden_act": "gelu"}, "the activation gelu; llama.cpp computes silu"),
        ("llama", "", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}, "the rope type dynamic"),
        ("opt", "", {}, "models of type opt"),
        ("gpt_oss", "", {}, "models of type gpt_oss"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused_by_reason(
    variant: str, names: str, flags: dict[str, Any], said: str, tmp_path: Path
) -> None:
    teacher = load(tiny.saved(tmp_path / "model", variant, **flags))
    with pytest.raises(PlanError, match=f"gguf has no place for .*{said}"):
        form_of("gguf", teacher, Plan.parse(names.split(",")) if names else Plan())


def test_a_patch_that_is_more_than_a_constant_is_refused(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "model", "llama"))
    plan = Plan.parse(["mlp.1"])
    repair = Repair(patches={site: Patch(bias=torch.ones(32), gain=torch.ones(1)) for site in plan.sites()})
    with pytest.raises(PlanError, match="no place for what a repair puts in the place of a site"):
        form_of("gguf", teacher, plan, repair)


def test_a_type_that_no_file_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dtype='q8' is no type of a GGUF file. Did you mean q8_0\? Known: f32, f16"):
        exported(tmp_path / "model", "llama", "", tmp_path / "out", dtype="q8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_types_of_weights(dtype: str, tmp_path: Path) -> None:
    """All rows divide into blocks of 32 but those of an attention that has lost heads; zeros fill those of MLPs."""
    _, got = exported(tmp_path / "model", "llama", "attention.1[0]", tmp_path / "out", dtype=dtype)
    (file,) = (path for path in got.files if path.suffix == ".gguf")
    assert file.name == f"model-{dtype.upper()}.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert tensors["blk.0.ffn_down.weight"].shape.tolist() == [64, 32], "48 neurons and 16 zeros"
    assert kinds["blk.0.attn_q.weight"] == kinds["blk.0.ffn_down.weight"] == dtype.upper()
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.1.attn_output.weight"] == (dtype.upper() if dtype in types.FLOATS else "F16")
    assert kinds["token_embd.weight"] == (dtype.upper() if dtype in types.FLOATS else "Q8_0")
    assert got.verified is not None
    rounded = [note for note in got.notes if note.startswith(("In f16, since", "Before rounding: KL"))]
    assert len(rounded) == {"f16": 0, "bf16": 1}.get(dtype, 2)


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_other_types_are_the_business_of_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("billhook.methods.export.gguf.find_program", lambda: None)
    _, got = exported(tmp_path / "model", "llama", "", tmp_path / "out", dtype="q4_k_m")
    assert "model-F16.gguf" in {path.name for path in got.files}
    assert any("type: llama-quantize model-F16.gguf model-Q4_K_M.gguf Q4_K_M" in note for note in got.notes)
    failing = program(tmp_path / "fails", "echo 'error: no such type' >&2; exit 3")
    monkeypatch.setattr("billhook.methods.export.gguf.find_program", lambda: failing)
    with pytest.raises(
        BillhookError, match=r"does not round model-F16.gguf to q4_k_m \(exit status 3\). error: no such"
    ):
        exported(tmp_path / "again", "llama", "", tmp_path / "none", dtype="q4_k_m")
    assert not (tmp_path / "none").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert types.find_program() is None or "ik_llama_cpp" in str(types.find_program())
    found = program(tmp_path / "llama-quantize", "cp $1 $2")
    assert types.find_program() == found


def test_types_that_llama_cpp_does_not_read_are_rounded_anew(tmp_path: Path) -> None:
    """By a program that writes type 133 for one tensor, unless it is told not to."""
    _, got = exported(tmp_path / "model", "llama", "", tmp_path / "out", dtype="f16", verify=False)
    (file,) = (path for path in got.files if path.suffix == ".gguf")
    assert types.foreign_tensors(file) == []
    data, name = file.read_bytes(), b"blk.2.attn_v.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # dimensions and their sizes
    assert data[at : at + 4] == (1).to_bytes(4, "little")
    odd = tmp_path / "odd.gguf"
    odd.write_bytes(data[:at] + (133).to_bytes(4, "little") + data[at + 4 :])
    assert types.foreign_tensors(odd) == [name.decode()]
    script = f'if [ "$1" = --custom-q ]; then echo "$2" > {tmp_path}/rules; cp "$3" "$4"; else cp {odd} "$2"; fi'
    types.run_program(program(tmp_path / "rounds", script), file, tmp_path / "new.gguf", "q4_k_m")
    assert (tmp_path / "rules").read_text().strip() == r"^blk\.2\.attn_v\.weight$=q8_0"
    assert (tmp_path / "new.gguf").read_bytes() == data


def test_weights_beyond_the_range_of_f16_are_refused(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "model", "llama"))
    teacher.model.model.embed_tokens.weight.data[3, 0] = 1e6
    with pytest.raises(UsageError, match=r"token_embd.weight has weights beyond the range of f16. Choose dtype='bf16'"):
        export_student("gguf", Student(teacher.model, teacher, Plan(), probe_tokens(teacher)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_student_whose_file_computes_otherwise_is_not_kept(tmp_path: Path) -> None:
    teacher = load(tiny.saved(tmp_path / "model", "llama"))
    model = apply(teacher, Plan())
    model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    student = Student(model, teacher, Plan(), probe_tokens(teacher))
    with pytest.raises(BillhookError, match=r"llama\.cpp does not compute what the student does"):
        export_student("gguf", student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- tokenizers -----------------------------------------------------------------------------------------------------

TEXT = ["The quick brown fox doesn't jump.", "in 1,234 days  and 56 nights", "Ein Käfer überquert die Straße"]


def byte_level(folder: Path, before: Any, *, whole: bool = False, **flags: Any) -> Teacher:
    """A tiny model with a byte-level tokenizer that is trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    if flags.pop("nfc", False):
        backend.normalizer = normalizers.NFC()
    alphabet = sorted(__import__("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|im_start|>"]
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    tiny.saved(folder, "llama", vocab_size=320)
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    fast.add_tokens(["plain_added"])
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return load(folder)


def test_what_has_a_runtime_stands_beside_the_checkpoint_of_a_run(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    teacher = byte_level(tmp_path / "model", ByteLevel(add_prefix_space=False))
    texts = tiny.write_texts(tmp_path / "texts.jsonl", 20)
    given: dict[str, Any] = {"data": str(texts), "tokens": 96, "length": 16, "eval_tokens": 256}
    given["store"] = tmp_path / "runs.db"
    result = billhook.prune(teacher, plan="attention.2,mlp.1", export="gguf", out=tmp_path / "out", **given)
    (beside,) = result.exports
    assert (beside.to, beside.form, beside.files) == ("gguf", "GGUF deci, F16", ("Modelfile", "model-F16.gguf"))
    assert beside.verified is not None
    assert Path(beside.out) == tmp_path / "out" / "exports" / "gguf"
    assert (Path(beside.out) / "model-F16.gguf").is_file()
    assert load(tmp_path / "out").anatomy.sites_present() != teacher.anatomy.sites_present()
    assert any("Verified in llama.cpp" in note for note in run_words.run_notes(result))
    with pytest.raises(UsageError, match=r"writes the checkpoint twice: transformers, adapter\. Take one"):
        billhook.prune(teacher, plan="mlp.1", export="transformers,adapter", out=tmp_path / "two", **given)


def steps() -> Iterator[tuple[str, Any, bool, bool]]:
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    own, none = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)
    yield "gpt-2", own, False, False
    yield "smollm", Sequence([Digits(individual_digits=True), own]), False, False
    yield "qwen2", Sequence([Split(Regex(words % "" + rest), "isolated"), none]), False, True
    yield "llama-bpe", Sequence([Split(Regex(words % "{1,3}" + rest), "isolated"), none]), True, False


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_a_byte_level_tokenizer_is_recognised_and_splits_alike(name: str, tmp_path: Path) -> None:
    before, whole, nfc = next(tuple(rest) for pre, *rest in steps() if pre == name)
    teacher = byte_level(tmp_path / "model", before, whole=whole, nfc=nfc)
    student = Student(teacher.model, teacher, Plan(), probe_tokens(teacher))
    got = export_student("gguf", student, tmp_path / "out")
    assert got.verified is not None
    assert got.verified.texts == 7
    said = header(tmp_path / "out" / "model-F16.gguf")
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", name)
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    assert (said["tokenizer.ggml.eos_token_id"], said["tokenizer.ggml.add_bos_token"]) == (0, False)
    kinds = dict(zip(said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[text] for text in ("<|im_start|>", "plain_added", "a", "[PAD319]")] == [3, 4, 1, 5]
    assert 'PARAMETER stop "<|end|>"' in (tmp_path / "out" / "Modelfile").read_text()


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_gets_scores_from_its_merges(prefix: bool, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prefix else replace
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    backend.train_from_iterator(
        [text.replace(" ", "▁") for text in TEXT],
        trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False),
    )
    raw = __import__("json").loads(backend.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]  # the bytes are no special tokens; they only have places
    backend = Tokenizer.from_str(__import__("json").dumps(raw))
    backend.decoder = decoders.ByteFallback()
    folder = tiny.saved(tmp_path / "model", "llama", vocab_size=340)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    teacher = load(folder)
    got = export_student("gguf", Student(teacher.model, teacher, Plan(), probe_tokens(teacher)), tmp_path / "out")
    assert got.verified is not None
    assert got.verified.texts == 7
    said = header(tmp_path / "out" / "model-F16.gguf")
    assert said["tokenizer.ggml.model"] == "llama"
    assert said["tokenizer.ggml.add_space_prefix"] is prefix
    assert np.argsort(said["tokenizer.ggml.token_type"])[-256:].min() == 3  # the bytes


def test_an_unknown_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    teacher = load(tiny.with_tokenizer(tmp_path / "model"))
    with pytest.raises(
        ModelError, match=r"does not know llama\.cpp's name for .*WordLevel.*convert_hf_to_gguf.py FOLDER"
    ):
        tokenizer_keys(teacher, 64)
