"""What the CPU benchmarks share: turns, checks, targets, and the file that keeps what other runs measured."""

import json

import pytest
import torch

from bench import __main__ as bench
from bench import wkv
from bench.measure import check, in_turns, relative_error
from bench.targets import AT_LEAST, AT_MOST, judge


def test_peers_are_timed_in_turns():
    calls = []
    times = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1)
    assert calls == ["a", "b"] * 4
    assert times.keys() == {"a", "b"} and times["a"]["rounds"] == 3
    assert times["a"]["min"] <= times["a"]["median"] <= times["a"]["max"]
    calls.clear()
    assert in_turns({"a": lambda: calls.append("a")}, rounds=9, budget=0.0)["a"]["rounds"] == 1


def test_a_wrong_result_is_not_timed():
    wanted = torch.randn(50)
    assert relative_error(1.01 * wanted, wanted) == pytest.approx(0.01, rel=1e-3)
    assert check("case", 0.01, 0.02) == 0.01
    for value in (0.03, float("nan")):
        with pytest.raises(SystemExit, match="nothing was timed"):
            check("case", value, 0.02)


def test_targets_belong_to_cases():
    assert AT_LEAST.keys() | AT_MOST.keys() <= bench.CASES.keys()
    met = judge("decode", {"weights": "int8", "share of the read bandwidth": 0.85, "tokens/s": 3.0})
    assert met == {"share of the read bandwidth": {"wanted": 0.8, "met": True}}
    missed = judge("decode", {"weights": "bf16", "share of the read bandwidth": 0.85, "times pip rwkv": 2.0})
    assert [verdict["met"] for verdict in missed.values()] == [False, False]
    assert judge("wkv_fwd", {"H": 8, "T": 1, "error": 1e-6, "times loop": 1.0}) == {
        "error": {"wanted": 5e-7, "met": False}
    }


def test_a_run_keeps_the_cases_of_others(tmp_path, monkeypatch, capsys):
    """With a case of a few tokens in place of the long ones; everything else is the command itself."""
    monkeypatch.setattr("visualrwkv.ops.build.load", lambda *arguments, **options: "")
    monkeypatch.setattr(wkv, "forward", lambda quick: [{"H": 8, "T": 128, "times loop": 39.0, "ms": {"a": {}}}])
    out = tmp_path / "cpu.json"
    out.write_text(json.dumps({"decode": {"results": []}}))
    assert bench.main(["--cases", "wkv_fwd", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert kept.keys() == {"decode", "wkv_fwd"}
    case = kept["wkv_fwd"]
    assert case["results"][0]["times loop"] == 39 and case["targets"] == [{"times loop": {"wanted": 40, "met": False}}]
    assert {"machine", "date", "versions", "commit", "threads", "load"} <= case.keys()
    printed = capsys.readouterr().out
    assert "| H | T | times loop |" in printed and "| 8 | 128 | 39 (missed: 40) |" in printed
