"""Makes the models: the same random weights in the formats of the loaders, and a Llama that an engine can run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engines.loaders import INDEX
from benchmarks.model import MIB, make_model


def make_format(kind: str, directory: Path, *, shards: int, shard_mib: int) -> int:
    """Write a model as 'safetensors', 'pt' or 'gguf' into `directory`; returns the bytes of its shards."""
    model = make_model(directory, shards=shards, shard_mib=shard_mib)
    if kind == "safetensors":
        return model.size
    for number, name in enumerate(model.shards, 1):
        source = directory / name
        target = directory / f"model-{number:05d}-of-{shards:05d}.{kind}"
        _TO[kind](source, target)
        source.unlink()
    (directory / INDEX).unlink()
    return sum(path.stat().st_size for path in directory.glob(f"*.{kind}"))


def _to_pt(source: Path, target: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(source), target)


def _to_gguf(source: Path, target: Path) -> None:
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    writer = GGUFWriter(target, "llama")
    for name, tensor in load_file(source).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_TO = {"pt": _to_pt, "gguf": _to_gguf}

_HIDDEN, _MIDDLE, _WORDS, _KEYS = 2048, 5632, 32000, 512
_LAYER = 2 * (2 * _HIDDEN * _HIDDEN + 2 * _KEYS * _HIDDEN + 3 * _MIDDLE * _HIDDEN)
"""Bytes of one layer in bfloat16."""


def make_llama(directory: Path, *, shards: int, mib: int) -> int:
    """Write a Llama of about `mib` MiB with random weights in `shards` files, without a tokenizer; returns the bytes of
    its shards. Its words are 0 to 31,999."""
    import torch
    from safetensors.torch import save_file

    layers = max(shards, round((mib * MIB - 4 * _WORDS * _HIDDEN) / _LAYER))
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = list(_llama(layers))
    groups = [tensors[len(tensors) * n // shards : len(tensors) * (n + 1) // shards] for n in range(shards)]
    weights: dict[str, str] = {}
    size = 0
    for number, group in enumerate(groups, 1):
        name = f"model-{number:05d}-of-{shards:05d}.safetensors"
        made = {
            key: torch.ones(*shape, dtype=torch.bfloat16)
            if len(shape) == 1
            else torch.randn(*shape, dtype=torch.bfloat16) * 0.02
            for key, shape in group
        }
        save_file(made, directory / name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(made, name))
        size += (directory / name).stat().st_size
    index = {"metadata": {"total_size": size}, "weight_map": weights}
    (directory / INDEX).write_text(json.dumps(index, indent=1))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _MIDDLE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": _KEYS // 128,
        "head_dim": 128,
        "vocab_size": _WORDS,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return size


def _llama(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors, in the order of the layers."""
    yield "model.embed_tokens.weight", (_WORDS, _HIDDEN)
    for number in range(layers):
        layer = f"model.layers.{number}"
        for part, rows in (("q_proj", _HIDDEN), ("k_proj", _KEYS), ("v_proj", _KEYS), ("o_proj", _HIDDEN)):
            yield f"{layer}.self_attn.{part}.weight", (rows, _HIDDEN)
        yield f"{layer}.mlp.gate_proj.weight", (_MIDDLE, _HIDDEN)
        yield f"{layer}.mlp.up_proj.weight", (_MIDDLE, _HIDDEN)
        yield f"{layer}.mlp.down_proj.weight", (_HIDDEN, _MIDDLE)
        yield f"{layer}.input_layernorm.weight", (_HIDDEN,)
        yield f"{layer}.post_attention_layernorm.weight", (_HIDDEN,)
    yield "model.norm.weight", (_HIDDEN,)
    yield "lm_head.weight", (_WORDS, _HIDDEN)
