"""Plain English words for questions: most are one token of most tokenizers."""

from __future__ import annotations

from random import Random

NOUNS = (
    "apple", "bridge", "butter", "candle", "castle", "circle", "cloud", "coffee", "corner", "cotton", "dinner",
    "doctor", "dragon", "engine", "farmer", "father", "finger", "flower", "forest", "garden", "glass", "gold",
    "hammer", "honey", "horse", "island", "jacket", "kitchen", "ladder", "lemon", "letter", "market", "metal",
    "mirror", "money", "mother", "mountain", "needle", "number", "ocean", "office", "orange", "paper", "pencil",
    "pepper", "picture", "planet", "pocket", "potato", "prince", "rabbit", "ribbon", "river", "rocket", "salt",
    "school", "shadow", "silver", "sister", "soldier", "spring", "square", "stone", "summer", "sugar", "table",
    "teacher", "temple", "tiger", "train", "valley", "village", "wagon", "water", "window", "winter", "yellow",
)  # fmt: skip
NAMES = (
    "Adam", "Alice", "Anna", "Ben", "Carl", "Clara", "David", "Diana", "Edward", "Emma", "Frank", "George",
    "Grace", "Hannah", "Henry", "Jack", "James", "Jane", "Julia", "Kate", "Laura", "Leo", "Lucy", "Maria",
    "Martin", "Mary", "Nina", "Oliver", "Oscar", "Paul", "Peter", "Rachel", "Robert", "Rose", "Ruth", "Sam",
    "Sarah", "Simon", "Sophie", "Tom",
)  # fmt: skip
THINGS = ("password", "favorite", "present", "secret")

_WHO = ("The old bus", "A small boat", "The morning tram", "A grey cat", "The wind", "A group of visitors", "The post",
        "A tall man", "The band", "The light")  # fmt: skip
_DID = ("went past", "stopped near", "came slowly to", "was late at", "turned away from", "rested beside", "waited at")
_WHERE = ("the harbour", "the library", "the hill", "the station", "the museum", "the old mill", "the town hall")
_WHEN = ("again.", "before noon.", "on Monday.", "in the rain.", "as usual.", "that evening.", "without a sound.")


def filler(draw: Random, sentences: int) -> str:
    """Return so many sentences that say nothing about a person or a thing of a question; empty for none."""
    parts = [[draw.choice(words) for words in (_WHO, _DID, _WHERE, _WHEN)] for _ in range(sentences)]
    return " ".join(map(" ".join, parts))
