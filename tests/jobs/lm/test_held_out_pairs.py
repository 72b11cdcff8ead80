"""Pairs are held out whole, and of every source, whatever their names."""

import pyarrow as pa
import pyarrow.dataset as arrow_dataset
import pytest
from wavemill.jobs.lm.data import split_of


def test_held_out_pairs_are_a_tenth_of_every_source_and_whole():
    """Though names sort by source, and there are more than a border would be found of."""
    names = [
        f"{source}-{number:05d}"
        for source, num in (("books", 300), ("news", 5_000), ("talks", 200))
        for number in range(num)
    ]
    split = split_of(names, is_named=True, column="pair")
    table = pa.table({"pair": [name for name in names for _ in range(2)]})
    held_out, learnt = (
        arrow_dataset.dataset(table).to_table(filter=each)["pair"].to_pylist()
        for each in (split.held_out, split.learnt)
    )
    assert sorted(held_out + learnt) == sorted(table["pair"].to_pylist())
    assert not set(held_out) & set(learnt)
    assert len(set(held_out)) == len(names) // 10
    for source, num in (("books", 300), ("news", 5_000), ("talks", 200)):
        assert len({name for name in held_out if name.startswith(source)}) == pytest.approx(num / 10, rel=0.5)


@pytest.mark.parametrize("num", [2, 9, 19, 20, 641, 699])
def test_every_number_of_pairs_has_a_tenth_held_out(num: int):
    split = split_of([f"{number:03d}" for number in range(num)], is_named=True, column="pair")
    table = pa.table({"pair": [f"{number:03d}" for number in range(num)]})
    assert arrow_dataset.dataset(table).to_table(filter=split.held_out).num_rows == max(1, num // 10)
