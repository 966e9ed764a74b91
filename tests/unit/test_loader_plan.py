"""Which shards come next."""

from __future__ import annotations

import json

from fusecache.loader.plan import following, index_for, index_order, is_config, is_shard, natural_key

NAMES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_shards_follow_by_name_and_then_round_about() -> None:
    assert following(NAMES[1], [*NAMES, "config.json", "tokenizer.json"]) == [NAMES[2], NAMES[0]]


def test_names_are_ordered_by_their_numbers() -> None:
    names = [f"part-{n}.bin" for n in (1, 2, 10, 11)]
    assert following("part-2.bin", names) == ["part-10.bin", "part-11.bin", "part-1.bin"]
    assert natural_key("part-2") < natural_key("part-10")


def test_the_index_decides_the_order() -> None:
    text = json.dumps({"weight_map": {"a": NAMES[2], "b": NAMES[0], "c": NAMES[2], "d": NAMES[1]}})
    order = index_order(text.encode())
    assert order == [NAMES[2], NAMES[0], NAMES[1]]
    assert following(NAMES[2], NAMES, order) == [NAMES[0], NAMES[1]]


def test_an_index_that_names_files_that_are_not_there() -> None:
    assert following(NAMES[0], NAMES[:2], ["../../etc/passwd", *NAMES]) == [NAMES[1]]


def test_an_index_that_does_not_name_the_file_is_passed_over() -> None:
    assert following(NAMES[0], NAMES, ["other.safetensors"]) == NAMES[1:]


def test_what_is_no_index() -> None:
    for text in (
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"weight_map": 3}',
        b'{"weight_map": {"a": [1]}}',
        b"\xff",
        b"[" * 10**6,
    ):
        assert index_order(text) == []


def test_only_shards_have_followers() -> None:
    assert following("generation_config.json", ["generation_config.json", *NAMES]) == []
    assert is_shard("x.GGUF")
    assert not is_shard("x.json")


def test_the_index_of_the_same_kind_is_found() -> None:
    siblings = [*NAMES, "model.safetensors.index.json", "pytorch_model.bin.index.json"]
    assert index_for(NAMES[0], siblings) == "model.safetensors.index.json"
    assert index_for("pytorch_model-1.bin", siblings) == "pytorch_model.bin.index.json"
    assert index_for("tokenizer.json", siblings) is None


def test_a_config_leads_to_the_shards_that_are_loaded() -> None:
    index = "model.safetensors.index.json"
    others = ["pytorch_model-00001-of-00001.bin", "consolidated.safetensors", "tokenizer.json", "q4.gguf"]
    siblings = [*reversed(NAMES), *others, "config.json"]
    assert is_config("llama/config.json")
    assert not is_config("llama/adapter_config.json")
    assert following("config.json", siblings) == NAMES
    assert index_for("config.json", [*siblings, index, "pytorch_model.bin.index.json"]) == index
    assert following("config.json", siblings, [NAMES[1], NAMES[0], "missing.safetensors"]) == [
        NAMES[1],
        NAMES[0],
    ]


def test_a_config_of_one_file_or_another_kind_leads_to_it() -> None:
    assert following("config.json", ["model.fp16.safetensors", "model.safetensors"]) == ["model.safetensors"]
    assert following("config.json", ["pytorch_model.bin", "optimizer.bin"]) == ["pytorch_model.bin"]
    bin_index = "pytorch_model.bin.index.json"
    assert index_for("config.json", ["pytorch_model-00001-of-00002.bin", bin_index]) == bin_index
    assert index_for("config.json", [bin_index]) is None


def test_a_config_beside_files_of_other_names_leads_nowhere() -> None:
    assert following("config.json", ["unet.safetensors", "unet.fp16.safetensors", "a.gguf", "b.pth"]) == []
