"""When a run validates, saves and ends, and its learning rate at each step."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stages.engine.schedule import Schedule
from stages.runtime.errors import UserError
from stages.runtime.params import TrainParams, load_params
from tests.clone import edit

Plan = Callable[..., Schedule]


@pytest.fixture
def plan(project: Path) -> Plan:
    """`Schedule.plan` for a number of examples, with effective batches of 10 and other parameters as literal text."""

    def planned(num_examples: int, **params: str) -> Schedule:
        defaults = {"batch_size": "10", "gradient_accumulation_steps": "1", "warmup_steps": "0"}
        edit(project, **defaults | params)
        return Schedule.plan(load_params(TrainParams), num_examples)

    return planned


def rates(schedule: Schedule) -> list[float]:
    return [schedule.learning_rate_ratio(step) for step in range(1, schedule.num_steps + 1)]


def validated(schedule: Schedule) -> list[int]:
    return [step for step in range(1, schedule.num_steps + 1) if schedule.validates_after(step)]


def saved(schedule: Schedule) -> list[int]:
    return [step for step in range(1, schedule.num_steps + 1) if schedule.saves_after(step)]


def test_a_run_ends_after_its_epochs_or_after_max_steps(plan: Plan) -> None:
    assert (plan(95).num_steps, plan(95).steps_per_epoch) == (10, 10)
    assert plan(95, num_epochs="3").num_steps == 30
    assert (plan(95, num_epochs="3", max_steps="12").num_steps, plan(95, max_steps="12").steps_per_epoch) == (12, 10)
    assert plan(95, num_epochs="3", max_steps="1000").num_steps == 30


@pytest.mark.parametrize(
    ("warmup_steps", "num_steps", "expected"),
    [("0", 10, 0), ("0", 1, 0), ("0.1", 10, 1), ("0.1", 51, 6), ("0.5", 3, 2), ("1", 2, 1), ("9", 10, 9)],
)
def test_warmup_counts_steps_or_is_a_fraction(plan: Plan, warmup_steps: str, num_steps: int, expected: int) -> None:
    assert plan(10 * num_steps, warmup_steps=warmup_steps).warmup_steps == expected


@pytest.mark.parametrize(("warmup_steps", "num_steps", "found"), [("10", 10, 10), ("500", 57, 500), ("0.9", 1, 1)])
def test_warmup_as_long_as_the_run_is_an_error_with_both_numbers(
    plan: Plan, warmup_steps: str, num_steps: int, found: int
) -> None:
    with pytest.raises(UserError) as error:
        plan(10 * num_steps, warmup_steps=warmup_steps)
    assert f"which is {found} steps of a run of {num_steps}; must be shorter than the run" in str(error.value)


def test_warmup_ends_at_the_peak_and_no_step_has_a_learning_rate_of_0(plan: Plan) -> None:
    assert rates(plan(50, warmup_steps="2")) == pytest.approx([0.5, 1, 0.75, 0.5, 0.25])
    assert rates(plan(40)) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(plan(40, lr_scheduler="cosine")) == pytest.approx([1, 0.8536, 0.5, 0.1464], abs=1e-4)
    assert rates(plan(40, lr_scheduler="constant", warmup_steps="2")) == [0.5, 1, 1, 1]
    assert rates(plan(10)) == [1]


def test_the_learning_rate_approaches_its_minimum(plan: Plan) -> None:
    assert rates(plan(40, min_learning_rate_ratio="0.2")) == pytest.approx([1, 0.8, 0.6, 0.4])
    cosine = rates(plan(10_000, lr_scheduler="cosine", min_learning_rate_ratio="0.1"))
    assert cosine[-1] == pytest.approx(0.1, abs=1e-5)
    assert min(cosine) > 0.1


def test_validations_are_at_fractions_or_multiples_and_never_shortly_before_the_end(plan: Plan) -> None:
    assert validated(plan(510, eval_steps="0.5")) == [26, 51]
    assert validated(plan(510, eval_steps="0.25")) == [13, 26, 39, 51]
    assert validated(plan(510, eval_steps="10")) == [10, 20, 30, 40, 51]
    assert validated(plan(480, eval_steps="10")) == [10, 20, 30, 40, 48]
    assert validated(plan(40, eval_steps="1")) == [1, 2, 3, 4]
    assert validated(plan(40, eval_steps="100")) == [4]
    assert validated(plan(10, eval_steps="0.001")) == [1]


def test_checkpoints_are_at_fractions_or_multiples_and_not_at_the_end(plan: Plan) -> None:
    assert saved(plan(510, save_steps="0.5")) == [26]
    assert saved(plan(60, save_steps="2")) == [2, 4]
    assert saved(plan(60, save_steps="100")) == []


@pytest.mark.parametrize(("patience", "eval_steps", "found"), [("3", "100", 0), ("1", "2", 1), ("3", "1", 3)])
def test_a_patience_that_could_never_stop_the_run_is_an_error(
    plan: Plan, patience: str, eval_steps: str, found: int
) -> None:
    assert plan(40, early_stopping_patience="2", eval_steps="1").num_steps == 4
    with pytest.raises(UserError) as error:
        plan(40, early_stopping_patience=patience, eval_steps=eval_steps)
    assert str(error.value) == (
        f"early_stopping_patience: found {patience}; this run has {found} validations before its last step, so it "
        f"could never stop early; must be lower, or null, or lower eval_steps ({eval_steps})"
    )
