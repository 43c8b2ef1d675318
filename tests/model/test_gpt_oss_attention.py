"""Attention as gpt-oss has it, against transformers' own: sinks, biases and windows, in fp64."""

import pytest
import torch

from mst_train.attention import select_attention
from mst_train.config import ModelConfig
from mst_train.model.rope import rotary_angles
from mst_train.model.transformer import SelfAttention
from mst_train.mst import Scores

CPU = torch.device("cpu")
ROWS, SEQUENCE, WINDOW = 2, 23, 6
NAMES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "output",
}


def transformers_attention(layer_type):
    """Its eager attention of one layer, every parameter at random, and its mask."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(
        hidden_size=24,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        num_hidden_layers=1,
        sliding_window=WINDOW,
        layer_types=[layer_type],
        attn_implementation="eager",
    )
    theirs = gpt_oss.GptOssAttention(config, 0).double()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.5)
    distance = torch.arange(SEQUENCE)[:, None] - torch.arange(SEQUENCE)
    reach = WINDOW if layer_type == "sliding_attention" else SEQUENCE
    hidden = (distance < 0) | (distance >= reach)
    mask = torch.zeros(SEQUENCE, SEQUENCE, dtype=torch.float64)
    return theirs, mask.masked_fill(hidden, torch.finfo(torch.float64).min)[None, None]


@pytest.mark.parametrize("kernel", ["cpu", "tiled", "reference"])
@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
def test_result_and_gradients(layer_type, kernel):
    theirs, mask = transformers_attention(layer_type)
    settings = {"qkv_bias": True, "output_bias": True, "attention_sinks": True, "head_size": 8}
    config = ModelConfig(hidden_size=24, num_heads=6, num_kv_heads=2, **settings)
    window = WINDOW if layer_type == "sliding_attention" else None
    attention = select_attention(kernel, CPU, torch.float64).of(Scores(window, sinks=True))
    ours = SelfAttention(config, attention).double()
    weights = {"sinks": theirs.sinks.detach()}
    for name, mine in NAMES.items():
        for kind, parameter in getattr(theirs, name).named_parameters():
            weights[f"{mine}.{kind}"] = parameter.detach()
    ours.load_state_dict(weights)
    angles = rotary_angles(torch.arange(SEQUENCE), config, torch.float64)
    x, dy = torch.randn(2, ROWS, SEQUENCE, 24, dtype=torch.float64)

    def run_theirs(x):
        cos_and_sin = [t[None] for t in angles]
        return theirs(x, cos_and_sin, mask)[0]

    def run_ours(x):
        q, k, v = ours.project(x, *angles, queries=True)
        return ours.output(ours.attention(q, k, v, None, ours.sinks).flatten(2))

    found = []
    for run, module in ((run_theirs, theirs), (run_ours, ours)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.backward(dy)
        gradients = {name: p.grad for name, p in module.named_parameters()}
        found.append((y.detach(), leaf.grad, gradients))
    (y, dx, theirs_), (our_y, our_dx, ours_) = found
    expected = {"sinks": theirs_.pop("sinks")}
    for name, gradient in theirs_.items():
        module_name, kind = name.split(".")
        expected[f"{NAMES[module_name]}.{kind}"] = gradient
    torch.testing.assert_close((our_y, our_dx, ours_), (y, dx, expected), rtol=1e-11, atol=1e-11)
