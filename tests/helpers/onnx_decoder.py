"""A hand-made decoder in ONNX with random weights: the interface of an export, at a size that runs in a millisecond.

Two layers of grouped-query attention at opset 23, left padding through attention_mask, separate past and present. The
linears are quantized in the forms that exports use, so that optimized graphs hold fused kernels.
"""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoTokenizer

from helpers.tokenizer_files import write_word_tokenizer
from qexport.artifact import manifest as manifests

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
ACCURACY = "session.qdq_matmulnbits_accuracy_level"
EOS = 2


class Graph:
    """Nodes and initializers being collected, with names that stay readable in errors."""

    def __init__(self, seed: int):
        self.nodes, self.initializers, self.rng = [], [], np.random.default_rng(seed)

    def op(self, kind: str, inputs: list[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def const(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def int4(self, name: str, codes: np.ndarray) -> str:
        tensor = helper.make_tensor(name, TensorProto.INT4, codes.shape, codes.ravel().tolist())
        self.initializers.append(tensor)
        return name


def write_tiny_decoder(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 97,
    max_length: int = 256,
    up_scheme: str = "w8a8_static",
    shared_cache: bool = False,
    positions: bool = True,
    last_logits: bool = False,
    seed: int = 0,
) -> manifests.Manifest:
    """Write model.onnx, model.onnx.data, manifest.json and config.json into `folder`; return the manifest.

    q, k, v and o are int4 in groups of 32 (q with a bias), up is int8 with static uint8 activations, down is float.
    shared_cache: GroupQueryAttention on one buffer for past and present, which takes no left padding, instead of
    Attention; the weights and the function are the same. positions: without, there is no position_ids, and the order
    of tokens tells nothing. Absolute positions are embedded too, as rotary ones would hide a shift. last_logits: the
    logits of the last token alone, [batch, 1, vocab].
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph, dim = Graph(seed), hidden // heads
    linears: list[manifests.LinearEntry] = []
    rng = graph.rng

    def linear(name: str, x: str, n: int, k: int, scheme: str, bias: bool = False) -> str:
        value, node = f"{name}_product" if bias else f"{name}_out", None
        weight = rng.standard_normal((k, n)).astype(np.float32) / k**0.5
        if scheme == "w4a16_g32":
            scale = np.abs(weight.reshape(k // 32, 32, n)).max(1) / 7
            codes = np.rint(weight / scale.repeat(32, axis=0)).astype(np.int8)
            inputs = [graph.int4(f"{name}_codes", codes), graph.const(f"{name}_scale", scale)]
            weight_value = graph.op("DequantizeLinear", inputs, f"{name}_weight", axis=0, block_size=32)
        elif scheme == "w8a8_static":
            scale = np.abs(weight).max(0) / 127
            inputs = [
                graph.const(f"{name}_codes", np.rint(weight / scale).astype(np.int8)),
                graph.const(f"{name}_scale", scale),
            ]
            weight_value = graph.op("DequantizeLinear", inputs, f"{name}_weight", axis=1)
            grid = [graph.const(f"{name}_xs", np.float32(4 / 127)), graph.const(f"{name}_xz", np.uint8(128))]
            codes_value = graph.op("QuantizeLinear", [x, *grid], f"{name}_xq")
            x = graph.op("DequantizeLinear", [codes_value, *grid], f"{name}_xd")
        else:
            weight_value = graph.const(f"{name}_weight", weight)
        graph.op("MatMul", [x, weight_value], value)
        node = graph.nodes[-1].name
        if bias:
            value = graph.op(
                "Add", [value, graph.const(f"{name}_bias", rng.standard_normal(n).astype(np.float32))], f"{name}_out"
            )
        kernel = {"w4a16_g32": "MatMulNBits", "w8a8_static": "MatMulIntegerToFloat"}.get(scheme, "MatMul")
        linears.append(
            manifests.LinearEntry(
                name=name,
                block=name.rsplit(".", 1)[0] if "." in name else "",
                scheme=scheme,
                output=value,
                node=node,
                kernel=kernel,
                shape=(n, k),
            )
        )
        return value

    def norm(x: str, name: str) -> str:
        weight = graph.const(f"{name}_weight", np.ones(hidden, np.float32))
        return graph.op("RMSNormalization", [x, weight], f"{name}_out", axis=-1, epsilon=1e-5)

    mask, lengths = (None, _lengths(graph)) if shared_cache else (_mask(graph), None)
    angles = np.outer(np.arange(max_length), 10000.0 ** (-np.arange(0, dim, 2) / dim)).astype(np.float32)
    rotary = [graph.const("cos", np.cos(angles)), graph.const("sin", np.sin(angles)), "position_ids"]
    table = graph.const("embedding", rng.standard_normal((vocab, hidden)).astype(np.float32))
    x = graph.op("Gather", [table, "input_ids"], "embedded")
    if positions:
        places = graph.const("places", 0.3 * rng.standard_normal((max_length, hidden)).astype(np.float32))
        x = graph.op("Add", [x, graph.op("Gather", [places, "position_ids"], "placed")], "started")
    outputs = []
    for i in range(layers):
        block = f"layers.{i}"
        h = norm(x, f"{block}.norm1")
        q = linear(f"{block}.q", h, hidden, hidden, "w4a16_g32", bias=True)
        k = linear(f"{block}.k", h, kv_heads * dim, hidden, "w4a16_g32")
        v = linear(f"{block}.v", h, kv_heads * dim, hidden, "w4a16_g32")
        if positions:
            q = graph.op("RotaryEmbedding", [q, *rotary], f"{block}.q_rot", num_heads=heads)
            k = graph.op("RotaryEmbedding", [k, *rotary], f"{block}.k_rot", num_heads=kv_heads)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        present = [f"present.{i}.key", f"present.{i}.value"]
        if shared_cache:
            kind, inputs, counts = "GroupQueryAttention", [q, k, v, *past, *lengths], ("num_heads", "kv_num_heads")
        else:
            kind, inputs, counts = "Attention", [q, k, v, mask, *past], ("q_num_heads", "kv_num_heads")
        graph.nodes.append(
            helper.make_node(
                kind,
                inputs,
                [f"{block}.context", *present],
                name=f"node_{block}.attention",
                domain="com.microsoft" if shared_cache else "",
                **dict(zip(counts, (heads, kv_heads), strict=True)),
            )
        )
        outputs += present
        x = graph.op("Add", [x, linear(f"{block}.o", f"{block}.context", hidden, hidden, "w4a16_g32")], f"{block}.mid")
        up = linear(f"{block}.up", norm(x, f"{block}.norm2"), 2 * hidden, hidden, up_scheme)
        # Not Relu: behind one, ONNX Runtime leaves the integer MatMul unfused.
        act = graph.op("Mul", [up, graph.op("Sigmoid", [up], f"{block}.gate")], f"{block}.act")
        down = linear(f"{block}.down", act, hidden, 2 * hidden, "float")
        x = graph.op("Add", [x, down], f"{block}.hidden")
    if last_logits:
        x = graph.op("Gather", [x, graph.const("end", np.array([-1]))], "last_hidden", axis=1)
    logits = linear("lm_head", norm(x, "final"), vocab, hidden, "float")
    graph.op("Identity", [logits], "logits")

    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", INT64, ["batch_size", "sequence_length"]),
        info("attention_mask", INT64, ["batch_size", "total_sequence_length"]),
    ]
    if positions:
        inputs.append(info("position_ids", INT64, ["batch_size", "sequence_length"]))
    for i in range(layers):
        inputs += [
            info(f"past_key_values.{i}.{part}", FLOAT, ["batch_size", kv_heads, "past_sequence_length", dim])
            for part in ("key", "value")
        ]
    results = [info("logits", FLOAT, ["batch_size", 1 if last_logits else "sequence_length", vocab])]
    results += [info(name, FLOAT, ["batch_size", kv_heads, "total_sequence_length", dim]) for name in outputs]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "tiny", inputs, results, graph.initializers),
        opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=128,
    )
    result = manifests.Manifest(
        target="cpu",
        kind="decoder",
        session={ACCURACY: "0"},
        linears=tuple(linears),
        blocks=tuple(manifests.BlockEntry(name=f"layers.{i}", output=f"layers.{i}.hidden") for i in range(layers)),
        settings={
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "head_dim": dim,
            "vocab_size": vocab,
            "past_present_share_buffer": shared_cache,
        },
    )
    manifests.save(result, folder)
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": max_length,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return result


def _mask(graph: Graph) -> str:
    """[batch, 1, sequence, total], true where a query may look.

    A query on padding keeps its own key: a row of nothing but false would be NaN, and NaN survives a weight of zero.
    """
    zero, one = graph.const("zero", np.int64(0)), graph.const("one", np.int64(1))
    last, heads = graph.const("last", np.array([1])), graph.const("heads", np.array([1, 2]))
    total = graph.op("Gather", [graph.op("Shape", ["attention_mask"], "mask_shape"), one], "total_sequence_length")
    length = graph.op("Gather", [graph.op("Shape", ["input_ids"], "ids_shape"), one], "length")
    past = graph.op("Sub", [total, length], "past_sequence_length")
    keys = graph.op("Range", [zero, total, one], "keys")
    queries = graph.op("Unsqueeze", [graph.op("Range", [past, total, one], "queries"), last], "query_column")
    causal = graph.op("LessOrEqual", [keys, queries], "causal")
    real = graph.op("Unsqueeze", [graph.op("Cast", ["attention_mask"], "real", to=BOOL), heads], "real_keys")
    allowed = graph.op("And", [causal, real], "allowed")
    return graph.op("Or", [allowed, graph.op("Equal", [keys, queries], "own")], "mask")


def _lengths(graph: Graph) -> list[str]:
    """Index of each row's last token [batch], and the length of the longest row, as GroupQueryAttention takes them."""
    one, axis = graph.const("one", np.int64(1)), graph.const("axis", np.array([1]))
    last = graph.op("Sub", [graph.op("ReduceSum", ["attention_mask", axis], "tokens", keepdims=0), one], "last")
    total = graph.op("Gather", [graph.op("Shape", ["attention_mask"], "mask_shape"), one], "total_sequence_length")
    return [graph.op("Cast", [value], f"{value}_int32", to=TensorProto.INT32) for value in (last, total)]


def write_talking_decoder(folder: Path, template: str, context: int) -> Path:
    """One with a tokenizer of letters, a chat template and a context of so many tokens."""
    write_tiny_decoder(folder, up_scheme="float")
    write_word_tokenizer(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["settings"]["max_position_embeddings"] = context
    (folder / "manifest.json").write_text(json.dumps(manifest))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
