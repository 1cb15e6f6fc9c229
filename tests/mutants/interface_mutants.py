"""Mistakes in what a model is handed and when it is built: embeddings, arguments, random numbers, prefixes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from genmodel.modeling._vllm import engine_config
from mutants.dense_mutants import mutant

# Embeddings in the place of token ids --------------------------------------------------------------------


@mutant(caught_by="interface.inputs_embeds", reports="#27583", alone=True)
def embeddings_ignored(model: Any) -> None:
    """forward takes inputs_embeds, and embeds the token ids, which are None then."""
    forward = model.forward

    def ignoring(input_ids: Any, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:  # noqa: ARG001
        hidden: Tensor = forward(input_ids, positions)
        return hidden

    model.forward = ignoring


@mutant(caught_by="interface.inputs_embeds", reports="#27583", alone=True)
def embeddings_scaled_for_token_ids_only(model: Any) -> None:
    """Embeddings are multiplied in forward where it makes them, and taken as they are where they are given."""
    forward = model.forward

    def scaling(input_ids: Any, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x = 1.5 * model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        hidden: Tensor = forward(None, positions, inputs_embeds=x)
        return hidden

    model.forward = scaling


@mutant(caught_by="interface.prompt_embeddings", reports="#27583", alone=True)
def embeddings_scaled_in_the_engine(model: Any) -> None:
    """The same the other way round, and inside vLLM alone: plain PyTorch is right."""
    if engine_config() is None:
        return
    forward = model.forward

    def scaling(input_ids: Any, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x = None if inputs_embeds is None else 1.01 * inputs_embeds
        hidden: Tensor = forward(input_ids, positions, inputs_embeds=x)
        return hidden

    model.forward = scaling


# Random numbers ------------------------------------------------------------------------------------------


@mutant(caught_by="interface.random_state", reports="#5657", alone=True)
def buffer_drawn_at_random(model: Any) -> None:
    """A projection that is in no checkpoint is drawn when the model is built."""
    model.register_buffer("jitter", 0.01 * torch.randn(model.config.hidden_size), persistent=False)
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) + model.jitter.to(x.dtype)


@mutant(caught_by="interface.random_state", reports="#5657", alone=True)
def permutation_drawn_by_numpy(model: Any) -> None:
    """Channels are permuted by a plain attribute, which no state dict knows of."""
    model.order = np.random.permutation(model.config.hidden_size)  # noqa: NPY002 - that is the mistake
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) + 0.01 * forward(x)[..., model.order]


@mutant(caught_by="logits.values", reports="#5657", alone=True, at="norm")
def buffer_drawn_in_the_engine(model: Any) -> None:
    """Plain PyTorch draws nothing; in vLLM each engine has a buffer of its own."""
    if engine_config() is None:
        return
    model.register_buffer("jitter", 0.01 * torch.randn(model.config.hidden_size), persistent=False)
    forward = model.norm.forward
    model.norm.forward = lambda x: forward(x) + model.jitter


# Arguments -----------------------------------------------------------------------------------------------


@mutant(caught_by="interface.arguments_kept", reports="#12038", alone=True)
def positions_changed_in_place(model: Any) -> None:
    """An offset is added to the caller's positions, and taken off for the model."""
    forward = model.forward

    def moving(input_ids: Any, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        positions += 1
        hidden: Tensor = forward(input_ids, positions - 1, inputs_embeds=inputs_embeds)
        return hidden

    model.forward = moving


@mutant(caught_by="interface.arguments_kept", reports="#12038", alone=True)
def token_ids_changed_in_place(model: Any) -> None:
    """Token ids are moved into a shifted vocabulary where they lie."""
    embed = model.embed_tokens.forward

    def shifting(input_ids: Tensor) -> Tensor:
        embedded: Tensor = embed(input_ids)
        input_ids.sub_(1)
        return embedded

    model.embed_tokens.forward = shifting


@mutant(caught_by="interface.arguments_kept", reports="#12038", alone=True)
def embeddings_changed_in_place(model: Any) -> None:
    """The residual stream begins in the caller's tensor, and grows in it."""
    forward = model.forward

    def growing(input_ids: Any, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x = model.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        x *= 2.0
        hidden: Tensor = forward(None, positions, inputs_embeds=x)
        return hidden

    model.forward = growing


@mutant(caught_by="interface.arguments_kept", reports="#12038", alone=True)
def hidden_states_changed_in_place(model: Any) -> None:
    """compute_logits divides the caller's hidden states by a temperature."""
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden.div_(1.5))


@mutant(caught_by="interface.attention_prefixes", reports="#3924", alone=True)
def prefix_without_a_number(model: Any) -> None:
    """One layer has a name of its own in which vLLM finds no number."""
    model.layers[0].attn.attn.prefix = "smear"
