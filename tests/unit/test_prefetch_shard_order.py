"""Which shards come next."""

from __future__ import annotations

import json

from fusecache.prefetch.companion_prefetcher import CompanionPrefetcher, companion_versions
from fusecache.prefetch.models.companions import companions_of
from fusecache.prefetch.models.shard_order import (
    find_index,
    is_config,
    is_shard,
    natural_key,
    shards_following,
    shards_in_index,
)
from fusecache.types import ObjectVersion
from tests.support.scripted import version

NAMES = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]


def test_shards_follow_by_name_and_then_round_about() -> None:
    assert shards_following(NAMES[1], [*NAMES, "config.json", "tokenizer.json"]) == [NAMES[2], NAMES[0]]


def test_names_are_ordered_by_their_numbers() -> None:
    names = [f"part-{n}.bin" for n in (1, 2, 10, 11)]
    assert shards_following("part-2.bin", names) == ["part-10.bin", "part-11.bin", "part-1.bin"]
    assert natural_key("part-2") < natural_key("part-10")


def test_the_index_decides_the_order() -> None:
    text = json.dumps({"weight_map": {"a": NAMES[2], "b": NAMES[0], "c": NAMES[2], "d": NAMES[1]}})
    order = shards_in_index(text.encode())
    assert order == [NAMES[2], NAMES[0], NAMES[1]]
    assert shards_following(NAMES[2], NAMES, order) == [NAMES[0], NAMES[1]]


def test_an_index_that_names_files_that_are_not_there() -> None:
    assert shards_following(NAMES[0], NAMES[:2], ["../../etc/passwd", *NAMES]) == [NAMES[1]]


def test_an_index_that_does_not_name_the_file_is_passed_over() -> None:
    assert shards_following(NAMES[0], NAMES, ["other.safetensors"]) == NAMES[1:]


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
        assert shards_in_index(text) == []


def test_only_shards_have_followers() -> None:
    assert shards_following("generation_config.json", ["generation_config.json", *NAMES]) == []
    assert is_shard("x.GGUF")
    assert not is_shard("x.json")


def test_the_index_of_the_same_kind_is_found() -> None:
    siblings = [*NAMES, "model.safetensors.index.json", "pytorch_model.bin.index.json"]
    assert find_index(NAMES[0], siblings) == "model.safetensors.index.json"
    assert find_index("pytorch_model-1.bin", siblings) == "pytorch_model.bin.index.json"
    assert find_index("tokenizer.json", siblings) is None


def test_a_config_leads_to_the_shards_that_are_loaded() -> None:
    index = "model.safetensors.index.json"
    others = ["pytorch_model-00001-of-00001.bin", "consolidated.safetensors", "tokenizer.json", "q4.gguf"]
    siblings = [*reversed(NAMES), *others, "config.json"]
    assert is_config("llama/config.json")
    assert not is_config("llama/adapter_config.json")
    assert shards_following("config.json", siblings) == NAMES
    assert find_index("config.json", [*siblings, index, "pytorch_model.bin.index.json"]) == index
    assert shards_following("config.json", siblings, [NAMES[1], NAMES[0], "missing.safetensors"]) == [
        NAMES[1],
        NAMES[0],
    ]


def test_a_config_of_one_file_or_another_kind_leads_to_it() -> None:
    assert shards_following("config.json", ["model.fp16.safetensors", "model.safetensors"]) == [
        "model.safetensors"
    ]
    assert shards_following("config.json", ["pytorch_model.bin", "optimizer.bin"]) == ["pytorch_model.bin"]
    bin_index = "pytorch_model.bin.index.json"
    assert find_index("config.json", ["pytorch_model-00001-of-00002.bin", bin_index]) == bin_index
    assert find_index("config.json", [bin_index]) is None


def test_a_config_beside_files_of_other_names_leads_nowhere() -> None:
    assert (
        shards_following("config.json", ["unet.safetensors", "unet.fp16.safetensors", "a.gguf", "b.pth"])
        == []
    )


