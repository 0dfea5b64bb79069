"""What the decoder of an encoder-decoder is told of padding in its source."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

_NAME = "encoder_attention_mask"


@contextmanager
def telling_decoder(model: PreTrainedModel, instead: Tensor | None = None) -> Iterator[list[Tensor]]:
    """Watch how a model tells its decoder which places of the source are padding, or tell it in the model's place.

    An encoder of sound makes fewer places than its source has. Each model counts them in a way of its own: in its
    encoder, in front of its decoder, or not at all.

    Args:
        instead: [batch, places], what the decoder is told whatever the model says.

    Yields:
        what the model said in each call, [batch, places] as it has it; nothing of calls without a mask.
    """
    said: list[Tensor] = []

    def tell(decoder, arguments, named):
        if isinstance(mask := named.get(_NAME), Tensor):
            said.append(mask)
        return (arguments, named) if instead is None else (arguments, {**named, _NAME: instead})

    handle = model.get_decoder().register_forward_pre_hook(tell, with_kwargs=True)
    try:
        yield said
    finally:
        handle.remove()
