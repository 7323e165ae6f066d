"""The support matrix: its page says what its data say, and every row names a test that exists."""

import ast
from pathlib import Path

import support_matrix
from testbed.architectures import ARCHITECTURES, TRAINED
from testbed.features import FEATURES
from unit.test_refusals import ARGUMENTS, FIELDS, MODELS, ON_GPU_ONLY, PROPERTIES

TESTS = Path(__file__).parents[1]


def test_the_page_is_made_of_the_data():
    again = "run python benchmarks/support_matrix.py"
    assert support_matrix.PAGE.read_text() == support_matrix.render(), again


def test_every_feature_names_a_test_that_exists():
    for feature in FEATURES:
        file, _, function = feature.test.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_feature_that_is_refused_by_name_has_a_row():
    names = " ".join(feature.name for feature in FEATURES)
    for name in {*MODELS, *PROPERTIES, *ARGUMENTS, *FIELDS, *ON_GPU_ONLY}:
        assert name in names


def test_enough_architectures():
    assert len(ARCHITECTURES) >= 45
    assert set(TRAINED) <= set(ARCHITECTURES)
