"""Planted defects (mutations.toml) have a place in the sources; ``python tests/mutations.py`` says what notices."""

import pytest

mutations = pytest.importorskip("mutations", reason="needs Python 3.11's tomllib")


@pytest.mark.skipif(not (mutations.ROOT / "csrc").exists(), reason="the tests were copied without the sources")
def test_every_defect_has_its_place():
    defects = mutations.read()
    for name, defect in defects.items():
        assert mutations.planted((mutations.ROOT / defect["file"]).read_text(), name, defect)
    assert len(defects) >= 32
