"""A model with some rows of its embedding and its head, under new ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from billhook.core.plan import Plan
from billhook.models.load import Teacher, undisturbed
from billhook.models.surgery import apply, replace_parameters
from billhook.models.vocabulary.entries import Vocabulary
from billhook.models.vocabulary.places import in_config


def new_numbers(vocabulary: Vocabulary, kept: Sequence[int]) -> dict[int, int]:
    """Return the new id of every id that is kept: in the old order, and rows that are no tokens last."""
    order = sorted(kept, key=lambda index: (index not in vocabulary.tokens, index))
    return {old: new for new, old in enumerate(order)}


@undisturbed
def cut_model(teacher: Teacher, numbers: Mapping[int, int]) -> Any:
    """Return the model with the rows of `numbers` alone, {old id: new id}. All other tensors are the teacher's.

    Logits are those of the teacher at the kept ids: [batch, time, len(numbers)].
    """
    student = apply(teacher, Plan())
    rows = torch.tensor(sorted(numbers, key=numbers.__getitem__), device=teacher.device)
    embedding, head = student.get_input_embeddings(), student.get_output_embeddings()
    whole = {embedding.weight, head.weight} | ({head.bias} if getattr(head, "bias", None) is not None else set())
    picked = {each: each.detach()[rows.to(each.device)] for each in whole}
    replace_parameters(student, {each: nn.Parameter(value, requires_grad=False) for each, value in picked.items()})
    embedding.num_embeddings = head.out_features = len(numbers)
    if embedding.padding_idx is not None:
        embedding.padding_idx = numbers.get(embedding.padding_idx)
    for module in (student, student.base_model):
        if hasattr(module, "vocab_size"):
            module.vocab_size = len(numbers)
    for config in (student.config, student.generation_config):
        for name, value in in_config(config.to_dict(), lambda index: numbers.get(index, index)).items():
            setattr(config, name, value)
    student.config.vocab_size = len(numbers)
    return student
