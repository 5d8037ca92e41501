"""Fused attention in Triton: one op per file, each beside the table of its block sizes.

All ops share one way to say what a query sees. A *span* is int32 [B, T, 2]: query t of batch entry
b sees the keys n with ``span[b, t, 0] <= n < span[b, t, 1]``. Causal attention, a cache, left
padding, packed documents, sliding windows and chunks are all spans, so no kernel knows about any
of them. Both ends must not decrease from one query to the next: then the keys of a tile of
queries, and the queries of a tile of keys, are ranges too. A query with an empty span has output 0.

``reference`` says in plain torch what the ops compute; ``device`` says where they run.
"""
