"""Small models on the local disk, one folder each, in the formats that engines read.

Weights are random with a fixed seed, so that two loads can be compared to the bit. Nothing here needs torch but
`pytorch`; a folder is written like its format's own tools write it (names, index, metadata).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPTS = ("the quick brown fox", "reads model weights")
_TEXT = "the quick brown fox jumps over the lazy dog, and reads model weights from a mount\n"
_VOCABULARY = 512
_HEAD = 64  # the smallest but one that vLLM's attention for CPUs has


def llama(folder: Path, *, hidden: int = 128, layers: int = 6, shards: int = 3) -> Path:
    """A LlamaForCausalLM in safetensors shards with index, config and tokenizer; about 6 MB, 20 MB at hidden=256."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = dict(_llama_tensors(hidden, layers))
    weights: dict[str, str] = {}
    for number, names in enumerate(_parts(list(tensors), shards), 1):
        file = f"model-{number:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weights |= dict.fromkeys(names, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _json(folder / "model.safetensors.index.json", metadata={"total_size": size}, weight_map=weights)
    _llama_config(folder, hidden, layers)
    tokenizer(folder)
    return folder


def _llama_tensors(hidden: int, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(hidden * 1000 + layers)

    def weight(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), np.float32) * np.float32(0.05)

    norm, keys, inner = np.ones(hidden, np.float32), 2 * _HEAD, 4 * hidden
    yield "model.embed_tokens.weight", weight(_VOCABULARY, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}."
        yield at + "self_attn.q_proj.weight", weight(hidden, hidden)
        yield at + "self_attn.k_proj.weight", weight(keys, hidden)
        yield at + "self_attn.v_proj.weight", weight(keys, hidden)
        yield at + "self_attn.o_proj.weight", weight(hidden, hidden)
        yield at + "mlp.gate_proj.weight", weight(inner, hidden)
        yield at + "mlp.up_proj.weight", weight(inner, hidden)
        yield at + "mlp.down_proj.weight", weight(hidden, inner)
        yield at + "input_layernorm.weight", norm
        yield at + "post_attention_layernorm.weight", norm
    yield "model.norm.weight", norm
    yield "lm_head.weight", weight(_VOCABULARY, hidden)


def _llama_config(folder: Path, hidden: int, layers: int) -> None:
    _json(
        folder / "config.json",
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // _HEAD,
        num_key_value_heads=2,
        head_dim=_HEAD,
        vocab_size=_VOCABULARY,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    _json(folder / "generation_config.json", bos_token_id=0, eos_token_id=1)


def tokenizer(folder: Path) -> Path:
    """tokenizer.json (byte-level BPE) with its configuration."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT] * 50, trainer)
    made.save(str(folder / "tokenizer.json"))
    _json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
    )
    return folder


def sentencepiece(folder: Path) -> Path:
    """tokenizer.model, as Llama 2 and Mistral have it."""
    import sentencepiece

    folder.mkdir(parents=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([_TEXT] * 50), model_writer=file, vocab_size=32, minloglevel=2
        )
    return folder


def shards(folder: Path, count: int, *, rows: int = 256) -> Path:
    """`count` safetensors shards of four tensors, 1 MiB each by default, and their index."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    random = np.random.default_rng(count)
    weights: dict[str, str] = {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        names = [f"layers.{number}.{name}.weight" for name in ("q", "k", "v", "o")]
        save_file({name: random.standard_normal((rows, 256), np.float32) for name in names}, folder / file)
        weights |= dict.fromkeys(names, file)
    _json(folder / "model.safetensors.index.json", metadata={}, weight_map=weights)
    return folder


def gguf(folder: Path) -> Path:
    """model.gguf, as llama.cpp's converter writes it: aligned tensors behind the metadata; 5 MB."""
    import gguf

    folder.mkdir(parents=True)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(4)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"token {number}" for number in range(_VOCABULARY)])
    random = np.random.default_rng(1)
    for layer in range(4):
        for name in ("attn_q", "attn_output", "ffn_up"):
            weight = random.standard_normal((256, 401), np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight)
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def onnx(folder: Path) -> Path:
    """model.onnx whose tensors lie in model.onnx.data (external data); 3 MB."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True)
    random = np.random.default_rng(2)
    weights = [
        numpy_helper.from_array(random.standard_normal((512, 512), np.float32), f"w{number}")
        for number in range(3)
    ]
    nodes = [
        helper.make_node("MatMul", [f"x{number}", f"w{number}"], [f"x{number + 1}"]) for number in range(3)
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 512]) for name in ("x0", "x3")]
    graph = helper.make_graph(nodes, "three", ends[:1], ends[1:], weights)
    onnx.save_model(
        helper.make_model(graph),
        folder / "model.onnx",
        save_as_external_data=True,
        all_tensors_to_one_file=True,
        location="model.onnx.data",
    )
    return folder


def pytorch(folder: Path, source: Path) -> Path:
    """The weights of `llama` at `source` as pytorch_model-*.bin (zip files of pickles) with their index."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir(parents=True)
    weights: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        name = file.name.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        tensors = load_file(file)
        torch.save(tensors, folder / name)
        weights |= dict.fromkeys(tensors, name)
    _json(folder / "pytorch_model.bin.index.json", metadata={}, weight_map=weights)
    for file in source.glob("*.json"):
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def header(length: int, text: bytes = b"") -> bytes:
    """The begin of a safetensors file: the length of the header, as it says, and the header."""
    return struct.pack("<Q", length) + text


def _parts(names: list[str], count: int) -> Iterator[list[str]]:
    for number in range(count):
        yield names[number * len(names) // count : (number + 1) * len(names) // count]


def _json(file: Path, **content: Any) -> None:
    file.write_text(json.dumps(content, indent=1), "utf-8")
