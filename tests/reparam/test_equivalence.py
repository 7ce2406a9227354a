import numpy as np
import pytest

from repvgg_jax.reparam import EquivalenceError, agreement, assert_equivalent, first_divergence


def logits():
    return np.random.default_rng(0).normal(size=(6, 4))


def test_equal_logits_agree_exactly():
    found = assert_equivalent(logits(), logits(), rtol=0)
    assert (found.max_difference, found.relative, found.predictions_changed, found.compared) == (0, 0, 0, 6)


def test_a_difference_beyond_the_tolerance_is_refused_with_its_figures():
    other = logits()
    other[2, 1] += 1e-3
    assert agreement(logits(), other).max_difference == pytest.approx(1e-3)
    assert_equivalent(logits(), other, rtol=1e-2)
    with pytest.raises(EquivalenceError, match=r"largest logit difference 0.001 .*allowed 1e-05.*0 of 6"):
        assert_equivalent(logits(), other, rtol=1e-5)


def test_one_changed_prediction_is_refused_however_small_the_difference():
    reference = np.array([[1.0, 1.0 + 1e-9], [3.0, 0.0]])
    candidate = np.array([[1.0 + 2e-9, 1.0], [3.0, 0.0]])
    with pytest.raises(EquivalenceError, match="1 of 2 predictions changed"):
        assert_equivalent(reference, candidate, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_never_agree(value):
    broken = logits()
    broken[0, 0] = value
    for pair in ((broken, broken), (logits(), broken), (broken, logits())):
        with pytest.raises(EquivalenceError, match="nothing is proven: a logit is NaN or infinite"):
            assert_equivalent(*pair, rtol=1.0)


@pytest.mark.parametrize("constant", [0.0, 3.0, (1.0, 2.0, 3.0, 4.0)], ids=str)
def test_a_form_that_answers_every_input_the_same_proves_nothing(constant):
    same = np.broadcast_to(constant, (6, 4))
    for pair in ((same, same), (same, same + 1e-9 * logits())):
        with pytest.raises(EquivalenceError, match="nothing is proven: a form answers every input the same"):
            assert_equivalent(*pair, rtol=1e-5)
    # What varies by more than is allowed to differ is proof.
    assert assert_equivalent(same + logits(), same + logits(), rtol=1e-5).spread > 1e-5


def test_one_form_that_is_constant_is_enough_to_prove_nothing():
    with pytest.raises(EquivalenceError, match="nothing is proven"):
        assert_equivalent(logits(), np.zeros((6, 4)), rtol=1.0)


def test_one_image_is_compared_by_its_classes_and_a_single_logit_as_it_is():
    assert assert_equivalent([[1.0, 2.0]], [[1.0, 2.0]], rtol=1e-5).spread == 0.5
    with pytest.raises(EquivalenceError, match="nothing is proven"):
        assert_equivalent([[2.0, 2.0]], [[2.0, 2.0]], rtol=1e-5)
    assert assert_equivalent([[2.0]], [[2.0]], rtol=1e-5).compared == 1
    with pytest.raises(EquivalenceError, match="not the same function"):
        assert_equivalent([[2.0]], [[2.1]], rtol=1e-5)
    assert assert_equivalent([[1.0], [2.0]], [[1.0], [2.0]], rtol=1e-5).spread == 0.5


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"\(6, 4\) and \(6, 3\)"):
        agreement(logits(), logits()[:, :3])
    with pytest.raises(ValueError, match="at least one row"):
        agreement(np.ones((0, 3)), np.ones((0, 3)))


def test_the_first_endpoint_that_differs_is_named():
    ends = {"stem": logits(), "stage1": logits() + 1, "logits": logits() - 1}
    other = {**ends, "stage1": ends["stage1"] * 1.01, "logits": ends["logits"] * 2}
    assert first_divergence(ends, ends, rtol=1e-12) is None
    assert first_divergence(ends, other, rtol=1e-5) == "stage1"
    assert first_divergence(ends, {"logits": other["logits"]}, rtol=1e-5) == "logits"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_endpoint_that_is_not_finite_is_named_in_whichever_form_it_is(value):
    ends = {"stem": logits(), "stage1": logits() + 1, "logits": logits() - 1}
    broken = {**ends, "stage1": np.where(np.eye(6, 4), value, ends["stage1"])}
    for pair in ((ends, broken), (broken, ends), (broken, broken)):
        assert first_divergence(*pair, rtol=1.0) == "stage1"


def test_endpoints_are_compared_in_the_order_of_the_reference_and_measured_by_it():
    ends = {"stem": logits(), "logits": logits()}
    other = {"logits": 2 * logits(), "stem": 2 * logits()}
    assert first_divergence(ends, other, rtol=0.9) == "stem"
    # Twice the reference lies as far off as the reference is large, and only half as far as itself is.
    assert first_divergence(ends, other, rtol=1.0) is None
    assert first_divergence(other, ends, rtol=0.5) is None


def test_the_figures_are_what_their_names_say():
    reference = [[-4.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    candidate = [[-2.0, 2.0], [2.0, 1.0], [1.0, 0.5]]
    found = agreement(reference, candidate)
    assert found.max_difference == 2
    assert found.max_reference == 4
    assert found.relative == 0.5
    assert (found.predictions_changed, found.compared) == (2, 3)
    # Of the candidate, whose logits lie closer: its first class, from -2 to 2.
    assert found.spread == 1
    assert agreement(candidate, reference).relative == 1
    assert agreement(candidate, reference).spread == 2


def test_figures_of_what_is_not_finite_are_not_numbers():
    broken = logits()
    broken[0, 0] = np.inf
    for pair in ((broken, broken), (logits(), broken), (broken, logits())):
        found = agreement(*pair)
        figures = (found.max_difference, found.max_reference, found.relative, found.spread)
        assert np.isnan(figures).all()


def test_a_reference_of_zeros_equals_zeros_alone_and_neither_proves_anything():
    zeros = np.zeros((6, 4))
    assert agreement(zeros, zeros).relative == 0
    assert agreement(zeros, logits()).relative == np.inf
    with pytest.raises(EquivalenceError, match="nothing is proven"):
        assert_equivalent(zeros, zeros, rtol=0)


@pytest.mark.parametrize("shape", [(4,), (6, 2, 2), ()])
def test_logits_are_rows_of_classes(shape):
    with pytest.raises(ValueError, match=r"expected the same \(batch, classes\)"):
        agreement(np.ones(shape), np.ones(shape))