def test_only_names_that_say_so_are_shards_of_one_model() -> None:
    adapters = [f"adapter-{n:04d}.safetensors" for n in range(5000)]
    assert shards_following(adapters[7], adapters) == []
    both = [*NAMES, "consolidated.safetensors", "model-00001-of-00002.safetensors", "lora.safetensors"]
    assert shards_following(NAMES[0], both) == NAMES[1:]
    assert shards_following("consolidated.safetensors", both) == []
    for name in (
        "consolidated.{}.pth",
        "model-rank-{}-part-0.safetensors",
        "rank{}.safetensors",
        "model-{}.bin",
        "pytorch_model-{}-of-4.bin",
        "llama-q4-{}-of-4.gguf",
    ):
        shards = [name.format(n) for n in range(4)]
        assert shards_following(shards[1], [*shards, *adapters]) == [*shards[2:], shards[0]]
    for name in (
        "lora_{}.safetensors",
        "{}.safetensors",
        "checkpoint-{}.pt",
        "llama-q{}.gguf",
        "v{}-model.bin",
    ):
        others = [name.format(n) for n in range(4)]
        assert shards_following(others[1], others) == []


def test_the_files_of_an_adapter_belong_together() -> None:
    sizes = {
        "adapter_config.json": 600,
        "adapter_model.safetensors": 40 << 20,
        "adapter_model.bin": 40 << 20,
        "README.md": 5000,
    }
    assert companions_of("adapter_config.json", sizes) == ["adapter_model.safetensors"]
    assert companions_of("README.md", sizes) == ["adapter_config.json", "adapter_model.safetensors"]
    assert companions_of("adapter_model.safetensors", sizes) == ["adapter_config.json"]
    assert companions_of("adapter_config.json", sizes | {"new_embeddings.bin": 9}) == [
        "adapter_model.safetensors",
        "new_embeddings.bin",
    ]
    assert companions_of("adapter_config.json", sizes | {"adapter_model.safetensors": 2 << 30}) == []


def test_small_weights_come_along_if_it_is_clear_which() -> None:
    sizes = {"config.json": 600, "model.safetensors": 20 << 20, "tokenizer.json": 2 << 20}
    assert companions_of("tokenizer.json", sizes) == ["model.safetensors"]
    assert companions_of("config.json", sizes) == []  # following() says more about that one
    assert companions_of("model.safetensors", sizes) == []
    assert companions_of("tokenizer.json", sizes | {"model.safetensors": 200 << 20}) == []
    assert companions_of("tokenizer.json", sizes | {"other.safetensors": 1}) == []
    assert companions_of("a.txt", {"a.txt": 1, "b.txt": 2}) == []


def test_a_folder_of_very_many_files_is_no_adapter() -> None:
    files = [version("flat/adapter_config.json", 1), version("flat/adapter_model.bin", 1)]
    assert companion_versions(files[0], files) == files[1:]
    elsewhere = version("adapter_model.bin", 1)
    assert companion_versions(files[0], [files[0], elsewhere]) == []
    assert companion_versions(files[0], [*files, *(version(f"flat/{n}", 1) for n in range(5000))]) == []


class Folders:
    """A library of folders with an adapter each."""

    def siblings(self, found: ObjectVersion) -> list[ObjectVersion]:
        folder = found.key.rpartition("/")[0]
        return [version(f"{folder}/adapter_config.json", 1), version(f"{folder}/adapter_model.bin", 1)]


def test_who_reads_the_configurations_of_all_adapters_loads_none() -> None:
    begun: list[str] = []
    along = CompanionPrefetcher(Folders(), lambda found, _source: begun.append(found.key))

    def read(number: int, *names: str) -> None:
        for name in names:
            found = version(f"{number}/{name}", 1)
            if along.mark_if_due(found):
                along.prefetch_companions(found, "")

    for number in range(100):
        read(number, "adapter_config.json")
    assert begun == [f"{number}/adapter_model.bin" for number in range(32)]
    for number in range(100):  # now they are loaded, by many workers that take turns
        read(number, "adapter_model.bin")
    begun.clear()
    for number in range(200, 300):
        read(number, "adapter_config.json", "adapter_model.bin")
    assert len([key for key in begun if key.endswith("adapter_model.bin")]) == 100
    begun.clear()
    read(250, "adapter_config.json")
    assert begun == []  # just looked
