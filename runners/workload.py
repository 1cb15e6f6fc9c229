"""The shared workload: few prompts, chosen so that every position a scheduler treats differently occurs."""

from __future__ import annotations

import random

from genmodel.runners.evidence import Request

BLOCK_SIZE = 32
"""KV block size of the in-process engines, in tokens: what the CPU kernels like best."""
GENERATED = 16
"""Tokens that the longest request generates, to the end of what the model takes; the others end a step apart, before.

So the steps of decoding have as many rows as there are requests, then one fewer each: odd numbers too, which ranks
that deal rows out cannot share evenly.
"""
LONGEST_LIVED = (
    "longest",
    "long_prefix_a",
    "long_prefix_b",
    "block_filling",
    "block_crossing",
    "sampled",
    "one_token",
    "two_tokens",
    "short",
    "vocabulary_edges",
    "filler",
)
"""Which requests generate most, in this order: those that the cache's blocks are there for."""
RANKS = 8
"""The rows of the first step, all prompts together, are one fewer than a multiple of this, where they fit one step."""


def edge_tokens(vocab_size: int) -> tuple[int, ...]:
    """The ids at both ends of the vocabulary and of its halves: where padding and sharding go wrong."""
    return (0, vocab_size - 1, vocab_size // 2, vocab_size // 2 - 1, 1, vocab_size - 2)


def shared_workload(
    vocab_size: int, max_model_len: int, seed: int, block_size: int = BLOCK_SIZE
) -> tuple[Request, ...]:
    """Ten greedy requests and a sampled one, of deterministic pseudo-random tokens.

    Args:
        vocab_size: tokens are drawn uniformly from all of it, its last ids included.
        max_model_len: longest sequence the model takes; prompts that would not fit are shortened.
        seed: of the tokens.
        block_size: KV block size; "block_crossing" starts in one block and decodes into the next.

    Raises:
        ValueError: if max_model_len leaves no room to generate.
    """
    room = max_model_len - GENERATED
    if room < 2:
        raise ValueError(f"max_position_embeddings={max_model_len} leaves no room for {GENERATED} generated tokens")
    rng = random.Random(seed)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(max(1, min(count, room))))

    prefix = tokens(2 * block_size + 5)

    def after_prefix(count: int) -> tuple[int, ...]:
        return (prefix[: max(1, room - count)] + tokens(count))[:room]

    prompts = {
        "one_token": tokens(1),
        "two_tokens": tokens(2),
        "vocabulary_edges": edge_tokens(vocab_size)[:room],
        "short": tokens(13),
        "block_crossing": tokens(block_size - 3),
        "block_filling": tokens(block_size),
        "long_prefix_a": after_prefix(7),
        "long_prefix_b": after_prefix(11),
        "longest": tokens(room),
    }
    prompts["sampled"] = tokens(9)
    prompts["filler"] = tokens(RANKS - 1 - sum(map(len, prompts.values())) % RANKS or RANKS)
    return tuple(
        Request(
            name=name,
            prompt=prompt,
            max_tokens=GENERATED - LONGEST_LIVED.index(name),
            temperature=1.0 if name == "sampled" else 0.0,
            seed=seed + 1234 if name == "sampled" else None,
        )
        for name, prompt in prompts.items()
    )
