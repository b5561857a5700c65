"""Effective batches and micro-batches, with literal tensors."""

from hypothesis import given
from hypothesis import strategies as st

from stages.engine.batches import Limits, PackedBatches, PaddedBatches, shuffled_batches
from tests.conftest import example

FIRST = example([5, 6, 7], [8, 2])
SECOND = example([5, 6, 9], [1, 3, 2])


def test_packed_batch_has_the_shared_prefix_once() -> None:
    batch = PackedBatches(Limits(100, 1000)).collate([[FIRST, SECOND]])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 3]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 2, 3, 4]]
    assert batch.columns.tolist() == [2, 3, 4, 5, 6]
    assert batch.labels.tolist() == [[8, 2, 1, 3, 2]]


def test_last_prompt_token_is_not_shared_because_it_predicts_the_response() -> None:
    batch = PackedBatches(Limits(100, 1000)).collate([[example([5, 6], [8, 2]), example([5, 6], [9, 2])]])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 8, 6, 9]]
    assert batch.columns.tolist() == [1, 2, 3, 4]


def test_padded_batch_targets_only_supervised_tokens() -> None:
    batch = PaddedBatches(Limits(100, 1000)).collate([FIRST, SECOND])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 2, 0], [5, 6, 9, 1, 3, 2]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.columns.tolist() == [2, 3, 4]
    assert batch.labels.tolist() == [[8, 2, -100], [1, 3, 2]]


def test_examples_with_different_prefixes_are_in_different_groups() -> None:
    alike = [example([1] * 20 + [i], [2]) for i in range(3)]
    other = [example([9] * 20 + [i], [2]) for i in range(3)]
    mixed = [alike[0], other[0], alike[1], other[1], alike[2], other[2]]
    (batch,) = PackedBatches(Limits(1000, 1000)).micro_batches(mixed)
    assert batch.inputs["input_ids"].tolist() == [[1] * 20 + [0, 1, 2] + [9] * 20 + [0, 1, 2]]
    assert [len(batch.examples) for batch in PackedBatches(Limits(27, 1000)).micro_batches(mixed)] == [3, 3]


def test_micro_batches_do_not_exceed_the_token_limit() -> None:
    examples = [example([1, i], [2, 3]) for i in range(5)]
    assert [len(batch.examples) for batch in PaddedBatches(Limits(8, 1000)).micro_batches(examples)] == [2, 2, 1]
    assert [len(batch.examples) for batch in PackedBatches(Limits(7, 1000)).micro_batches(examples)] == [2, 2, 1]
    assert [len(batch.examples) for batch in PaddedBatches(Limits(1, 1000)).micro_batches(examples)] == [1, 1, 1, 1, 1]


def test_last_effective_batch_of_an_epoch_is_smaller_and_kept() -> None:
    examples = [example([i], [2], str(i)) for i in range(7)]
    batches = list(shuffled_batches(examples, 3, seed=0, epoch=0))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert sorted(e.example_id for batch in batches for e in batch) == ["0", "1", "2", "3", "4", "5", "6"]


def order(ids: list[str], seed: int = 1, epoch: int = 0) -> list[str]:
    """The ids of examples in the order of an epoch."""
    examples = [example([5], [2], example_id) for example_id in ids]
    return [e.example_id for batch in shuffled_batches(examples, 4, seed, epoch) for e in batch]


def test_order_depends_on_seed_and_epoch() -> None:
    assert order(list("abcdef"), 1, 0) == list("afdebc")
    assert order(list("abcdef"), 1, 1) == list("eacfdb")
    assert order(list("abcdef"), 2, 0) == list("feabdc")


@given(ids=st.lists(st.text(max_size=4), unique=True, min_size=1, max_size=20), data=st.data())
def test_removing_an_example_keeps_the_order_of_the_others(ids: list[str], data: st.DataObject) -> None:
    removed = data.draw(st.sampled_from(ids))
    others = data.draw(st.permutations([one for one in ids if one != removed]))
    assert order(others) == [one for one in order(ids) if one != removed]


token_ids = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@given(pairs=st.lists(st.tuples(token_ids, token_ids), min_size=1, max_size=12), limit=st.integers(1, 40))
def test_every_supervised_token_is_in_exactly_one_micro_batch(
    pairs: list[tuple[list[int], list[int]]], limit: int
) -> None:
    examples = [example(prompt, response, str(i)) for i, (prompt, response) in enumerate(pairs)]
    expected = sorted(token for _, response in pairs for token in response)
    for batches in (
        PackedBatches(Limits(limit, limit)),
        PackedBatches(Limits(limit, limit), share_prefix=False),
        PaddedBatches(Limits(limit, limit)),
    ):
        found = list(batches.micro_batches(examples))
        assert sorted(e.example_id for batch in found for e in batch.examples) == sorted(map(str, range(len(pairs))))
        labels = [batch.labels for batch in found]
        assert sorted(token for one in labels for token in one[one != -100].tolist()) == expected
        for batch in found:
            assert batch.labels.shape[1] == len(batch.columns)
