"""The figures, without a solve."""

import jax.numpy as jnp
import numpy as np
import pytest

from nksolve import REASONS
from nksolve.history import History
from nksolve.plot import new_figure, plot_field, plot_history, plot_solve


def _history(last=REASONS.residual_rtol):
    history = History.empty(6, jnp.dtype(jnp.float32))
    norms, accepted = [1.0, 2.0, 0.5, 1e-4], [True, False, True, True]
    for i, (norm, stands) in enumerate(zip(norms, accepted, strict=True)):
        history = history.record(
            jnp.array(i),
            jnp.array(True),
            norm=jnp.array(norm),
            eta=jnp.array(0.1),
            num_matvecs=jnp.array(0 if i in (1, 3) else 7 + i),
            step_length=jnp.array(1.0),
            accepted=jnp.array(stands),
            reason=last if i == 3 else REASONS.iterating,
        )
    return history


@pytest.mark.parametrize("last", [REASONS.residual_rtol, REASONS.iterating])
def test_history_draws_the_rows_that_were_written(last):
    (ax,) = new_figure().axes
    assert plot_history(_history(last), ax, target=1e-3) is ax
    accepted, rejected, *_ = ax.lines
    np.testing.assert_array_equal(accepted.get_xdata(), [0, 2, 3])
    np.testing.assert_allclose(accepted.get_ydata(), [1.0, 0.5, 1e-4])
    np.testing.assert_array_equal(rejected.get_xdata(), [1])
    assert [text.get_text() for text in ax.texts] == ["7", "9"]
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() and ax.get_ylabel()


def test_histories_side_by_side_have_a_legend():
    (ax,) = new_figure().axes
    for label in ("one", "two"):
        plot_history(_history(), ax, label=label)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert not ax.texts


@pytest.mark.parametrize("shape", [(9,), (50,), (4, 6)])
def test_field(shape):
    (ax,) = new_figure().axes
    assert plot_field(jnp.ones(shape), ax) is ax
    assert ax.get_xlabel() and ax.get_ylabel()
    assert len(ax.figure.axes) == len(shape)  # the colour bar of an image is one more


def test_field_of_three_dimensions_is_refused():
    with pytest.raises(ValueError, match="not 3"):
        plot_field(jnp.ones((2, 2, 2)), new_figure().axes[0])


def test_a_figure_with_and_without_a_field(tmp_path):
    for field, count in ((None, 1), (jnp.arange(3.0), 2)):
        figure = plot_solve(_history(), field, title="a problem")
        assert len(figure.axes) == count
        figure.savefig(tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 1000
