"""The benchmark still runs; nothing here looks at a time."""

from benchmarks import honesty, nonlinear
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


def test_the_nonlinear_table_is_made():
    text = nonlinear.report(small=True, only=[], repeats=1, budget=10.0)
    lines = text.splitlines()
    wood = next(line for line in lines if line.startswith("| wood"))
    robust, newton = (cell.strip() for cell in wood.split("|")[2:4])
    # Steps / work of a solved problem; the first attempt of `Robust` is `NewtonKrylov`.
    assert robust == newton
    assert "/" in newton
    assert "**2** | **2**" in lines[-1]


def test_the_table_of_ends_is_made():
    text = honesty.report(small=True, only=["Backtracking", "Picard"], repeats=1, budget=10.0)
    lines = text.splitlines()
    told = [line.split("|") for line in lines if line.startswith(("| Backtracking", "| Picard"))]
    assert len(told) == 4  # two solvers in two dtypes
    for row in told:
        assert int(row[2]) == sum(map(int, row[3:-2])) and int(row[-2]) == 0
    solves = sum(int(row[2]) for row in told)
    assert f"**{solves:,} solves" in lines[0] and "0 broken" in lines[0]
