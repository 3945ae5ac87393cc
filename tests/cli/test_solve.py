"""`nksolve solve`: what it prints, writes, and exits with."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from nksolve.cli.app import app
from nksolve.problems import PROBLEMS, get


@pytest.fixture
def run():
    """Runs the command line in this process, and undoes its choice of precision."""
    before = jax.config.jax_enable_x64
    yield lambda *words: CliRunner().invoke(app, [str(word) for word in words])
    jax.config.update("jax_enable_x64", before)


def _load(path):
    with np.load(path) as archive:
        return dict(archive)


def _file(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


def test_solves_and_writes(run, tmp_path):
    archive, picture = tmp_path / "out.npz", tmp_path / "out.png"
    done = run("solve", "bratu", "--n", 16, "--set", "lam=5", "--save", archive, "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "16 x 16 interior nodes, lambda = 5" in done.output
    assert "256 unknowns, float64" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")

    saved = _load(archive)
    problem = get("bratu", n=16, lam=5.0)
    assert saved["y"].shape == (16, 16)
    norm = np.linalg.norm(problem.fn(jnp.asarray(saved["y"]), problem.args))
    np.testing.assert_allclose(saved["residual_norm"], norm, rtol=1e-3)
    assert norm <= 1e-12 + 1e-8 * saved["initial_residual_norm"]
    history = saved["history"]
    assert history.size == saved["num_fn_evals"] == saved["num_steps"] + 1
    assert history["norm"][0] == saved["initial_residual_norm"]
    assert history["num_matvecs"].sum() == saved["num_matvecs"]
    assert history["reason"][-1] == saved["reason"]
    assert saved["reason"] in ("residual_rtol", "residual_atol")
    assert str(saved["reason"]) in done.output
    # A line for each trial, as it happened.
    assert all(f"{norm:.3e}" in done.output for norm in history["norm"])


def test_says_what_it_chose(run):
    done = run("solve", "bratu", "--n", 31)
    assert done.exit_code == 0, done.output
    assert "Multigrid: a V-cycle on 2 grids, 31 x 31 to 15 x 15" in done.output
    done = run("solve", "bratu", "--n", 31, "--method", "gmres")
    assert done.exit_code == 0, done.output
    assert "GMRES without preconditioner" in done.output
    done = run("solve", "bratu", "--n", 30)  # 30 does not halve
    assert done.exit_code == 0, done.output
    assert "SparseDirect: 900 unknowns" in done.output


def test_float32(run, tmp_path):
    archive = tmp_path / "out.npz"
    done = run("solve", "bratu", "--n", 8, "--float32", "--save", archive)
    assert done.exit_code == 0, done.output
    assert "64 unknowns, float32" in done.output
    assert _load(archive)["y"].dtype == np.float32


def test_failure_says_why_and_still_writes(run, tmp_path):
    """The trap of Freudenstein and Roth: the line search ends in a local minimum of ‖f‖."""
    archive, picture = tmp_path / "out.npz", tmp_path / "out.png"
    done = run("solve", "freudenstein-roth", "--save", archive, "--plot", picture)
    assert done.exit_code == 1
    assert "not solved, line_search_failed: The line search found no step" in done.stderr
    saved = _load(archive)
    assert saved["reason"] == "line_search_failed"
    problem = get("freudenstein-roth")
    assert saved["residual_norm"] == pytest.approx(
        float(np.linalg.norm(problem.fn(jnp.asarray(saved["y"]), problem.args)))
    )
    assert saved["residual_norm"] == np.nanmin(saved["history"]["norm"])
    assert (~saved["history"]["accepted"]).sum() == saved["num_rejected_steps"] > 0
    assert picture.exists()


def test_own_file_with_a_tree(run, tmp_path):
    path = _file(
        tmp_path,
        "import jax.numpy as jnp\n"
        "def fn(y, args):\n"
        "    return {'a': y['a'] ** 2 - args, 'b': y['b'] - y['a'].sum()}\n"
        "y0 = {'a': jnp.ones(3), 'b': 0.0}\n"
        "args = jnp.array([1.0, 4.0, 9.0])\n",
    )
    archive = tmp_path / "out.npz"
    done = run("solve", path, "--save", archive, "--rtol", 1e-12)
    assert done.exit_code == 0, done.output
    saved = _load(archive)
    np.testing.assert_allclose(saved["y_0"], [1.0, 2.0, 3.0])
    np.testing.assert_allclose(saved["y_1"], 6.0)
    assert saved["y_names"].tolist() == ["['a']", "['b']"]


_UNUSABLE = {
    "no fn": ("y0 = 1.0\n", "it has no fn"),
    "neither": ("", "it has no fn and no y0"),
    "fn is a number": ("fn = 1\ny0 = 1.0\n", "fn must be a function"),
    "raises": ("import math\nmath.sqrt(-1)\n", "line 2: math.sqrt(-1)\nValueError: "),
    "syntax": ("fn = (\n", "SyntaxError: "),
    "fn raises": (
        "def fn(y, args):\n    return y + args['k']\ny0 = 1.0\n",
        "line 2: return y + args['k']\nTypeError: ",
    ),
    "wrong shape": (
        "import jax.numpy as jnp\nfn = lambda y, args: y[:2]\ny0 = jnp.ones(3)\n",
        "as many equations as unknowns",
    ),
}


@pytest.mark.parametrize("case", _UNUSABLE)
def test_own_file_that_will_not_do(case, run, tmp_path):
    text, message = _UNUSABLE[case]
    done = run("solve", _file(tmp_path, text))
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert "Traceback" not in done.output


_WRONG = {
    "no such file": (["nowhere.py"], "there is no file nowhere.py"),
    "no such problem": (["brattu"], "did you mean 'bratu'"),
    "no such size": (["simple-2d", "--n", "3"], "does not take n"),
    "size too small": (["bratu", "--n", "0"], "n must be at least 1"),
    "no value": (["bratu", "--set", "lam"], "--set takes name=value"),
    "no folder": (["bratu", "--save", "nowhere/out.npz"], "there is no folder nowhere"),
    "no format": (["bratu", "--plot", "out.npz"], "--plot cannot write out.npz"),
}


@pytest.mark.parametrize("case", _WRONG)
def test_wrongly_asked(case, run):
    words, message = _WRONG[case]
    done = run("solve", *words)
    assert done.exit_code == 2, done.output
    assert message in done.stderr


def test_plot_without_matplotlib_is_said_before_solving(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = run("solve", "bratu", "--plot", "out.png")
    assert done.exit_code == 2
    assert done.stderr == "nksolve: --plot needs matplotlib: pip install 'nksolve[plot]'\n"
    assert done.stdout == ""


def test_problems_lists_all(run):
    done = run("problems")
    assert done.exit_code == 0, done.output
    first_words = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert set(PROBLEMS) <= first_words
    assert "n=511, lam=6.0" in done.stdout


def test_version(run):
    done = run("--version")
    assert done.exit_code == 0
    assert done.stdout.startswith("nksolve 0.")


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra(missing, root):
    script = f"""
import runpy, sys
sys.modules[{missing!r}] = None  # importing it now raises
runpy.run_module("nksolve", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"nksolve: the command line needs {missing}: pip install 'nksolve[cli]'\n"
    )


def test_a_user_of_the_shell_gets_float64(root):
    """In a process of its own, with JAX's own defaults."""
    chosen = ("JAX_ENABLE_X64", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")
    environment = {k: v for k, v in os.environ.items() if k not in chosen}
    done = subprocess.run(
        [sys.executable, "-m", "nksolve", "solve", "simple-2d"],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 unknowns, float64" in done.stdout
    assert done.stderr == ""
