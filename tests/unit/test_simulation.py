"""The simulation of large clusters: what is true of any network is true of the simulated one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.cluster import simulate as command
from benchmarks.cluster.simulation import run_simulation
from benchmarks.cluster.simulation_network import (
    STREAM_WINDOW_RUNS,
    SimulatedClock,
    SimulatedNetwork,
    SimulatedStream,
)
from benchmarks.cluster.simulation_report import compare_with_lab
from benchmarks.cluster.simulation_world import SimulationSetting
from benchmarks.processes import BenchmarkError
from fusecache.peers.exchange import policy

MIB = 1 << 20
SMALL = SimulationSetting(
    8, 64 * MIB, shard=32 * MIB, stripe=MIB, block=256 << 10, rate=100e6, origin_rate=100e6
)


class Wire:
    """A network of so many nodes with links of 100 blocks per second, and what arrives."""

    def __init__(self, *rates: float, latency: float = 0.0, run: int = 1) -> None:
        self.clock = SimulatedClock()
        self.network = SimulatedNetwork(self.clock, rates, rates, latency, 1, run)
        self.arrivals: dict[SimulatedStream, list[float]] = {}

    def send(self, source: int, sink: int, blocks: int, ready: int | None = None) -> SimulatedStream:
        stream = SimulatedStream(source, sink, blocks, self.landed)
        stream.ready_blocks = blocks if ready is None else ready
        self.arrivals[stream] = []
        self.network.queue_run(stream)
        return stream

    def landed(self, stream: SimulatedStream, count: int) -> None:
        self.arrivals[stream] += [self.clock.now] * count


def test_a_link_gives_its_rate_and_no_more() -> None:
    wire = Wire(100, 100, latency=0.5)
    stream = wire.send(0, 1, 200)
    wire.clock.run_until_stopped(1e9)
    times = wire.arrivals[stream]
    assert len(times) == 200
    assert times[0] == pytest.approx(0.51)
    for first in range(200 - 10):
        assert times[first + 10] - times[first] >= 0.1 - 1e-9


def test_streams_share_a_link_evenly_at_either_end() -> None:
    for pairs in ([(0, 1), (0, 2)], [(1, 0), (2, 0)]):
        wire = Wire(100, 100, 100)
        streams = [wire.send(source, sink, 100) for source, sink in pairs]
        wire.clock.run_until_stopped(1e9)
        ends = [wire.arrivals[stream][-1] for stream in streams]
        assert ends == pytest.approx([2.0, 2.0], abs=0.05)


def test_what_one_stream_cannot_use_the_others_get() -> None:
    wire = Wire(100, 10, 100)
    slow, fast = wire.send(0, 1, 20), wire.send(0, 2, 90)
    wire.clock.run_until_stopped(1e9)
    assert wire.arrivals[slow][-1] == pytest.approx(2.0, abs=0.2)
    assert wire.arrivals[fast][-1] == pytest.approx(1.0, abs=0.05)


def test_only_what_is_there_is_sent_and_an_end_is_an_end() -> None:
    wire = Wire(100, 100, run=4)
    stream = wire.send(0, 1, 10, ready=3)
    wire.clock.run_until_stopped(1e9)
    assert len(wire.arrivals[stream]) == 3
    assert wire.network.unsent_bytes == [0, 0]
    stream.ready_blocks = 10
    wire.network.queue_run(stream)
    stream.is_ended = True
    wire.clock.run_until_stopped(1e9)
    assert len(wire.arrivals[stream]) == 3
    assert wire.network.unsent_bytes == [0, 0]


def test_no_stream_has_more_than_its_window_on_the_way() -> None:
    wire = Wire(1000, 1, run=2)
    stream = wire.send(0, 1, 20)
    most = 0
    while wire.clock.run_next_event():
        most = max(most, stream.sent_blocks - stream.arrived_blocks)
    assert 2 < most <= STREAM_WINDOW_RUNS * 2
    assert len(wire.arrivals[stream]) == 20


@pytest.mark.parametrize("nodes", [2, 5, 8])
def test_every_byte_comes_once_and_leaves_the_origin_once(nodes: int) -> None:
    outcome = run_simulation(replace(SMALL, nodes=nodes))
    assert outcome.last_done_at is not None
    assert outcome.origin_copies == 1.0
    assert outcome.duplicate_copies == 0.0
    assert outcome.errors == outcome.fallbacks == outcome.refused == 0
    assert outcome.over_bound >= 1.0
    assert outcome.busiest_copies <= nodes - 1


def test_one_node_alone_takes_as_long_as_its_link() -> None:
    outcome = run_simulation(replace(SMALL, nodes=1, first_byte=0.0))
    assert 1.0 <= outcome.over_bound < 1.02


def test_a_node_can_not_be_faster_than_its_link_nor_the_origin() -> None:
    for rates in ({"rate": 50e6}, {"origin_rate": 50e6}):
        outcome = run_simulation(replace(SMALL, **rates))
        assert outcome.setting.bound == pytest.approx(64 * MIB / 50e6)
        assert outcome.over_bound >= 1.0


def test_a_run_can_be_repeated() -> None:
    first, again, other = (run_simulation(replace(SMALL, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert other != first


def test_who_dies_costs_its_share_and_nobody_else() -> None:
    outcome = run_simulation(replace(SMALL, dead=0.125, rate=10e6, origin_rate=10e6))
    assert outcome.last_done_at is not None
    assert 1.0 <= outcome.origin_copies <= 1.25
    assert outcome.errors > 0


def test_slow_nodes_are_told_apart() -> None:
    outcome = run_simulation(replace(SMALL, slow=0.125))
    assert outcome.last_done_at is not None
    assert outcome.last_slow_done_at is not None
    assert outcome.last_slow_done_at >= 10 * outcome.setting.bound > outcome.last_done_at


def test_a_node_with_a_slow_link_does_not_hold_up_the_others() -> None:
    large = replace(SMALL, nodes=50, size=1024 * MIB, shard=256 * MIB, stripe=2 * MIB, block=1 * MIB)
    well, outcome = (run_simulation(replace(large, slow=slow)) for slow in (0.0, 0.02))
    assert well.last_done_at is not None
    assert outcome.last_done_at is not None
    assert outcome.origin_copies < 1.01
    assert outcome.last_done_at < 1.7 * well.last_done_at


def test_in_a_large_cluster_every_owner_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "MAX_DIRECT_NODES", 10)
    outcome = run_simulation(replace(SMALL, nodes=60, connections=16, size=16 * MIB, shard=8 * MIB))
    assert outcome.last_done_at is not None
    assert outcome.origin_copies == 1.0
    assert outcome.not_connected == outcome.errors == outcome.fallbacks == 0


def measured(path: Path, **more: object) -> Path:
    row = {
        "stage": "together",
        "contender": "fusecache",
        "nodes": 4,
        "seconds": 2.0,
        "origin": 1.0,
        "origin_wire": 1.1,
        "cpu_busy": 0.5,
    }
    document = {
        "rate": 50e6,
        "size": 64 * MIB,
        "stripe": MIB,
        "block": 256 << 10,
        "concurrency": 2,
        "bound": 64 * MIB / 50e6,
        "runs": [row, {**row, "stage": "killed"}, {**row, "seconds": 3.0}],
    }
    path.write_text(json.dumps({**document, **more}))
    return path


def test_validation_compares_like_with_like(tmp_path: Path) -> None:
    [check] = compare_with_lab(measured(tmp_path / "cluster.json"), 1e-3, seeds=[1])
    assert (check.nodes, check.measured) == (4, 2.5)
    assert check.simulated >= 64 * MIB / 50e6 * 1.1
    assert check.error == pytest.approx(check.simulated / 2.5 - 1)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [1]}', '{"runs": []}'])
def test_what_is_no_measurement_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cluster.json"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=r"cluster\.json"):
        compare_with_lab(path, 1e-3, seeds=[1])
    done = CliRunner().invoke(command.main, ["--validate", str(path), "--validate-only"])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")


def test_the_command_writes_what_it_found(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peer_node = measured(tmp_path / "cluster.json")
    words = [
        "--nodes",
        "3",
        "--stripe",
        "64",
        "--transfers",
        "60",
        "--jobs",
        "1",
        "--results",
        str(tmp_path / "out"),
    ]
    done = CliRunner().invoke(command.main, [*words, "--validate", str(peer_node)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["simulation.json", "simulation.png"]
    document = json.loads((tmp_path / "out" / "simulation.json").read_text())
    assert [result["scenario"] for result in document["results"]] == list(command.SCENARIOS)
    assert all(result["whole_over_bound"] >= 1 for result in document["results"])
    assert len(document["checks"]) == 1


def test_wrong_words_are_named() -> None:
    for words in (["--scenarios", "sunshine"], ["--nodes", "many"]):
        done = CliRunner().invoke(command.main, words)
        assert done.exit_code == 2
        assert "Traceback" not in done.output
