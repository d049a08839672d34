"""Graphs of a student with its KV cache, traced from its modules: for ONNX Runtime and for OpenVINO."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from transformers import DynamicCache

from billhook.core.errors import BillhookError, MissingExtra, ModelError, UsageError
from billhook.methods.export import Exported, Student, export
from billhook.methods.export.beside_weights import write_beside_weights
from billhook.methods.export.targets import Form
from billhook.methods.export.verification import verify

# Types whose students, without an attention and an mlp, were seen to agree in both runtimes.
ARCHITECTURES = (
    *("cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "llama", "mistral"),
    *("mixtral", "nemotron", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "stablelm"),
)
TRANSFORMERS = "5.23"  # the first release whose exporters write what they traced
ROWS, PAST, NEW = 2, 4, 3  # of the example that is traced: a length of 1 would become a constant


def _by_alibi(config: Any) -> str | None:
    """Return why ONNX Runtime does not load a model: a product of booleans, of which Falcon makes its mask."""
    return "positions by ALiBi; take openvino" if getattr(config, "alibi", False) else None


@export(Form("graph", architectures=ARCHITECTURES, refuse=_by_alibi, runtimes=("onnxruntime",)))
def onnx(student: Student, folder: Path) -> Exported:
    """An ONNX graph with inputs and outputs for the KV cache, in float32: for ONNX Runtime.

    Formula: the operations of the student's forward pass, traced with any batch, past and number of new tokens
    Cost: the size of the model in float32 on disk; two minutes of tracing for 30 blocks, on a core; one reading.
    Source: transformers.exporters (Apache-2.0).
    """
    exporters = _exporters("An ONNX graph", "onnx", ("onnx", "onnxscript"))
    exported = _traced(student, exporters.OnnxExporter, exporters.OnnxConfig)
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(exported.program)  # lines of code, with the folders of whoever traced it
    return _written(student, folder, exported, "ONNX", "onnxruntime")


@export(Form("graph", architectures=ARCHITECTURES, runtimes=("openvino",)))
def openvino(student: Student, folder: Path) -> Exported:
    """An OpenVINO graph that holds the KV cache as its state, in float32: for OpenVINO.

    Formula: as onnx
    Cost: as onnx.
    Source: transformers.exporters (Apache-2.0).
    """
    exporters = _exporters("An OpenVINO graph", "openvino", ("openvino",))
    exported = _traced(student, exporters.OpenVINOExporter, exporters.OpenVINOConfig)
    return _written(student, folder, exported, "OpenVINO", "openvino")


def _exporters(what: str, extra: str, packages: tuple[str, ...]) -> Any:
    """Return the module with the exporters. Raises MissingExtra, UsageError where transformers is too old."""
    if any(importlib.util.find_spec(name) is None for name in packages):
        raise MissingExtra(what, extra)
    try:
        found = importlib.import_module("transformers.exporters")
    except ImportError:
        found = None
    if not hasattr(found, "ExportedModel"):
        raise UsageError(
            f"{what} needs transformers {TRANSFORMERS} or newer; this is {transformers.__version__}. Install it with: "
            f"pip install 'transformers>={TRANSFORMERS}'"
        )
    return found


def _traced(student: Student, exporter: Any, config: Any) -> Any:
    """Return the graph of a student's forward pass over new tokens after a KV cache that may be empty."""
    if student.teacher.weights is not None:
        raise ModelError(f"{student.teacher.name} is larger than the memory that is free, so it cannot be traced.")
    model = student.model
    if model.dtype != torch.float32 or model.device.type != "cpu":
        model = copy.deepcopy(model).to("cpu", torch.float32)
    example = _example(model)
    any_size = torch.export.Dim.AUTO
    tokens = {0: any_size, 1: any_size}
    layers = len(example["past_key_values"].layers)
    shapes = {
        "input_ids": tokens, "attention_mask": tokens, "position_ids": tokens,
        "past_key_values": [{0: any_size, 2: any_size}] * (2 * layers),
    }  # fmt: skip
    try:
        with _quiet():
            return exporter().export(model, example, config(dynamic_shapes=shapes))
    except ImportError as error:  # of a package that is too old for the exporter, with what to install
        raise UsageError(str(error)) from error
    except Exception as error:  # whatever a tracer raises
        first = str(error).strip().split("\n")[0]
        raise BillhookError(
            f"transformers {transformers.__version__} does not trace {student.teacher.name}: {type(error).__name__}: "
            f"{first}. Nothing was kept."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what tracing says of its own parts."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@torch.inference_mode()
def _example(model: Any) -> dict[str, Any]:
    """Return the arguments of a forward pass after a KV cache of `PAST` tokens."""
    ids = torch.arange(ROWS * (PAST + NEW)).view(ROWS, -1) % model.config.vocab_size
    cache = DynamicCache()  # without a config no layer forgets what is outside its window: the mask hides it
    model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True)
    return {
        "input_ids": ids[:, PAST:].clone(),
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(PAST, PAST + NEW).repeat(ROWS, 1),
        "past_key_values": cache,
        "use_cache": True,
    }


def _written(student: Student, folder: Path, exported: Any, form: str, runtime: str) -> Exported:
    """Write a graph with what stands beside it, and run it in its runtime."""
    exported.config = exported.generation_config = None  # written as those of other exports are
    folder.mkdir(parents=True)
    exported.save_pretrained(folder)
    tokenizer = student.teacher.tokenizer
    write_beside_weights(student.model, tokenizer, student.teacher, folder)
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        plain = Tokenizer.from_str(backend.to_str())  # as transformers has set it up, but for its last call
        plain.no_truncation()
        plain.no_padding()
        plain.save(str(folder / "tokenizer.json"))
    verified = verify(runtime, folder, student)
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file()))
    return Exported(folder, files, f"{form}, float32", verified=verified)
