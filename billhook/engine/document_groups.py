"""Document groups: the parts of a token set in which plans are measured, dropped and stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from billhook.data.token_sets import TokenSet
from billhook.models.accelerator.spreading import copied

GROUPS = 16  # about how many a token set has, so that a bad plan is dropped after a fraction of it
LEAST_TOKENS = 64  # per group


@dataclass(frozen=True)
class DocumentGroup:
    """All rows of a few documents.

    - `counted`: which positions are tokens and not padding.
    - `read`: the positions that the head reads: those counted; for choices, those before the tokens of a choice.

    What chooses positions is a list of numbers, not a mask: the CPU need not wait for the device to count a mask.
    """

    documents: tuple[int, ...]
    ids: torch.Tensor  # [rows, time]
    counted: torch.Tensor  # [tokens]: numbers of positions, row after row
    read: torch.Tensor  # [read]: numbers of positions
    targets: torch.Tensor  # [read]: the next token, -100 where there is none
    document_of: torch.Tensor  # [tokens]: index into `documents`; on the CPU
    rows: tuple[int, ...]  # of the token set; those of one document stand together
    row_of: torch.Tensor  # [read]: index into `rows`; on the CPU
    items: tuple[tuple[slice, int], ...] = ()  # of choices: where in `rows` each document is, and its right one

    @property
    def tokens(self) -> int:
        return len(self.document_of)

    def tokens_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the counted positions: [tokens, ...] of [rows, time, ...]."""
        return values.flatten(0, 1).index_select(0, copied(self.counted, values.device))

    def read_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values of the positions that the head reads: [read, ...] of [rows, time, ...]."""
        return values.flatten(0, 1).index_select(0, copied(self.read, values.device))


def document_groups(
    tokens: TokenSet,
    device: torch.device,
    boundary: int | None = None,
    workers: int = 1,
    head: torch.device | None = None,
) -> list[DocumentGroup]:
    """Return the documents of a token set in groups, those with long rows first, so that little is padding.

    - `boundary`: documents with rows longer than that are in groups of their own (`rope_boundary`).
    - `workers`: that share the groups, so that there must be more of them.
    - `head`: where targets are, if not on `device`.
    """
    rows: dict[int, list[int]] = {}
    for row, document in enumerate(tokens.documents):
        rows.setdefault(document, []).append(row)
    longest = {d: max(tokens.lengths[r] for r in own_rows) for d, own_rows in rows.items()}
    least = max(LEAST_TOKENS, tokens.tokens // (GROUPS * workers))
    groups: list[list[int]] = []
    size = 0
    for document in sorted(rows, key=lambda d: (-longest[d], d)):
        crosses = bool(groups) and boundary is not None and longest[document] <= boundary < longest[groups[-1][0]]
        if not groups or size >= least or crosses:
            groups.append([])
            size = 0
        groups[-1].append(document)
        size += sum(tokens.lengths[r] for r in rows[document])
    return [_group(tokens, documents, rows, (device, head or device)) for documents in groups]


def _group(
    tokens: TokenSet, documents: list[int], rows: dict[int, list[int]], devices: tuple[torch.device, torch.device]
) -> DocumentGroup:
    picked = [row for document in documents for row in rows[document]]
    lengths = torch.tensor([tokens.lengths[r] for r in picked])
    time = int(lengths.max())
    ids = tokens.rows[picked, :time]
    places = torch.arange(time)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    targets[places >= (lengths - 1)[:, None]] = -100
    counted = places < lengths[:, None]
    read, items = counted, []
    if tokens.choices is not None:
        first = torch.tensor([tokens.choices.first[r] for r in picked])[:, None]
        read = (first - 1 <= places) & (places < (lengths - 1)[:, None])
        for document in documents:
            start = picked.index(rows[document][0])
            items.append((slice(start, start + len(rows[document])), tokens.choices.gold[document]))
    of = torch.tensor([documents.index(tokens.documents[r]) for r in picked])[:, None].expand_as(ids)
    row_of = torch.arange(len(picked))[:, None].expand_as(ids)
    return DocumentGroup(
        tuple(documents), ids.to(devices[0]), _numbers(counted).to(devices[0]), _numbers(read).to(devices[0]),
        targets[read].to(devices[1]), of[counted], tuple(picked), row_of[read], tuple(items),
    )  # fmt: skip


def _numbers(mask: torch.Tensor) -> torch.Tensor:
    """Return the numbers of the positions where a mask [rows, time] is True, row after row."""
    return mask.flatten().nonzero()[:, 0]
