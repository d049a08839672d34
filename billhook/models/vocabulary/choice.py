"""Which tokens go: those whose loss costs a text the fewest tokens, one after another."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping

from billhook.core.errors import BudgetError, option
from billhook.models.vocabulary.entries import Vocabulary


def tokens_to_keep(vocabulary: Vocabulary, uses: Mapping[int, int], count: int | None = None) -> list[int]:
    """Return the ids that stay when `count` rows are removed, ascending; None: all that the text does not use.

    `uses`: how often a text has each token. The next to go is always the token without which the text has the fewest
    tokens more: each use becomes its parts, which are used as often then. A use that becomes one other token counts as
    one more. Of equal ones the last in the vocabulary goes first. A token that others are merged from stays as long as
    they do. Raises BudgetError where fewer can be removed.
    """
    used, needed = Counter(uses), Counter(part for parts in vocabulary.needs.values() for part in parts)
    gone: set[int] = set()

    def price(token: int) -> int:
        return used[token] * max(1, len(vocabulary.parts[token]) - 1)

    def use(token: int, times: int) -> None:
        used[token] += times
        if token in gone:
            for part in vocabulary.parts[token]:
                use(part, times)

    waiting = [(price(token), -token) for token in vocabulary.parts if not needed[token]]
    heapq.heapify(waiting)
    while waiting and (count is None or len(gone) < count):
        cost, token = waiting[0][0], -waiting[0][1]
        if cost < price(token):  # what it is a part of went meanwhile
            heapq.heapreplace(waiting, (price(token), -token))
            continue
        if count is None and cost:
            break
        heapq.heappop(waiting)
        gone.add(token)
        for part in vocabulary.parts[token]:
            use(part, used[token])
        for part in vocabulary.needs.get(token, ()):
            needed[part] -= 1
            if not needed[part] and part in vocabulary.parts:
                heapq.heappush(waiting, (price(part), -part))
    if count is not None and len(gone) < count:
        raise beyond(vocabulary, count, len(gone))
    return [token for token in range(vocabulary.rows) if token not in gone]


def beyond(vocabulary: Vocabulary, count: int, most: int) -> BudgetError:
    """The refusal of a share that reaches special tokens, bytes, and what these are made of."""
    share = 100 * most // vocabulary.rows
    return BudgetError(
        f"{count:,} of {vocabulary.rows:,} rows cannot be removed: special and added tokens, bytes and what those need "
        f"stay, {vocabulary.rows - most:,} in all. Remove at most {share}%: {option('remove', f'{share}%')}"
    )
