"""The figures draw the numbers they are given."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from qstar.diagnostics import plots


def fields(tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Numbers of about the shape that real pairs give, for samples of 50 tokens."""
    rng = np.random.default_rng(seed)
    kl = rng.exponential(0.1, tokens)
    return {
        "alpha": rng.beta(8, 8, tokens),
        "kl": kl,
        "ess_ratio": rng.uniform(0.5, 1, tokens) / rng.uniform(0.5, 1, tokens),
        "position": np.arange(tokens) % 50,
    }


def test_a_distribution_is_of_all_tokens():
    values = fields(1000)
    values["ess_ratio"][:3] = np.nan  # are said to be missing
    for quantity in plots.LABELS:
        ax = plots.distribution({"x": values}, quantity).axes[0]
        assert ax.patches[0].get_data().values.sum() == pytest.approx(1)
        assert ("3 tokens are not drawn" in ax.get_title(loc="left")) == (quantity == "ess_ratio")
    edges = plots.distribution({"x": values}, "alpha").axes[0].patches[0].get_data().edges
    expected = np.histogram(values["alpha"], edges)[0] / 1000
    assert plots.distribution({"x": values}, "alpha").axes[0].patches[0].get_data().values == pytest.approx(expected)


def test_positions_have_their_means_and_counts():
    values = fields(120)  # two samples of 50 tokens and one of 20
    ax_alpha, ax_kl, ax_count = plots.along_position({"x": values}).axes
    for ax, name in ((ax_alpha, "alpha"), (ax_kl, "kl")):
        x, y = ax.lines[0].get_data()
        assert list(x) == [i + 0.5 for i in range(50)]
        assert y == pytest.approx([values[name][i::50].mean() for i in range(50)])
    assert list(ax_count.patches[0].get_data().values) == [3] * 20 + [2] * 30


def test_the_heaviest_samples_come_first():
    weights = np.array([1.0, 6.0, 2.0, 1.0])
    even = np.zeros(4)
    files = {"x": {"log_weights_theta": np.log(weights) - 900, "log_weights_t": even}}
    theta, t, _ = plots.weight_concentration(files).axes[0].lines
    assert theta.get_ydata() == pytest.approx([0, 0.6, 0.8, 0.9, 1])
    assert theta.get_xdata() == pytest.approx(t.get_ydata())
    files["x"]["log_weights_t"] = np.full(4, -np.inf)
    assert len(plots.weight_concentration(files).axes[0].lines) == 2  # nothing to share out


def test_png_of_any_names_and_sizes():
    one = fields(7, 1)
    for files in ({"x": one}, {"$_\\frac{": one, "_b": fields(2000, 2), "日本": fields(100, 3)}):
        samples = {name: {"log_weights_theta": np.zeros(3), "log_weights_t": np.full(3, -np.inf)} for name in files}
        for dark in (False, True):
            figures = [plots.distribution(files, quantity, dark) for quantity in plots.LABELS]
            figures += [plots.alpha_against_ess_ratio(x, dark) for x in files.values()]
            figures += [plots.along_position(files, dark), plots.weight_concentration(samples, dark)]
            for figure in figures:
                assert isinstance(figure, Figure)
                assert plots.png(figure, dpi=50).startswith(b"\x89PNG")
    same = [plots.png(plots.distribution({"x": one}, "kl")) for _ in range(2)]
    assert same[0] == same[1]


def test_nothing_finite_is_still_a_figure():
    values = {name: np.full(5, np.nan) for name in plots.LABELS}
    values["position"] = np.arange(5)
    for quantity in plots.LABELS:
        assert "5 tokens" in plots.distribution({"x": values}, quantity).axes[0].get_title(loc="left")
    assert plots.png(plots.alpha_against_ess_ratio(values), dpi=40)
    assert plots.png(plots.along_position({"x": values}), dpi=40)
