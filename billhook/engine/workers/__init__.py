"""Several workers that share one search: the document groups of a token set are divided among them.

Where groups are few, several workers share one, and divide its plans (`columns`).

Streams, references and early abandoning stay whole in each worker, and only sums of nats travel (`messages`). The
coordinator is a worker too. It alone chooses pieces and writes the store.
"""
