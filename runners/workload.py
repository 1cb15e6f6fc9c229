"""The shared workload: few prompts, chosen so that every position a scheduler treats differently occurs."""

from __future__ import annotations

import random

from genmodel.runners.evidence import Request

BLOCK_SIZE = 32
"""KV block size of the in-process engines, in tokens: what the CPU kernels like best."""
GENERATED = 16
"""Tokens generated per request."""


def edge_tokens(vocab_size: int) -> tuple[int, ...]:
    """The ids at both ends of the vocabulary and of its halves: where padding and sharding go wrong."""
    return (0, vocab_size - 1, vocab_size // 2, vocab_size // 2 - 1, 1, vocab_size - 2)


def shared_workload(
    vocab_size: int, max_model_len: int, seed: int, block_size: int = BLOCK_SIZE
) -> tuple[Request, ...]:
    """Nine greedy requests and a sampled one, of deterministic pseudo-random tokens.

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
    greedy = [Request(name=name, prompt=prompt, max_tokens=GENERATED) for name, prompt in prompts.items()]
    sampled = Request(name="sampled", prompt=tokens(9), max_tokens=GENERATED, temperature=1.0, seed=seed + 1234)
    return (*greedy, sampled)
