import pytest

KINDS = (
    *("archives", "checkpoints", "configs", "images", "manifests", "pickles"),
    *("references", "serving", "shards", "tables", "weights"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_ends_in_a_value_or_one_line(kind, try_inputs):
    report = try_inputs(kind, len(KINDS))
    if report.findings:
        pytest.fail(str(report), pytrace=False)
    assert report.tried
