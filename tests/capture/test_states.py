"""What layers keep while they are traced: several states of a kind, told apart by number."""

import pytest
import torch

from qexport.capture.attention import GraphCache, ProbeCache
from qexport.capture.kept import kept_in, kept_ports
from qexport.errors import CaptureError


def filled(*shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def test_states_are_numbered_where_a_layer_has_several_of_a_kind():
    probe = ProbeCache(2)
    for number, width in ((1, 3), (0, 4)):
        probe.update_conv_state(filled(2, 5, 9), 0, state_idx=number, conv_kernel_size=width)
    probe.update(filled(2, 1, 9, 8), filled(2, 1, 9, 8), 0)
    probe.update_recurrent_state(filled(2, 6), 0)
    probe.update_conv_state(filled(2, 5, 9), 1, conv_kernel_size=4)
    layers = [kept_in(probe.found[number]) for number in range(2)]
    named = [[f"{number}.{kept.role}" for kept in layer] for number, layer in enumerate(layers)]
    ports = kept_ports(named, layers, "past")
    keys = ["past_key_values.0.key", "past_key_values.0.value"]
    assert [p.name for p in ports] == [*keys, "past_conv.0.0", "past_conv.0.1", "past_recurrent.0", "past_conv.1"]
    assert [p.dims[1:] for p in ports[2:]] == [(5, 3), (5, 2), (6,), (5, 3)]


def test_each_of_them_goes_on_from_its_own_past():
    past = {"conv": filled(1, 2, 3), "conv.1": filled(1, 2, 2) - 9, "recurrent": filled(1, 4)}
    cache, new = GraphCache([past]), -filled(1, 2, 1) - 1
    seconds = cache.update_conv_state(new, 0, state_idx=1)
    assert torch.equal(seconds, torch.cat([past["conv.1"], new], -1))
    with pytest.raises(CaptureError, match="never updated the cache of layer 0"):
        cache.present()
    cache.update_conv_state(new, 0)
    after = cache.update_recurrent_state(cache.get_recurrent_state(0) + 1, 0)
    inputs, others, state = cache.present()
    assert torch.equal(inputs, torch.cat([past["conv"], new], -1)[..., 1:])
    assert torch.equal(others, seconds[..., 1:]) and torch.equal(state, after)
    with pytest.raises(CaptureError, match="one layer updates its state twice"):
        cache.update_conv_state(new, 0, state_idx=1)


def test_keys_that_are_values_too_are_kept_once():
    probe, new = ProbeCache(1), filled(1, 1, 2, 4)
    probe.update(new, new, 0)
    assert [kept.role for kept in kept_in(probe.found[0])] == ["key"]
    cache = GraphCache([{"key": -filled(1, 1, 3, 4)}])
    keys, values = cache.update(new, new, 0)
    assert keys is values and torch.equal(keys, torch.cat([-filled(1, 1, 3, 4), new], 2))
    assert len(cache.present()) == 1 and cache.present()[0] is keys
