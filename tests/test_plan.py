"""Plans: immutable, equal by value, exact in JSON, readable, and their errors."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import random_plan

import fastsample as fs
from fastsample.plan import Row, write_atomically

SEEDS = st.integers(0, 10**6)


def small() -> fs.Plan:
    return fs.solvers.build("ddim", fs.VP.linear(), 3, prediction="v")


# -- value ----------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(SEEDS, st.booleans())
def test_json_round_trip_is_exact(seed: int, sized: bool) -> None:
    plan = random_plan(seed, sized=sized).replace(
        notes=("chose é",), options={"order": 3, "a": [1, "b", None]}
    )
    again = fs.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert torch.equal(again.numbers, plan.numbers)
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=8, max_size=8))
def test_any_finite_number_survives(numbers: list[float]) -> None:
    row = Row((0,), (), (1,), True, "x0", False, 0)
    plan = small().replace(numbers=None)
    plan = fs.Plan(
        [row],
        torch.tensor(numbers, dtype=torch.float64),
        solver="any",
        prediction="eps",
        process="p",
        fingerprint="f",
        steps=1,
        t0=numbers[0],
        grid=numbers,
    )
    again = fs.Plan.from_json(plan.to_json())
    assert again.numbers.tolist() == numbers
    assert again.grid == tuple(numbers)
    assert [math.copysign(1, v) for v in again.numbers.tolist()] == [math.copysign(1, v) for v in numbers]


@pytest.mark.parametrize("name", [n for n in fs.solvers.names() if not n.startswith("analytic")])
def test_every_solver_round_trips(name: str) -> None:
    plan = fs.solvers.build(name, fs.VP.linear(), 4)
    assert fs.Plan.from_json(plan.to_json()) == plan


def test_equality_is_by_value() -> None:
    assert small() == small()
    assert hash(small()) == hash(small())
    assert small() != fs.solvers.build("ddim", fs.VP.linear(), 4, prediction="v")
    assert small() != small().replace(notes=("x",))
    numbers = small().numbers
    numbers[0] = math.nextafter(float(numbers[0]), 9.0)
    assert small().replace(numbers=numbers) != small()
    assert small() != "plan"


@settings(max_examples=20)
@given(SEEDS)
def test_copies_and_pickles_are_equal(seed: int) -> None:
    plan = random_plan(seed)
    assert copy.deepcopy(plan) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


def test_plans_do_not_change() -> None:
    plan, before = small(), small()
    with pytest.raises(AttributeError, match=r"immutable.*plan\.replace"):
        plan.steps = 7
    with pytest.raises(AttributeError, match="immutable"):
        plan.numbers = torch.zeros(1)
    plan.numbers.zero_()
    plan.options["eta"] = 1.0
    given_numbers = plan.numbers
    made = plan.replace(numbers=given_numbers)
    given_numbers.zero_()
    assert plan == before
    assert made == before
    learned = plan.numbers.requires_grad_(True)
    made = plan.replace(numbers=learned)
    with torch.no_grad():
        learned.zero_()  # a step of an optimiser
    assert made.values == before.values
    assert made.numbers.requires_grad


def test_tensors_are_the_values_and_carry_gradients() -> None:
    plan = small()
    learned = plan.numbers.requires_grad_(True)
    made = plan.replace(numbers=learned)
    total = sum(v.a[0] for v in made.tensors())
    assert float(total.detach()) == sum(v.a[0] for v in plan.values)
    (gradient,) = torch.autograd.grad(total, learned)
    assert int(gradient.sum()) == len(plan.rows)


def test_what_a_plan_says_of_itself() -> None:
    plan = fs.solvers.build("ddim", fs.VP.linear(), 3, grid=[900.0, 600.0, 300.0, -1.0], eta=1.0)
    assert plan.nfe == 3
    assert plan.steps == 3
    assert plan.stochastic
    assert not small().stochastic
    assert plan.times == (900.0, 600.0, 300.0)
    assert plan.grid == (900.0, 600.0, 300.0, -1.0)
    assert plan.t0 == 900.0
    assert plan.solver == "ddim"
    assert plan.options == {"eta": 1.0}
    assert repr(plan).startswith("Plan(solver='ddim', steps=3, nfe=3, process=VP.linear(")


def test_prints_as_a_table() -> None:
    plan = fs.solvers.build("ddim", fs.Flow(), 2, prediction="flow").replace(notes=("a note",))
    lines = str(plan).splitlines()
    assert lines[0].startswith("ddim: 2 steps, 2 evaluations, on Flow(")
    assert lines[1] == "  a note"
    assert lines[2].split() == ["row", "t", "sigma/alpha", "update"]
    assert "inf  x1 = +1 x0;  m0 = +0 x1 +1 net(x1, 1)  [flow]" in lines[3]
    assert lines[4].split()[:3] == ["1", "0.5", "1"]
    assert "x2 = +1 x0 -0.5 m0" in lines[4]
    assert "x3 = +1 x2 -0.5 m1" in lines[5]
    assert len(lines) == 6
    # every coefficient of the table is in print
    noisy = str(fs.solvers.build("ddim", fs.VP.linear(), 3, eta=1.0))
    assert "z1" in noisy


# -- what is refused ------------------------------------------------------------------------------------


def made(rows: list[Row], numbers: list[float], **changes: Any) -> fs.Plan:
    meta: dict[str, Any] = {
        "solver": "s",
        "prediction": "eps",
        "process": "p",
        "fingerprint": "f",
        "steps": 1,
        "t0": 1.0,
    }
    return fs.Plan(rows, torch.tensor(numbers, dtype=torch.float64), **(meta | changes))


@pytest.mark.parametrize(
    ("rows", "numbers", "message"),
    [
        ([], [], "wrote no row"),
        ([Row((1,), (), (), False, None, False, 0)], [1.0, 0, 1, 0], r"row 0 reads states \(1,\)"),
        ([Row((0,), (0,), (), False, None, False, 0)], [1.0] * 5, "row 0 reads prediction 0"),
        ([Row((0,), (), (), True, "x1", False, 0)], [1.0] * 7, "row 0: space='x1'"),
        ([Row((0,), (), (), False, None, False, 2)], [1.0] * 4, "numbers start at 2, expected 0"),
        ([Row((0,), (), (), False, None, False, 0)], [1.0] * 5, r"shape \(4,\)"),
        (
            [Row((0,), (), (7,), False, None, False, 0)],
            [1.0, math.nan, 5.0, 1.0, 0.0],
            r"coefficient 'c7' of row 0 \(t=5\) is nan",
        ),
    ],
)
def test_unsound_tables_are_refused(rows: list[Row], numbers: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(rows, numbers)


def test_a_row_that_does_not_evaluate_makes_no_prediction() -> None:
    rows = [Row((0,), (), (), False, None, False, 0), Row((0,), (0,), (), False, None, False, 4)]
    with pytest.raises(ValueError, match="row 1 reads prediction 0, which no earlier row makes"):
        made(rows, [1.0] * 9)


def test_float32_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float64.*float32"):
        small().replace(numbers=small().numbers.float())


def edited(path: tuple[Any, ...], value: Any) -> str:
    """A plan's JSON with one entry replaced, or removed where the value is ``...``."""
    data = json.loads(small().to_json())
    target = data
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan: invalid JSON"),
        (small().to_json()[:-50], "not a plan: invalid JSON"),
        ("[1, 2]", 'no "format"'),
        ('{"format": "other"}', 'no "format"'),
        (edited(("schema",), 99), "plan schema 99 is not understood.*upgrade"),
        (edited(("rows",), ...), "damaged plan"),
        (edited(("rows",), None), "damaged plan"),
        (edited(("rows", 1, "t"), ...), r"damaged plan: KeyError\('t'\) in row 1"),
        (edited(("rows", 1, "t"), None), "damaged plan.*row 1"),
        (edited(("rows", 1, "x"), {"zero": 1.0}), "damaged plan.*row 1"),
        (edited(("rows", 1, "x"), {"9": 1.0}), "damaged plan.*reads states"),
        (edited(("rows", 1, "m"), [1.0]), "damaged plan.*row 1"),
        (edited(("rows", 0, "net", "space"), "y"), "damaged plan.*space='y'"),
        (edited(("rows", 0, "net", "p"), "high"), "damaged plan.*row 0"),
        (edited(("rows", 0, "net", "p"), math.inf), "damaged plan.*'p' of row 0.* is inf"),
        (edited(("solver",), ...), r"damaged plan: KeyError\('solver'\)"),
        (edited(("steps",), "many"), "damaged plan"),
        (edited(("t0",), None), "damaged plan"),
        (edited(("prediction",), "epsilom"), "did you mean 'eps'"),
    ],
)
def test_damaged_json_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fs.Plan.from_json(text)


# -- files ----------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "plan.json"
    small().save(path)
    assert fs.Plan.load(path) == small()
    assert os.listdir(path.parent) == ["plan.json"]
    other = fs.solvers.build("ddim", fs.VP.linear(), 4)
    other.save(path)
    assert fs.Plan.load(str(path)) == other


def test_load_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe not text")
    with pytest.raises(ValueError, match=r"plan\.json"):
        fs.Plan.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"plan\.json: not a plan"):
        fs.Plan.load(path)
    with pytest.raises(FileNotFoundError):
        fs.Plan.load(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_written_files_have_ordinary_permissions(tmp_path: Path) -> None:
    write_atomically(tmp_path / "ours", b"")
    (tmp_path / "any").write_bytes(b"")
    ours, ordinary = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "any"))
    assert ours == ordinary
