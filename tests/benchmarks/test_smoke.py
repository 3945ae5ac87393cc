"""The benchmark still runs; nothing here looks at a time."""

from benchmarks.choices import competitors
from benchmarks.rows import rows
from benchmarks.table import solve_table
from benchmarks.timing import measure


def test_a_row_is_measured_counted_and_printed():
    row = rows(small=True)[0]
    chosen = [
        c
        for c in competitors(row)
        if c.name.startswith("nksolve, default") or c.name.startswith("SciPy")
    ]
    measurements = measure(row, chosen, repeats=1, budget=10.0)
    assert [m.failure for m in measurements] == [None] * len(chosen)
    ours = measurements[0]
    assert ours.evaluations == ours.steps + 1
    assert ours.ratio <= row.rtol
    assert solve_table(row, measurements).count("\n") == 3 + len(chosen)
