"""scripts/focus_experiment.py reproduces the numbers published by the authors."""

import pytest

from scripts.focus_experiment import attention_weights, crossing, draw, make_vectors, mean_entropy, random_vectors, table

# Attention weights of one query for five keys, by form of attention and by the factor that scales query and keys.
PUBLISHED = {
    ("linear", 1.0): [0.1521, 0.2809, 0.1881, 0.2165, 0.1624],
    ("focused", 1.0): [0.0389, 0.4174, 0.1098, 0.3957, 0.0382],
    ("softmax", 0.2): [0.0713, 0.5266, 0.1248, 0.1937, 0.0836],
    ("focused", 0.2): [0.0389, 0.4174, 0.1098, 0.3957, 0.0382],
}


@pytest.mark.parametrize(("form", "scale"), PUBLISHED)
def test_attention_weights_equal_those_published_by_the_authors(form, scale):
    q, k = make_vectors()
    weights = attention_weights(form, scale * q, scale * k)
    assert weights[0].tolist() == pytest.approx(PUBLISHED[form, scale], abs=5e-5)
    assert ", ".join(f"{value:.4f}" for value in PUBLISHED[form, scale]) in table()


def test_focused_attention_is_invariant_to_the_scale_of_q_and_k_and_softmax_attention_is_not():
    q, k = random_vectors()
    focused = [mean_entropy("focused", scale * q, scale * k) for scale in (0.1, 1, 10)]
    assert focused == pytest.approx([focused[0]] * 3, abs=1e-3)
    softmax = [mean_entropy("softmax, scaled", scale * q, scale * k) for scale in (0.1, 1, 10)]
    assert softmax == sorted(softmax, reverse=True)
    factor = crossing(q, k, "softmax, scaled")
    assert mean_entropy("softmax, scaled", factor * q, factor * k) == pytest.approx(focused[1], abs=1e-6)


def test_draw_writes_a_png_file(tmp_path):
    draw(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
