import pytest

from repvgg_jax import create_model, summarize
from tests.golden.official import parameter_counts


def test_totals_are_the_published_parameters_and_multiply_adds():
    total = summarize(create_model("repvgg_a0"), (224, 224, 3)).total
    assert (total.training_parameters, total.deploy_parameters) == parameter_counts("RepVGG-A0")
    # RepVGG, table 4: A0 has 1.4 billion multiply-adds in the deploy form, B1g4 7.3.
    assert total.deploy_multiply_adds == pytest.approx(1.4e9, rel=0.05)
    assert summarize(create_model("repvgg_b1g4"), (224, 224, 3)).total.deploy_multiply_adds == pytest.approx(
        7.3e9, rel=0.01
    )


def test_a_row_counts_one_block_in_both_forms():
    rows = {row.name: row for row in summarize(create_model("repvgg_a0", num_classes=10), (32, 32, 3)).rows}
    block = rows["stage2_block2"]
    assert block.output_shape == (4, 4, 96)
    assert block.training_parameters == 96 * 96 * 10 + 3 * 2 * 96
    assert block.deploy_parameters == 96 * 96 * 9 + 96
    assert block.training_multiply_adds == 16 * 96 * 96 * 10
    assert block.deploy_multiply_adds == 16 * 96 * 96 * 9
    assert list(rows)[:3] == ["stem", "stage1_block1", "stage1_block2"]
    assert list(rows)[-1] == "head"


def test_auxiliary_heads_have_parameters_in_the_training_form_alone():
    rows = {row.name: row for row in summarize(create_model("repvggplus_l2pse"), (64, 64, 3)).rows}
    head = rows["stage3_first_aux"]
    assert head.training_parameters == 640 * 640 * 9 + 2 * 640 + 640 * 1000 + 1000
    assert (head.deploy_parameters, head.deploy_multiply_adds) == (0, 0)


def test_the_printed_table_has_a_line_for_each_block_and_a_total():
    text = str(summarize(create_model("repvgg_a0", num_classes=10), (32, 32, 3)))
    assert "stage4_block1" in text
    assert text.splitlines()[-1].split()[0] == "total"
    assert "7,840,778" in text
    assert "7,041,194" in text
