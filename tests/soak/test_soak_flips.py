"""Flipped bits: a part of the campaign that tests/soak/flips.py runs whole."""

from soak.flips import EARLIER, campaign


def test_no_flipped_bit_is_silent(tmp_path, monkeypatch, one_thread):
    """Of files of an earlier version only the kind of exception is promised."""
    monkeypatch.setattr("vimpac.figures.curves.plot_curves", lambda *paths: None)
    counts, bad = campaign(tmp_path, every=37, most=500, earlier=120)
    assert not bad
    assert len(counts) == 18 and all(found["noticed"] for found in counts.values())
    exact = [found for name, found in counts.items() if not name.endswith(EARLIER) and name != "metrics.jsonl"]
    assert all(found["noticed"] == found.total() for found in exact)
