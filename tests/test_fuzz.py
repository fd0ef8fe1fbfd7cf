"""Damaged files by the thousand: each is read or refused in one line, quickly, in little memory."""

from __future__ import annotations

import json
import time

import pytest

from tests.fuzzing import MEMORY, Report, Surface, run_cases
from tests.fuzzing_surfaces import CASES, SURFACES


@pytest.mark.parametrize("name", SURFACES)
def test_damaged_input_is_read_or_refused(name):
    report = run_cases(SURFACES[name], 0, 43)
    assert not report.defects, report.told()
    assert {outcome.outcome for outcome in report.outcomes} <= {"read", "refused", "missing"}
    assert sum(outcome.outcome == "refused" for outcome in report.outcomes) > 10
    assert report.peak_growth < MEMORY, report.peak_growth


@pytest.mark.slow
@pytest.mark.parametrize("name", SURFACES)
def test_ten_thousand_damaged_inputs(name):
    """Counts and peak memory are printed (`pytest -s`)."""
    report = Report()
    for first in range(0, CASES[name], 250):
        report.add(run_cases(SURFACES[name], first, min(250, CASES[name] - first)))
    print(json.dumps({**report.counts(), "peak growth, MiB": report.peak_growth // 2**20}))
    assert len(report.outcomes) == CASES[name]
    assert not report.defects, report.told()
    assert report.peak_growth < MEMORY, report.peak_growth


def test_ten_thousand_in_all():
    assert CASES.keys() == SURFACES.keys()
    assert sum(CASES.values()) == 10_000


def misbehaving(how: str) -> Surface:
    def use(path) -> None:
        if how == "type":
            raise KeyError("weights.0")
        if how == "lines":
            raise ValueError(f"{path.name}:\nwrong")
        if how == "long":
            raise ValueError(path.name + "x" * 1000)
        if how == "nameless":
            raise ValueError("wrong")
        if how == "memory":
            bytearray(2**34)
        if how == "recursion":
            return use(path)
        if how == "slow":
            started = time.process_time()
            while time.process_time() < started + 5.5:
                pass
        if how == "crash":
            import ctypes

            ctypes.string_at(0)
        if how == "hang":
            time.sleep(1000)
        return None

    def make(rng, folder):
        (folder / "file.bin").write_bytes(b"")
        return how, folder / "file.bin"

    return Surface(f"misbehaving {how}", make, use)


@pytest.mark.parametrize(
    ("how", "seen"),
    [("type", "DEFECT KeyError"), ("lines", "DEFECT message is not one"),
     ("long", "DEFECT message of 1008 characters"),
     ("nameless", "DEFECT message does not name"), ("memory", "DEFECT MemoryError"),
     ("recursion", "DEFECT RecursionError"),
     ("crash", "DEFECT crash (status -11)"), pytest.param("slow", "DEFECT slow", marks=pytest.mark.slow),
     ("hang", "DEFECT hang"),
     ("well", "read")],
)  # fmt: skip
def test_what_would_be_a_defect_is_seen(monkeypatch, how, seen):
    """The net itself: every way to misbehave is caught, and the cases behind a dead process still run."""
    if how == "hang":
        monkeypatch.setattr("tests.fuzzing.HANG_SECONDS", 0.3)
    report = run_cases(misbehaving(how), 5, 2)
    assert [outcome.number for outcome in report.outcomes] == [5, 6]
    assert all(outcome.outcome.startswith(seen) for outcome in report.outcomes), report.told()


def test_a_case_is_a_function_of_its_number():
    surface = SURFACES["lora keys"]
    one, other = run_cases(surface, 3, 2), run_cases(surface, 4, 1)
    assert (one.outcomes[1].kind, one.outcomes[1].outcome) == (other.outcomes[0].kind, other.outcomes[0].outcome)
