"""What a decoder is told of padding in its source is heard, or said in the model's place."""

import torch
from torch import nn

from qexport.models.source_mask import telling_decoder


class Decoder(nn.Module):
    def forward(self, x, encoder_attention_mask=None):
        return x if encoder_attention_mask is None else x * encoder_attention_mask


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = Decoder()

    def get_decoder(self):
        return self.decoder

    def forward(self, x, mask=None):
        return self.decoder(x, encoder_attention_mask=None if mask is None else mask[:, ::2])


def test_it_is_heard_or_replaced_and_left_alone_behind():
    model, x, mask = Model(), torch.ones(1, 2), torch.tensor([[1, 1, 0, 0]])
    with telling_decoder(model) as said:
        assert model(x).tolist() == [[1, 1]] and not said
        assert model(x, mask).tolist() == [[1, 0]] and said[0].tolist() == [[1, 0]]
    with telling_decoder(model, torch.tensor([[0, 1]])) as said:
        assert model(x).tolist() == [[0, 1]] == model(x, mask).tolist() and said[0].tolist() == [[1, 0]]
    assert model(x).tolist() == [[1, 1]]
