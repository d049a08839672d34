"""Document groups: the portions of a token set in which plans are measured, dropped and stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from billhook.data import TokenSet

GROUPS = 16  # about so many a token set, so that a bad plan can go after a fraction of it
LEAST_TOKENS = 64  # of a group


@dataclass(frozen=True)
class DocumentGroup:
    """All rows of some documents. `counted`: which positions are tokens and not padding."""

    documents: tuple[int, ...]
    ids: torch.Tensor  # [rows, time]
    counted: torch.Tensor  # [rows, time], bool
    targets: torch.Tensor  # [tokens]: the next token, -100 where there is none
    of: torch.Tensor  # [tokens]: index into `documents`

    @property
    def tokens(self) -> int:
        return len(self.targets)


def document_groups(tokens: TokenSet, device: torch.device) -> list[DocumentGroup]:
    """The documents of a token set, those with long rows first, so that little is padding."""
    rows: dict[int, list[int]] = {}
    for row, document in enumerate(tokens.documents):
        rows.setdefault(document, []).append(row)
    longest = {d: max(tokens.lengths[r] for r in of) for d, of in rows.items()}
    size = max(LEAST_TOKENS, tokens.tokens // GROUPS)
    groups: list[list[int]] = []
    held = 0
    for document in sorted(rows, key=lambda d: (-longest[d], d)):
        if not groups or held >= size:
            groups.append([])
            held = 0
        groups[-1].append(document)
        held += sum(tokens.lengths[r] for r in rows[document])
    return [_group(tokens, documents, rows, device) for documents in groups]


def _group(tokens: TokenSet, documents: list[int], rows: dict[int, list[int]], device: torch.device) -> DocumentGroup:
    picked = [row for document in documents for row in rows[document]]
    lengths = torch.tensor([tokens.lengths[r] for r in picked])
    time = int(lengths.max())
    ids = tokens.rows[picked, :time]
    places = torch.arange(time)
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    targets[places >= (lengths - 1)[:, None]] = -100
    counted = places < lengths[:, None]
    of = torch.tensor([documents.index(tokens.documents[r]) for r in picked])[:, None].expand_as(ids)
    return DocumentGroup(
        tuple(documents), ids.to(device), counted.to(device), targets[counted].to(device), of[counted].to(device)
    )
