"""The keys under which the store keeps measured values: everything that a value depends on, each a typed field."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossKey:
    """What a stored loss is of. Two equal ones have the same loss on the same machine."""

    model: str  # fingerprint
    tokens: str  # hash of the token set
    loss: str
    dtype: str  # the compute dtype and the kind of device
    treatment: str = ""  # a repair applied inside the search; none yet applied is the empty string
