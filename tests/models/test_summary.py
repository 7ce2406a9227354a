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
    rows = {row.name: row for row in summarize(create_model("repvggplus_l2pse", depths=(1, 1, 2, 1)), (64, 64, 3)).rows}
    head = rows["stage3_first_aux"]
    assert head.training_parameters == 640 * 640 * 9 + 2 * 640 + 640 * 1000 + 1000
    assert (head.deploy_parameters, head.deploy_multiply_adds) == (0, 0)


def test_auxiliary_heads_come_where_they_are_computed_and_have_no_multiply_adds():
    rows = summarize(create_model("repvggplus_l2pse", depths=(2, 1, 2, 1)), (64, 64, 3)).rows
    assert [row.name for row in rows] == [
        "stem", "stage1_block1", "stage1_block2", "stage1_aux", "stage2_block1", "stage2_aux", "stage3_block1",
        "stage3_first_aux", "stage3_block2", "stage4_block1", "head",
    ]  # fmt: skip
    # 32×32 pixels of a 3×3 and a 1×1 kernel, and squeeze-excite's two dense layers once, whatever the pixels.
    assert rows[0].training_multiply_adds == 32 * 32 * 3 * 64 * 10 + 2 * 64 * 16
    assert rows[0].deploy_multiply_adds == 32 * 32 * 3 * 64 * 9 + 2 * 64 * 16
    heads = {row.name: (row.training_multiply_adds, row.deploy_multiply_adds) for row in rows if "_aux" in row.name}
    assert heads == dict.fromkeys(("stage1_aux", "stage2_aux", "stage3_first_aux"), (0, 0))
    assert all(row.training_multiply_adds > row.deploy_multiply_adds > 0 for row in rows[:3])


def test_a_total_is_the_sum_of_every_column_dense_layers_included():
    summary = summarize(create_model("repvgg_a0", depths=(1, 1, 1, 1), num_classes=10), (32, 32, 3))
    head = summary.rows[-1]
    assert (head.training_parameters, head.training_multiply_adds) == (1280 * 10 + 10, 1280 * 10)
    assert (head.deploy_parameters, head.deploy_multiply_adds) == (1280 * 10 + 10, 1280 * 10)
    # Pixels, input and output channels of stem and stages: a 3×3 and a 1×1 kernel each, or one 3×3.
    products = sum(n * n * c * k for n, c, k in ((16, 3, 48), (8, 48, 48), (4, 48, 96), (2, 96, 192), (1, 192, 1280)))
    total = summary.total
    assert (total.training_multiply_adds, total.deploy_multiply_adds) == (products * 10 + 12800, products * 9 + 12800)
    assert total.training_parameters == sum(row.training_parameters for row in summary.rows)
    assert total.output_shape == (10,)


def test_the_printed_table_has_a_line_for_each_block_and_a_total():
    text = str(summarize(create_model("repvgg_a0", num_classes=10), (32, 32, 3)))
    assert "stage4_block1" in text
    assert text.splitlines()[-1].split()[0] == "total"
    assert "7,840,778" in text
    assert "7,041,194" in text
