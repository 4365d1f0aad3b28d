"""transformers' cache layers for linear attention, with what they lack for models of ours."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionLayer


class KDACacheLayer(LinearAttentionLayer):
    """A ``LinearAttentionLayer`` whose documents can be selected and repeated."""

    is_croppable: Any = False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "crop cannot take tokens back out of a KDA layer's recurrent state, "
            f"got tokens_to_remove={tokens_to_remove}"
        )

    def batch_select_indices(self, indices: Any) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                if state is not None:
                    states[index] = state.repeat_interleave(repeats, dim=0)


class CountingKDACacheLayer(KDACacheLayer, CacheLayerMixin):
    """The same for a model without attention layers: it knows how many tokens went by.

    transformers asks a cache for its length and has only attention layers answer; without one a
    model could not generate.
    """

    def __init__(self, number_of_states: int = 1) -> None:
        super().__init__(number_of_states)
        self.keys = self.values = None
        self.seen_tokens = 0

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("a KDA layer keeps no keys and values")

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0


def upgrade_cache(cache: Cache) -> Cache:
    """Replace the unused linear-attention layers of a cache by ours, in place.

    Raises:
        ValueError: the cache was made without the model's config and knows no such layers.
    """
    if not cache.layers:
        raise ValueError(
            f"past_key_values must be made for the model, as {type(cache).__name__}"
            f"(config=model.config); got {type(cache).__name__} without layers"
        )
    ours = CountingKDACacheLayer if all(cache.is_linear) else KDACacheLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is LinearAttentionLayer and not any(layer.has_previous_state.values()):
            fresh = ours(layer.number_of_states)
            fresh.record_past = layer.record_past
            cache.layers[index] = fresh
    return cache


def count_tokens(cache: Cache, tokens: int) -> None:
    """Tell the cache's counting layers that a forward pass has gone by."""
    for layer in cache.layers:
        if isinstance(layer, CountingKDACacheLayer):
            layer.seen_tokens += tokens
