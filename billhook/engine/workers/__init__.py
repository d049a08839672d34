"""Several workers that share one search: the document groups of a token set are divided among them.

Streams, references and early abandoning stay whole in each worker, and only sums of nats travel (`messages`). The
coordinator is a worker too. It alone chooses pieces and writes the store.
"""
